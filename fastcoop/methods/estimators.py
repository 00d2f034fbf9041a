"""scikit-learn estimators over the methods: from image features, or images, to predictions without files.

Each takes its method's settings as parameters and gives the same numbers as a sweep's run of the same settings, seed
and features.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_is_fitted, column_or_1d, validate_data

from fastcoop import backbones
from fastcoop.checks import amount, shortened, whole_number
from fastcoop.datasets import Dataset, FewShot
from fastcoop.datasets.notes import notes_on_classes
from fastcoop.errors import MissingFile, UserError, nearest
from fastcoop.methods import METHODS
from fastcoop.methods.base import Outcome, RunContext, make_settings
from fastcoop.methods.data import Data, Labelled
from fastcoop.methods.late import Backbone
from fastcoop.methods.scores import Classifier, LinearClassifier, unit
from fastcoop.methods.spec import RunSpec

TEMPLATE = "a photo of a {}."
LOGIT_SCALE = 100.0  # CLIP's
HELD_OUT_EVERY = 5  # images of a class, where no validation images are given
NO_IMAGES = np.zeros((0, 1, 1), np.float32), np.zeros(0, np.int64)
NO_DIRECTION = "{} has features of length 0, which have no direction; remove these images."

log = logging.getLogger("fastcoop")


class MethodClassifier(ClassifierMixin, BaseEstimator):
    """Base class of the estimators. A subclass names its method, whose settings become its parameters.

        class NearestMean(MethodClassifier, method="nearest_mean"):
            "Predict the class with the nearest mean feature."

    Parameters:
        backbone: A `Backbone`, or its name or folder as in a grid file. It encodes prompts, and images where X are
            images. It is shared by clones. A pickle holds its name or path, by which it is loaded again when needed.
        seed: Seed of everything random, of methods that learn.

    Attributes:
        classes_: (classes,), the values that `predict` returns.
        class_names_: Names of the classes, which prompts are made of.
        coef_: float (classes, dim), weights of the classes: text features of length 1, or those of a linear probe. It
            and the next two are those of linear classifiers only.
        intercept_: float (classes,). -inf for classes without a training image.
        logit_scale_: Factor on the products of features and ``coef_``.
        chosen_: Numbers by name that were chosen or recorded, such as "alpha" and "val_accuracy".
        n_features_in_: dim.
        contexts_: float32 (M, width) or (classes, M, width), learned context vectors, of prompt learning.
        losses_: float32 (epochs,), of methods that train by steps.
    """

    method: ClassVar[str]

    def __init_subclass__(cls, *, method: str | None = None, **others: Any):
        super().__init_subclass__(**others)
        if method is None:
            return
        cls.method = method
        defaults = {name: one.get_default() for name, one in METHODS[method].Settings.model_fields.items()}
        if METHODS[method].learns:
            defaults["seed"] = 1
        cls.__annotations__ = dict.fromkeys(["backbone", *defaults], Any)
        cls.backbone = None
        for name, default in defaults.items():
            setattr(cls, name, field(default=default, kw_only=True))
        dataclass(eq=False, repr=False)(cls)  # its __init__ stores the parameters, as scikit-learn expects

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        X_val: Any = None,
        y_val: Any = None,
        text_features: Any = None,
        logit_scale: float | None = None,
    ) -> MethodClassifier:
        """Learn from images of known classes.

        Args:
            X: Raw image features (images, dim) or (images, views, dim), where view 0 is the test-time crop and the
                others are augmentations, as an array or tensor; or a sequence of paths or PIL images. May be None for
                methods that learn nothing.
            y: (images,), indices into ``class_names``, or the names themselves.
            class_names: Names in the order of ``coef_``, and of ``text_features``. By default the sorted values of
                ``y``, or the rows of ``text_features``.
            X_val, y_val: Validation images, for settings chosen by their accuracy. If such a setting has none, every
                fifth image of each class is held out.
            text_features: Class text features (classes, dim) in place of a backbone. Their length matters to TaskRes,
                ZeroShotLinearProbe and CLAP, which learn from them as the text tower gives them.
            logit_scale: Factor on cosine similarities with ``text_features``. By default the backbone's, or else 100.

        Returns:
            The estimator.

        Raises:
            UserError: An argument or a parameter cannot be used, or the training diverged. It is a ValueError, as are
                scikit-learn's own errors of ``X`` and ``y``.
        """
        method, title, backbone = METHODS[self.method], type(self).__name__, self._load_backbone()
        settings = make_settings(method, self._given_settings())
        texts = None if text_features is None else _read_texts(text_features)
        lengths = () if texts is None else np.linalg.norm(texts, axis=1)
        if len(lengths) and method.text_length_matters and np.allclose(lengths, 1, atol=0.01):
            log.warning(
                "All text_features have length 1; pass them as the text tower gives them, unless it scales them "
                f"itself: {title} learns otherwise from scaled ones."
            )
        if logit_scale is not None and texts is None:
            raise UserError("logit_scale belongs to text_features; leave it out, or pass both.")
        if getattr(settings, "selection", "") in ("imagenet_val", "official"):
            raise UserError(
                f"{title} has neither another dataset nor test images to choose on; set selection to fixed, "
                "few_val, shots_val or full_val."
            )
        if (X_val is None) != (y_val is None):
            raise UserError("X_val and y_val belong together; pass both, or neither.")
        if X is None and method.learns:
            raise UserError(f"{title} learns from images; pass their features, or paths, as X.")
        if method.needs_backbone and texts is not None:
            raise UserError(
                f"{title} passes prompts through the text tower; pass a backbone in place of text_features."
            )
        if method.needs_backbone and backbone is None:
            raise UserError(f'{title} needs a backbone; pass it or its name, such as {title}("RN50").')
        features = None if X is None and not method.learns else self._read_features(X, backbone, reset=True)
        labels = self._read_classes(y, class_names, texts)
        dataset = Dataset("images", Path(), self.class_names_, TEMPLATE, {}, "", "images", Path())
        views = 0 if features is None else features.shape[1] - 1
        data = _ArrayData(dataset, None, views, text_features=texts)
        run, outcome = RunSpec.of(method.name, settings, data), Outcome({})
        self._check_shapes(run, features, labels, backbone)
        if method.learns:
            data.images = cast(Labelled, (features, labels))
            if X_val is not None:
                data.val = self._read_validation(run, X_val, y_val, backbone)
            elif choice := method.validation_choice(settings):
                _hold_out(data, instead=choice[1])
        if texts is not None or backbone is None:
            scale = getattr(backbone, "logit_scale", LOGIT_SCALE)
            if logit_scale is not None:
                scale = amount(logit_scale, "logit_scale")
            projection = backbone.image_projection if backbone and "pre" in method.kinds else None
            like = cast(np.ndarray, features if texts is None else texts)
            backbone = SimpleNamespace(  # all that such methods read of it
                logit_scale=scale, device="cpu", image_projection=projection, embed_dim=like.shape[-1]
            )
        if method.learns:
            subset = FewShot(*(np.arange(len(part[1])) for part in (data.images, data.val)))
            shots = int(np.bincount(data.images[1]).max())
            seed = whole_number(self.seed, "the seed")
            run = replace(run, shots=shots, seed=seed, subset=subset, model=backbone)
            method.check(run)
            outcomes: list[Outcome] = []
            method.run(backbone, [run], lambda _, one: outcomes.append(one), RunContext())
            (outcome,) = outcomes
        known = replace(run, contexts=outcome.contexts, weights=outcome.weights)
        classifier = method.classifier(backbone, known, data)
        learned = classifier.weights if isinstance(classifier, LinearClassifier) else 0.0
        if outcome.status != "done" or not np.isfinite(learned).all():
            if "learning_rate" in method.Settings.model_fields:
                raise UserError(f"The training of {title} diverged; pass a smaller learning_rate.")
            raise UserError(f"{title} learned weights that are not finite.")
        self._keep(classifier, outcome)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits (images, classes), whose softmax are the probabilities.

        With two classes, as in scikit-learn, it is the second's logit minus the first's, (images,).
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities (images, classes)."""
        return np.asarray(softmax(self._logits(X).astype(np.float64), axis=1))

    def predict(self, X: Any) -> np.ndarray:
        """Return the class of each image, (images,), a value of ``classes_``."""
        labels = self._logits(X).argmax(axis=1)
        return np.asarray(self.classes_[labels])

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "_classifier")
        features = self._read_features(X, None, reset=False)[:, 0]
        classifier: Any = self._classifier
        if getattr(classifier, "backbone", classifier) is None:  # after pickling
            classifier = replace(classifier, backbone=self._load_backbone())
        logits = classifier.logits(unit(features) if classifier.unit_length else features)
        if np.isnan(logits).any():
            raise UserError(NO_DIRECTION.format("X"))
        return logits

    def _keep(self, classifier: Classifier, outcome: Outcome) -> None:
        self._classifier = classifier
        if isinstance(classifier, LinearClassifier):
            rows = np.arange(len(self.classes_)) if classifier.rows is None else classifier.rows
            bias = np.zeros(len(classifier.weights)) if classifier.bias is None else classifier.bias
            self.coef_ = np.where(rows[:, None] >= 0, classifier.weights[rows], np.float32(0))
            self.intercept_ = np.where(rows >= 0, bias[rows], -np.inf)
            self.logit_scale_, self.n_features_in_ = classifier.scale, self.coef_.shape[1]
        if outcome.extra:
            self.chosen_ = outcome.extra
        if outcome.contexts is not None:
            self.contexts_ = outcome.contexts
        if outcome.losses is not None:
            self.losses_ = outcome.losses

    def _given_settings(self) -> dict[str, Any]:
        """Return the settings that differ from the method's defaults, NumPy's numbers as Python's."""
        fields = METHODS[self.method].Settings.model_fields.items()
        given = {
            name: getattr(self, name) for name, one in fields if getattr(self, name) != one.get_default()
        }
        return {name: v.item() if isinstance(v, np.generic) else v for name, v in given.items()}

    def _load_backbone(self) -> Any:
        if not isinstance(self.backbone, str | os.PathLike):
            if self.backbone is not None and not hasattr(self.backbone, "digest"):
                raise UserError(
                    f"Expected backbone to be what load_backbone returns, or its name, got {shortened(self.backbone)}."
                )
            return self.backbone
        backbone = backbones.backbone_from_spec(str(self.backbone))
        digest = getattr(self, "_backbone_digest", backbone.digest)
        if backbone.digest != digest:
            raise UserError(
                f"The estimator was pickled with other weights of {self.backbone} ({digest[:12]}) than those found by "
                f"that name ({backbone.digest[:12]}); pass the backbone by set_params(backbone=...)."
            )
        return backbone

    def _read_features(self, X: Any, backbone: Any, reset: bool) -> np.ndarray:
        """Return features float32 (images, views, dim)."""
        if isinstance(X, str | os.PathLike):
            raise UserError(f"Expected features or a list of images, got one path; pass [{str(X)!r}].")
        if hasattr(X, "convert") or getattr(X, "ndim", 0) > 3:
            raise UserError(
                "Expected features (images, dim) or (images, views, dim), or a list of paths or PIL images, got "
                f"{'one image' if hasattr(X, 'convert') else f'pixels {tuple(X.shape)}'}; pass such a list."
            )
        if hasattr(X, "to_numpy") and X.ndim == 1:  # a pandas Series
            X = X.to_numpy()
        X = _as_array(X)
        if _are_images(X):
            backbone = backbone or self._load_backbone()
            if backbone is None:
                title = type(self).__name__
                raise UserError(f"{title} needs a backbone to encode images; pass it, or pass features.")
            X = _encode_images(backbone, X, before="pre" in METHODS[self.method].kinds)
        views = 1
        if getattr(X, "ndim", 0) == 3:
            views, X = X.shape[1], X.reshape(-1, X.shape[-1])
        features = np.asarray(validate_data(self, X, dtype=np.float32, order="C", reset=reset))
        return features.reshape(-1, views, features.shape[-1])

    def _read_classes(
        self, y: Any, class_names: Sequence[str] | None, texts: np.ndarray | None
    ) -> np.ndarray | None:
        """Set the classes, and return the labels of images, int64 (images,)."""
        title, method, named = type(self).__name__, METHODS[self.method], False
        if y is None and method.learns:
            raise UserError(f"{title} requires y to be passed, but the target y is None.")
        if y is not None:
            y = column_or_1d(_as_array(y), warn=True)
            assert_all_finite(y, input_name="y")
            check_classification_targets(y)
            named = all(isinstance(one, str) for one in y.tolist())
        names = None if class_names is None else _read_names(class_names)
        if names is not None:
            if texts is None:
                for note in notes_on_classes(title, names, {}, "in class_names"):
                    log.warning(note)
            if named and (twice := {one for one in names if names.count(one) > 1}):
                raise UserError(
                    f"Expected y to hold indices, since two classes are called {min(twice)!r}, got names."
                )
            self.classes_ = np.array(names) if named else np.arange(len(names))
        elif texts is not None and not named:
            self.classes_ = np.arange(len(texts))
        elif y is None or texts is not None or (method.needs_backbone and not named):
            raise UserError(f"{title} needs the names of the classes, in order; pass class_names to fit.")
        else:
            self.classes_ = np.unique(y)
        self.class_names_ = tuple(map(str, self.classes_ if names is None else names))
        if len(self.classes_) < 2:
            raise UserError(f"Expected at least two classes, got {len(self.classes_)} class.")
        return None if y is None else self._label_indices(y)

    def _label_indices(self, y: Any, name: str = "y") -> np.ndarray:
        y = np.asarray(_as_array(y)).ravel()
        labels = pd.Index(self.classes_).get_indexer(y).astype(np.int64)
        if (labels < 0).any():
            value = y[labels < 0].tolist()[0]
            hint = nearest(value if isinstance(value, str) else "", map(str, self.classes_))
            raise UserError(
                f"Expected {name} to hold class names or indices into class_names, got {value!r}.{hint}"
            )
        return labels

    def _check_shapes(
        self,
        run: RunSpec,
        features: np.ndarray | None,
        labels: np.ndarray | None,
        backbone: Any,
        suffix: str = "",
    ) -> None:
        """Raise UserError if features, labels, text features and the backbone do not fit each other.

        ``suffix``: of the names of X and y.
        """
        title, method, texts = type(self).__name__, METHODS[self.method], run.data.text_features
        classes, prompts = self.classes_, method.prompts(run.settings, run.data)
        if texts is not None and len(texts) != len(classes):
            expected = f"({len(classes)}, dim), a row per class"
            raise UserError(f"Expected text_features of shape {expected}, got {texts.shape}.")
        if features is not None and labels is not None and len(features) != len(labels):
            raise UserError(
                f"Expected y{suffix} of shape ({len(features)},), a label per image, got {labels.shape}."
            )
        if texts is not None and prompts != method.prompts(method.Settings(), run.data):
            raise UserError(f"{title} takes text_features in place of its prompts; leave one of them out.")
        if not (method.needs_backbone or prompts):
            return
        if backbone is None and texts is None:
            raise UserError(f"{title} compares images with texts; pass a backbone, or text_features to fit.")
        dim, name = backbone.embed_dim if texts is None else texts.shape[1], "text features"
        if backbone is not None and "pre" in method.kinds:
            dim, name = backbone.image_projection.before_dim, "the input of the image tower's projection"
        if features is not None and features.shape[-1] != dim:
            expected = f"(images, {dim}), as wide as {name}"
            raise UserError(f"Expected X of shape {expected}, got (images, {features.shape[-1]}).")
        if features is not None and not features.any(axis=-1).all():
            raise UserError(NO_DIRECTION.format(f"X{suffix}"))

    def _read_validation(self, run: RunSpec, X: Any, y: Any, backbone: Any) -> Labelled:
        features, labels = self._read_features(X, None, reset=False), self._label_indices(y, "y_val")
        self._check_shapes(run, features, labels, backbone, "_val")
        return features[:, 0], labels

    def __sklearn_clone__(self) -> MethodClassifier:
        return type(self)(**self.get_params(deep=False))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if hasattr(self.backbone, "digest"):
            state |= {"backbone": self.backbone.spec, "_backbone_digest": self.backbone.digest}
        return state


class CoOpClassifier(MethodClassifier, method="coop"):
    """CoOp: context vectors learned through the frozen text tower. Parameters: those of `CoOpSettings`."""


class KgCoOp(MethodClassifier, method="kgcoop"):
    """KgCoOp: CoOp, held near a hand-written prompt. Parameters: those of `KgCoOpSettings`."""


class ProGrad(MethodClassifier, method="prograd"):
    """ProGrad: CoOp, never against a hand-written prompt's gradient. Parameters: those of `ProGradSettings`."""


class TCP(MethodClassifier, method="tcp"):
    """TCP: tokens made from each class's hand-written text feature. Parameters: those of `TCPSettings`."""


class CoCoOp(MethodClassifier, method="cocoop"):
    """CoCoOp: context vectors shifted for each image. Parameters: those of `CoCoOpSettings`. It has no ``coef_``."""


class LinearProbe(MethodClassifier, method="linear_probe"):
    """Logistic regression on image features, with C chosen on validation images. It needs no backbone."""


class ZeroShot(MethodClassifier, method="zero_shot"):
    """Zero-shot CLIP: cosine similarity to a hand-written prompt per class, or to given text features."""


class PromptEnsemble(MethodClassifier, method="ensemble"):
    """Zero-shot CLIP with the text features of several prompts per class, averaged."""


class TextTransform(MethodClassifier, method="text_transform"):
    """A linear layer learned on the text features of hand-written prompts (paper, Table 5)."""


class TextBias(MethodClassifier, method="text_bias"):
    """A bias learned on the text features of hand-written prompts (paper, Table 5)."""


class CrossModalLinearProbe(MethodClassifier, method="cross_modal"):
    """A linear classifier trained on images and texts. Parameters: those of `CrossModalSettings`."""


class GDA(MethodClassifier, method="gda"):
    """Gaussian discriminant analysis beside zero-shot CLIP. Parameters: those of `GDASettings`."""


class ProKeR(MethodClassifier, method="proker"):
    """Kernel ridge regression from the zero-shot classifier. Parameters: those of `ProKeRSettings`."""


class TipAdapter(MethodClassifier, method="tip_adapter"):
    """Tip-Adapter: zero-shot CLIP and a cache of training features. Parameters: those of `TipSettings`."""


class TipAdapterF(MethodClassifier, method="tip_adapter_f"):
    """Tip-Adapter-F: Tip-Adapter with trained keys. Parameters: those of `TipFSettings`."""


class TaskRes(MethodClassifier, method="task_res"):
    """TaskRes: a residual learned on each class's text feature. Parameters: those of `TaskResSettings`."""


class CLIPAdapter(MethodClassifier, method="clip_adapter"):
    """CLIP-Adapter: image features adapted by an MLP. Parameters: those of `CLIPAdapterSettings`."""


class LPPlusPlus(MethodClassifier, method="lp_plus_plus"):
    """LP++: a linear probe with text logits blended in. Parameters: those of `LPPlusPlusSettings`."""


class ZeroShotLinearProbe(MethodClassifier, method="zs_lp"):
    """A linear probe that starts at zero-shot CLIP. Parameters: those of `ZeroShotLinearProbeSettings`."""


class CLAP(MethodClassifier, method="clap"):
    """CLAP: the same, held near its start class by class. Parameters: those of `CLAPSettings`."""


class ProLIP(MethodClassifier, method="prolip"):
    """ProLIP: the image tower's projection, trained near its start. Parameters: those of `ProLIPSettings`.

    X are images, or features before the backbone's projection. Without a backbone, X are as wide as ``text_features``,
    and a square map that starts at the identity is trained in its place.
    """


def _encode_images(backbone: Backbone, images: Sequence[Any], before: bool) -> np.ndarray:
    """Return raw features float32 (images, dim) of images; with ``before``, those before the tower's projection."""
    from fastcoop.features.images import UnreadableImage, encode_pictures

    found = []
    for image, features in zip(images, encode_pictures(backbone, images, before=before), strict=True):
        if isinstance(features, UnreadableImage):
            is_missing = isinstance(image, str | os.PathLike) and not Path(image).exists()
            kind = MissingFile if is_missing else UserError
            raise kind(f"The image {image} cannot be read: {features}.")
        found.append(features)
    return np.stack(found)


def _are_images(X: Any) -> bool:
    listed = isinstance(X, list | tuple) or (isinstance(X, np.ndarray) and X.ndim == 1)
    return listed and len(X) > 0 and (isinstance(X[0], str | os.PathLike) or hasattr(X[0], "convert"))


def _as_array(values: Any) -> Any:
    """Return a tensor as an array, of float32 for bfloat16, which NumPy lacks, an iterator as a list, and anything else
    as it is."""
    if isinstance(values, Iterator):
        return list(values)
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()


def _read_names(class_names: Any) -> list[str]:
    """Return class names in their order. Numbers are refused, which could be meant as values of y, and so are sets."""
    listed = isinstance(class_names, Iterable) and not isinstance(class_names, str | Set | Mapping)
    names = list(class_names) if listed else []
    if not listed or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(
            f"Expected class_names to be a list of text, got {shortened(class_names)}; name each class, in order."
        )
    return names


def _read_texts(text_features: Any) -> np.ndarray:
    """Return text features float32 (classes, dim), each of a length that can be scaled to 1."""
    try:
        with np.errstate(over="ignore"):
            texts = np.asarray(_as_array(text_features), np.float32, order="C")
    except (TypeError, ValueError):
        raise UserError("Expected text_features to be numbers of shape (classes, dim).") from None
    if texts.ndim != 2:
        raise UserError(f"Expected text_features of shape (classes, dim), got {texts.shape}.")
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(texts, axis=1)
    if wrong := np.flatnonzero(~((lengths > 0) & (lengths < np.inf))).tolist():
        raise UserError(
            f"Expected text_features of finite numbers and no row of zeros, got a length of {lengths[wrong[0]]:g} in "
            f"row {wrong[0]}."
        )
    return texts


def _hold_out(data: _ArrayData, instead: str) -> None:
    """Make every fifth training image of each class a validation image. ``instead``: what to do without any."""
    (features, labels), every = data.images, HELD_OUT_EVERY
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    held = [row[every - 1 :: every] if len(row) >= every else row[1:][-1:] for row in rows]
    out = np.concatenate(held)
    if not len(out):
        raise UserError(
            f"No class has an image to hold out for validation; pass X_val and y_val to fit, or {instead}."
        )
    data.val = features[out, 0], labels[out]
    data.images = np.delete(features, out, axis=0), np.delete(labels, out)


@dataclass(eq=False)
class _ArrayData(Data):
    """Arrays in place of a dataset and its feature store. Attributes: training and validation images."""

    images: Labelled = NO_IMAGES
    val: Labelled = NO_IMAGES[0][:, 0], NO_IMAGES[1]

    def _stored(self, subset: FewShot, kind: str) -> Labelled:
        return self.images

    def validation(self, subset: FewShot, kind: str = "coop") -> Labelled:
        return self.val

    def split(self, name: str, kind: str = "coop") -> Labelled:
        return self.images[0][:, 0], self.images[1]
