"""The estimators: the numbers of a sweep's runs, and what scikit-learn expects of a classifier."""

from __future__ import annotations

import inspect
import pickle
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastcoop as fc
from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.errors import MissingFile, UserError
from fastcoop.methods import METHODS, Data, LinearClassifier
from fastcoop.methods.estimators import MethodClassifier
from fastcoop.methods.text import prompt_features
from tests.advice import follows
from tests.methods.conftest import DIM, job, run
from tests.small_world import COLOURS, write_backbone, write_dataset

ESTIMATORS = {
    "zero_shot": fc.ZeroShot,
    "ensemble": fc.PromptEnsemble,
    "linear_probe": fc.LinearProbe,
    "text_transform": fc.TextTransform,
    "text_bias": fc.TextBias,
    "coop": fc.CoOpClassifier,
    "gda": fc.GDA,
    "proker": fc.ProKeR,
    "cross_modal": fc.CrossModalLinearProbe,
    "tip_adapter": fc.TipAdapter,
    "tip_adapter_f": fc.TipAdapterF,
    "kgcoop": fc.KgCoOp,
    "prograd": fc.ProGrad,
    "tcp": fc.TCP,
    "cocoop": fc.CoCoOp,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "text_transform": {"epochs": 3},
    "text_bias": {"epochs": 3, "learning_rate": 0.1},
    "coop": {"context_length": 2, "epochs": 4, "learning_rate": 0.3, "select": "best_val"},
    "zero_shot": {"prompt": "a drawing of {}."},
    "tip_adapter": {"selection": "fixed"},
    "proker": {"selection": "fixed"},
    "cross_modal": {"iterations": 3, "learning_rate": 0.01, "batch_size": 4},
    "tip_adapter_f": {"epochs": 2, "alpha": 2.0, "beta": 3.0},
    "kgcoop": {"epochs": 4, "learning_rate": 0.3},
    "prograd": {"epochs": 4, "learning_rate": 0.3, "context_length": 5},
    "tcp": {"epochs": 4, "layer": 1, "lmbda": 2.0},
    "cocoop": {"epochs": 3, "learning_rate": 0.1, "batch_size": 3},
}
NAMES = ("cat", "sea lion", "old dog")
GIVEN: dict[str, Any] = {"text_features": np.eye(3, DIM)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_gives_a_sweeps_numbers_bit_for_bit(backbone: Backbone, data: Data, name: str) -> None:
    settings = SETTINGS.get(name, {})
    one = job(data, name, shots=4, seed=2, **settings)
    (outcome,) = run(backbone, name, [one])
    expected = METHODS[name].classifier(
        backbone, replace(one, contexts=outcome.contexts, weights=outcome.weights), data
    )
    images = data.unit_test if expected.unit_length else data.test[0]

    seed = {"seed": 2} if METHODS[name].learns else {}
    estimator = ESTIMATORS[name](backbone, **settings, **seed)
    if METHODS[name].learns:
        subset = data.subset(4, 2)
        (X, y), (X_val, y_val) = data.train(subset, METHODS[name].kinds[0]), data.validation(subset)
        estimator.fit(torch.from_numpy(X), y, class_names=NAMES, X_val=X_val, y_val=y_val)
        for learned, attribute in ((outcome.contexts, "contexts_"), (outcome.losses, "losses_")):
            if learned is not None:
                assert (getattr(estimator, attribute) == learned).all()
    else:
        estimator.fit(None, None, class_names=NAMES)
    X_test, y_test = data.test
    assert (estimator.decision_function(X_test) == expected.logits(images)).all()
    assert (estimator.predict(X_test) == outcome.scores["animals"].predictions).all()
    assert estimator.score(X_test, y_test) == pytest.approx(outcome.scores["animals"].accuracy / 100)
    confidence = estimator.predict_proba(X_test).max(1).astype(np.float16)
    np.testing.assert_allclose(confidence, outcome.scores["animals"].confidence, atol=1e-3)
    if not isinstance(expected, LinearClassifier):
        assert not hasattr(estimator, "coef_")
        return
    assert estimator.coef_.shape == (3, DIM)
    features = X_test / np.linalg.norm(X_test, axis=1, keepdims=True) if expected.unit_length else X_test
    linear = estimator.logit_scale_ * features @ estimator.coef_.T + estimator.intercept_
    np.testing.assert_allclose(estimator.decision_function(X_test), linear, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if not METHODS[name].needs_backbone])
def test_text_features_stand_for_a_backbone_to_rounding(backbone: Backbone, data: Data, name: str) -> None:
    texts = prompt_features(backbone, NAMES, "a photo of a {}.")
    (X, y), (X_val, y_val) = data.train(data.subset(4, 1)), data.validation(data.subset(4, 1))
    settings = SETTINGS.get(name, {}) if METHODS[name].learns else {}
    fits = []
    for given, more in (
        (backbone, {}),
        (None, {"text_features": 3 * texts, "logit_scale": backbone.logit_scale}),
    ):
        fits.append(
            ESTIMATORS[name](given, **settings).fit(X, y, class_names=NAMES, X_val=X_val, y_val=y_val, **more)
        )
    if name != "ensemble":  # its other prompts give other features
        one, two = (fitted.decision_function(data.test[0]) for fitted in fits)
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)
    assert fits[1].classes_.tolist() == [0, 1, 2]


def test_zero_shot_of_given_text_features() -> None:
    W = np.random.default_rng(0).normal(size=(4, 8))
    zero_shot = fc.ZeroShot().fit(None, None, text_features=torch.from_numpy(W))
    X = np.random.default_rng(1).normal(size=(5, 8))
    expected = 100 * X @ W.T / np.linalg.norm(W, axis=1) / np.linalg.norm(X, axis=1, keepdims=True)
    np.testing.assert_allclose(zero_shot.decision_function(X), expected, rtol=1e-4, atol=1e-4)
    assert (zero_shot.predict(X) == expected.argmax(1)).all()
    two = fc.ZeroShot().fit(None, None, text_features=W[:2])
    np.testing.assert_allclose(
        two.decision_function(X), expected[:, 1] - expected[:, 0], rtol=1e-3, atol=1e-3
    )


def test_names_in_y_are_classes(backbone: Backbone, data: Data) -> None:
    X, y = data.train(data.subset(4, 1))
    names = np.array(NAMES)
    by_name = fc.CoOpClassifier(backbone, epochs=2, context_length=2).fit(X, names[y])
    assert by_name.class_names_ == tuple(sorted(NAMES))
    assert set(by_name.predict(data.test[0])) <= set(NAMES)
    in_order = fc.CoOpClassifier(backbone, epochs=2, context_length=2).fit(X, names[y], class_names=NAMES)
    indices = fc.CoOpClassifier(backbone, epochs=2, context_length=2).fit(X, y, class_names=NAMES)
    assert in_order.classes_.tolist() == list(NAMES)
    assert (in_order.coef_ == indices.coef_).all()
    assert (names[indices.predict(data.test[0])] == in_order.predict(data.test[0])).all()


def test_images_are_encoded_by_the_backbone(backbone: Backbone, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "colours", classes=("dark red", "green"), train=3, val=0, test=2)
    paths = sorted((folder / "train").rglob("*.png"))
    names = [path.parent.name for path in paths]
    test = sorted(map(str, (folder / "test").rglob("*.png")))
    for X, X_test in (
        (paths, test),
        ([Image.open(path) for path in paths], [Image.open(path) for path in test]),
    ):
        probe = fc.LinearProbe(backbone).fit(X, names)
        assert probe.predict(X_test).tolist() == ["dark red"] * 2 + ["green"] * 2
    with pytest.raises(UserError, match="needs a backbone to encode images"):
        fc.LinearProbe().fit(paths, names)
    with pytest.raises(MissingFile, match="no such file"):
        probe.predict([tmp_path / "absent.png"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        probe.predict([tmp_path / "broken.png"])


@follows("than those found by that name ({}); pass the backbone by set_params(backbone=...)")
def test_a_pickle_has_no_weights_and_finds_its_backbone(data: Data, tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "tiny")
    backbone = backbone_from_spec(str(folder))
    X, y = data.train(data.subset(4, 1))
    fitted = fc.CoOpClassifier(backbone, epochs=1, context_length=2).fit(X, y, class_names=NAMES)
    pickled = pickle.dumps(fitted)
    assert len(pickled) < 20_000
    again = pickle.loads(pickled)
    assert (again.predict(data.test[0]) == fitted.predict(data.test[0])).all()
    assert again.backbone == str(folder.resolve())
    image = Image.new("RGB", (16, 16), COLOURS["green"])
    assert (again.predict([image]) == fitted.predict([image])).all()
    folder = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="There is no backbone"):
        again.predict([image])
    again.backbone = "demo-vit"
    with pytest.raises(UserError, match="pass the backbone by set_params"):
        again.predict([image])
    for given in (backbone, str(folder)):
        assert (again.set_params(backbone=given).predict([image]) == fitted.predict([image])).all()


def test_clones_share_the_backbone_and_models_are_selected(backbone: Backbone, data: Data) -> None:
    X, y = data.train(data.subset("all", 1))
    estimator = fc.CoOpClassifier(backbone, epochs=2, context_length=2)
    assert clone(estimator).backbone is backbone
    assert clone(estimator).get_params() == estimator.get_params()
    probe = make_pipeline(StandardScaler(), fc.LinearProbe(search_steps=2))
    search = GridSearchCV(probe, {"linearprobe__iterations": np.array([5, 50])}, cv=2)
    assert search.fit(X[:, 0], y).score(*data.test) > 0.6
    grid = {"learning_rate": [0.002, 0.3], "class_specific": [True, False]}
    names = np.array(NAMES)[y]
    assert GridSearchCV(estimator, grid, cv=2).fit(X[:, 0], names).best_score_ > 0.2


def test_defaults_are_the_methods_settings() -> None:
    for name, estimator in ESTIMATORS.items():
        defaults = {key: value.default for key, value in inspect.signature(estimator).parameters.items()}
        assert defaults.pop("backbone") is None
        assert defaults.pop("seed", 1) == 1
        assert defaults == METHODS[name].Settings().model_dump()
        assert estimator().get_params() == {
            **inspect.signature(estimator).bind().kwargs,
            **estimator().get_params(),
        }


@follows(
    "pass a backbone in place of text_features",
    "needs a backbone; pass it or its name",
    "pass a backbone, or text_features to fit",
    "takes text_features in place of its prompts; leave one of them out",
    "got one path; pass [{}]",
    "got {}; pass such a list",
    "logit_scale belongs to text_features; leave it out, or pass both",
    "X_val and y_val belong together; pass both, or neither",
    "learns from images; pass their features, or paths, as X",
    "needs a backbone to encode images; pass it, or pass features",
    "needs the names of the classes, in order; pass class_names to fit",
    "to be a list of text, got {}; name each class, in order",
    "diverged; pass a smaller learning_rate",
    "have no direction; remove these images",
    "to hold out for validation; pass X_val and y_val to fit, or {}",
)
def test_what_cannot_be_used_is_one_sentence_that_helps(
    backbone: Backbone, data: Data, tmp_path: Path
) -> None:
    X, y = data.train(data.subset(4, 1))
    texts, names = np.eye(3, DIM), np.array(NAMES)[y]
    coop, bias = fc.CoOpClassifier(backbone, epochs=1, context_length=2), fc.TextBias(epochs=2)
    image = [Image.new("RGB", (16, 16))] * 6
    path = str(tmp_path / "image.png")
    image[0].save(path)
    fitted = fc.ZeroShot(backbone).fit(None, class_names=NAMES)
    for wrong, message, right in (
        (
            lambda: clone(coop).set_params(backbone=None).fit(X, names),
            "pass it or its name",
            lambda: coop.fit(X, names),
        ),
        (
            lambda: coop.fit(X, names, text_features=texts),
            "pass a backbone in place",
            lambda: coop.fit(X, names),
        ),
        (
            lambda: fc.ZeroShot(prompt="a {}").fit(None, text_features=texts),
            "leave one of them out",
            lambda: fc.ZeroShot().fit(None, text_features=texts),
        ),
        (lambda: fitted.predict(path), "got one path", lambda: fitted.predict([path])),
        (lambda: fitted.predict(image[0]), "got one image", lambda: fitted.predict(image)),
        (
            lambda: fitted.predict(np.zeros((6, 3, 16, 16))),
            r"got pixels \(6, 3, 16, 16\)",
            lambda: fitted.predict(image),
        ),
        (lambda: bias.fit(X, names), "text_features", lambda: bias.fit(X, y, text_features=texts)),
        (
            lambda: bias.fit(None, y, text_features=texts),
            "learns from images",
            lambda: bias.fit(X, y, text_features=texts),
        ),
        (
            lambda: bias.fit(X, y * 10, text_features=texts),
            r"Expected y to hold .*, got [12]0\. Valid: 0, 1, 2",
            lambda: bias.fit(X, y, text_features=texts),
        ),
        (
            lambda: bias.fit(X, y, X_val=X, y_val=y - 1, text_features=texts),
            r"Expected y_val to hold .*, got -1\. Valid: 0, 1, 2",
            lambda: bias.fit(X, y, X_val=X, y_val=y, text_features=texts),
        ),
        (
            lambda: bias.fit(X, y, logit_scale=9.0),
            "pass both",
            lambda: bias.fit(X, y, logit_scale=9.0, text_features=texts),
        ),
        (
            lambda: bias.fit(X, y, X_val=X, text_features=texts),
            "pass both, or neither",
            lambda: bias.fit(X, y, X_val=X, y_val=y, text_features=texts),
        ),
        (
            lambda: fc.LinearProbe().fit(image, list("ababab")),
            "encode images",
            lambda: fc.LinearProbe(backbone).fit(image, list("ababab")),
        ),
        (
            lambda: fc.ZeroShot(backbone.model).fit(None, class_names=NAMES),
            "Expected backbone to be what load_backbone returns, or its name",
            lambda: fc.ZeroShot(backbone).fit(None, class_names=NAMES),
        ),
        (
            lambda: fc.ZeroShot(backbone).fit(None, class_names=["cat", ""]),
            "list of text, got .'cat', ''.; name each class, in order",
            lambda: fc.ZeroShot(backbone).fit(None, class_names=["cat", "dog"]),
        ),
        (lambda: coop.fit(X, y), "pass class_names", lambda: coop.fit(X, y, class_names=NAMES)),
        (
            lambda: fc.TextBias(learning_rate=1e38, epochs=9).fit(X, y, text_features=texts),
            "smaller learning_rate",
            lambda: fc.TextBias(learning_rate=0.1, epochs=9).fit(X, y, text_features=texts),
        ),
        (
            lambda: fc.ZeroShot().fit(None, text_features=texts).predict(np.zeros((1, DIM))),
            "no direction",
            lambda: fc.ZeroShot().fit(None, text_features=texts).predict(np.ones((1, DIM))),
        ),
        (
            lambda: fc.GDA().fit(np.eye(2, DIM), [0, 1], text_features=np.eye(2, DIM)),
            "X_val and y_val to fit, or set selection of gda to fixed",
            lambda: fc.GDA(selection="fixed").fit(np.eye(2, DIM), [0, 1], text_features=np.eye(2, DIM)),
        ),
        (
            lambda: fc.LinearProbe().fit(np.eye(2), [0, 1]),
            "X_val and y_val",
            lambda: fc.LinearProbe().fit(np.eye(2), [0, 1], X_val=np.eye(2), y_val=[0, 1]),
        ),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
        right()


def test_images_of_a_class_are_held_out_counted_and_read_at_the_test_time_crop(data: Data) -> None:
    X, y = data.train(data.subset("all", 1))
    X, y = np.delete(X, 5, axis=0), np.delete(y, 5)  # classes of 5, 6 and 6 images
    out = np.array([4, 9, 15])  # the fifth of each
    rest = np.setdiff1d(np.arange(len(y)), out)
    alone = fc.LinearProbe().fit(X, y)
    X_val = X[out] * np.array([1, -1, -1, -1])[:, None]  # other views would be wrong
    given = fc.LinearProbe().fit(X[rest], y[rest], X_val=X_val, y_val=y[out])
    assert alone.chosen_ == given.chosen_
    assert (alone.coef_ == given.coef_).all()
    epochs = {4: 2, 5: 3}  # by the images that are left of the class with the most
    assert len(fc.TextBias(epochs=epochs).fit(X, y, **GIVEN).losses_) == 3
    with pytest.raises(UserError, match="X has features of length 0"):
        fc.TextBias(epochs=1).fit(np.where(np.arange(len(y))[:, None, None] == 3, 0, X), y, **GIVEN)
    named = fc.TextBias(epochs=1).fit(X, y, class_names=["crane", "crane", "dog"], **GIVEN)
    assert named.classes_.tolist() == [0, 1, 2]
    probabilities = named.predict_proba(X[:, 0])
    assert (probabilities.dtype, np.abs(probabilities.sum(1) - 1).max() < 1e-12) == (np.float64, True)
    two = fc.LinearProbe().fit(X[y < 2], y[y < 2], class_names=NAMES)
    assert not two.coef_[2].any()
    assert np.isfinite(two.intercept_).tolist() == [True, True, False]


def test_iterators_are_read_as_lists_are(data: Data) -> None:
    features, labels = data.train(data.subset(4, 1))
    X, y = features[:, 0].tolist(), labels.tolist()
    val, texts = {"X_val": X, "y_val": y}, np.eye(3, DIM)
    listed = fc.CLAP(epochs=2).fit(X, y, class_names=NAMES, text_features=texts, **val)
    iterated = fc.CLAP(epochs=2).fit(
        iter(X), iter(y), class_names=iter(NAMES), text_features=iter(texts), X_val=iter(X), y_val=map(int, y)
    )
    assert iterated.class_names_ == NAMES
    assert (iterated.coef_ == listed.coef_).all()
    assert (iterated.predict(row for row in X) == listed.predict(X)).all()


def test_classes_of_one_prompt_are_told(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    names = ["cat", "dog", "Cat"]
    fc.ZeroShot().fit(None, class_names=names, text_features=np.eye(3, DIM))
    assert not caplog.text
    fc.ZeroShot(backbone).fit(None, class_names=names)
    assert "The classes cat, Cat of ZeroShot have the same prompt" in caplog.text
    assert "name them differently in class_names" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"text_features": np.eye(2, DIM), "class_names": NAMES},
            r"text_features of shape \(3, dim\).*\(2, 16\)",
        ),
        ({"text_features": np.eye(3, 8)}, r"Expected X of shape \(images, 8\).* got \(images, 16\)"),
        (
            {"text_features": np.eye(3, DIM), "y": [0, 1]},
            r"y of shape \(12,\), a label per image, got \(2,\)",
        ),
        (
            {"class_names": NAMES[:2], "text_features": np.eye(2, DIM)},
            "class names or indices into class_names, got 2",
        ),
        (GIVEN | {"class_names": "cat"}, "class_names to be a list of text, got 'cat'"),
        (GIVEN | {"class_names": [1, 2, 3]}, r"class_names to be a list of text, got \[1, 2, 3\]"),
        (GIVEN | {"class_names": ["a", " ", "b"]}, r"got \['a', ' ', 'b'\]; name each class, in order"),
        (GIVEN | {"class_names": {"a", "b", "c"}}, "class_names to be a list of text, got {'a', 'b', 'c'}"),
        (GIVEN | {"class_names": 3}, "class_names to be a list of text, got 3"),
        (
            GIVEN | {"class_names": ["a", "b", "a"], "y": list("abab" * 3)},
            "y to hold indices, since two classes are called 'a'",
        ),
        ({"text_features": np.ones(DIM)}, r"text_features of shape \(classes, dim\), got \(16,\)"),
        ({"text_features": [["cat"]]}, "text_features to be numbers"),
        ({"text_features": np.diag([1.0, 0.0, 1.0])}, "no row of zeros, got a length of 0 in row 1"),
        ({"text_features": np.full((3, DIM), np.nan)}, "finite numbers.*, got a length of nan in row 0"),
        (GIVEN | {"logit_scale": 0}, "logit_scale to be a finite number above 0, got 0"),
        (GIVEN | {"X_val": np.ones((2, DIM)), "y_val": [0]}, r"y_val of shape \(2,\), a label per image"),
        (GIVEN | {"X_val": np.zeros((2, DIM)), "y_val": [0, 1]}, "X_val has features of length 0"),
    ],
)
def test_shapes_and_numbers_are_named_as_expected_and_got(
    data: Data, arguments: dict[str, Any], message: str
) -> None:
    X, y = data.train(data.subset(4, 1))
    with pytest.raises(ValueError, match=message):
        fc.TextBias(epochs=1).fit(**({"X": X, "y": y} | arguments))


def test_features_of_another_width_than_the_backbones_are_refused(backbone: Backbone, data: Data) -> None:
    X, y = data.train(data.subset(4, 1))
    with pytest.raises(UserError, match=r"Expected X of shape \(images, 16\), as wide as text features, got"):
        fc.CoOpClassifier(backbone, epochs=1).fit(X[:, :, :8], y, class_names=NAMES)


@pytest.mark.parametrize("seed", [-1, 1.5, "a"])
def test_the_seed_is_a_whole_number(data: Data, seed: Any) -> None:
    X, y = data.train(data.subset(4, 1))
    with pytest.raises(UserError, match="Expected the seed to be a whole number"):
        fc.GDA(seed=seed).fit(X, y, **GIVEN)


@pytest.mark.filterwarnings("error")
def test_any_array_of_numbers_is_read(data: Data) -> None:
    X, y = data.train(data.subset(4, 1))
    X = np.round(X * 2)  # the same in each type
    expected = fc.TipAdapter(selection="fixed").fit(X[:, 0], y, **GIVEN).predict_proba(X[:, 0])
    frozen = X[:, 0].copy()
    frozen.flags.writeable = False
    lists = X[:, 0].tolist()
    mirrored = X[::-1, 0].copy()[::-1]
    for given in (frozen, lists, mirrored, X[:, 0].astype(np.float16), torch.from_numpy(X[:, 0]).bfloat16()):
        fitted = fc.TipAdapter(selection="fixed").fit(given, y, **GIVEN)
        np.testing.assert_array_equal(fitted.predict_proba(given), expected)
    texts = {"text_features": GIVEN["text_features"][::-1].copy()[::-1]}
    fitted = fc.TipAdapter(selection="fixed").fit(lists, y, **GIVEN | texts)
    np.testing.assert_array_equal(fitted.predict_proba(lists), expected)


def test_settings_are_checked_as_a_grids(data: Data) -> None:
    X, y = data.train(data.subset(4, 1))
    with pytest.raises(UserError, match='The setting "iterations" of method linear_probe cannot be 0'):
        fc.LinearProbe(iterations=0).fit(X, y)


class Padded:
    """Features of any width, padded to the tiny backbone's, and labels as class names: scikit-learn's checks give what
    they like."""

    width = 16

    def fit(self, X: Any, y: Any = None) -> Any:
        if y is None:
            return super().fit(X, y)  # type: ignore[misc]
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import assert_all_finite, column_or_1d

        y = column_or_1d(y, warn=True)
        assert_all_finite(y)
        check_classification_targets(y)
        values, labels = np.unique(y, return_inverse=True)
        texts = np.random.default_rng(0).normal(size=(len(values), self.width))
        names = {"text_features": texts} if self.backbone is None else {}  # type: ignore[attr-defined]
        super().fit(X, labels, class_names=[f"class {value}" for value in values], **names)  # type: ignore[misc]
        self.classes_ = values
        return self

    def _read_features(self, X: Any, backbone: Any, reset: bool) -> np.ndarray:
        features = super()._read_features(X, backbone, reset)  # type: ignore[misc]
        self.width_ = features.shape[-1]
        padded = np.zeros((*features.shape[:2], self.width), np.float32)
        padded[..., : self.width_] = features[..., : self.width]
        return padded

    def _keep(self, classifier: Any, outcome: Any) -> None:
        super()._keep(classifier, outcome)  # type: ignore[misc]
        self.n_features_in_ = self.width_


@cache
def demo_backbone() -> Backbone:
    return backbone_from_spec("demo-vit")


class PaddedCoOp(Padded, MethodClassifier, method="coop"):
    width = 128

    def _load_backbone(self) -> Backbone:
        return demo_backbone()


@cache
def tiny_backbone() -> Backbone:
    with tempfile.TemporaryDirectory() as folder:
        return backbone_from_spec(str(write_backbone(Path(folder) / "tiny", text_layers=2)))


class PaddedTiny(Padded):
    def _load_backbone(self) -> Backbone:
        return tiny_backbone()


class PaddedKgCoOp(PaddedTiny, MethodClassifier, method="kgcoop"):
    pass


class PaddedProGrad(PaddedTiny, MethodClassifier, method="prograd"):
    pass


class PaddedTCP(PaddedTiny, MethodClassifier, method="tcp"):
    pass


class PaddedCoCoOp(PaddedTiny, MethodClassifier, method="cocoop"):
    pass


class PaddedBias(Padded, MethodClassifier, method="text_bias"):
    pass


# Of the methods on image features, which share their code: one that is trained and not linear, and one in closed form.
ON_FEATURES: dict[str, dict[str, Any]] = {
    "tip_adapter_f": {"selection": "fixed", "epochs": 1},
    "gda": {"selection": "fixed"},
}


def padded(method: str, settings: dict[str, Any]) -> MethodClassifier:
    title = f"Padded_{method}"
    made: Any = type(MethodClassifier)(
        title, (Padded, MethodClassifier), {"__module__": __name__}, method=method
    )
    globals()[title] = made  # pickles find it here
    return made(**settings)


DIRECTIONS = {
    "check_estimators_dtypes": "it has an image with features of length 0, which have no direction",
    "check_classifiers_train": "its clusters differ in length, which cosine similarity does not see",
    "check_methods_subset_invariance": "products in float32, as a sweep's, round differently in smaller batches",
    "check_methods_sample_order_invariance": "the same",
}


def failing(estimator: Any) -> dict[str, str]:
    """The checks that methods fail which compare directions of images with texts, and why."""
    return {} if isinstance(estimator, fc.LinearProbe) else DIRECTIONS


@parametrize_with_checks(
    [
        fc.LinearProbe(iterations=20, search_steps=2),
        PaddedBias(epochs=5, learning_rate=0.1),
        *(padded(method, settings) for method, settings in ON_FEATURES.items()),
        PaddedCoOp("demo-vit", epochs=1, context_length=1),
        PaddedKgCoOp("tiny", epochs=1, init="a"),
        PaddedProGrad("tiny", epochs=1, context_length=4),
        PaddedTCP("tiny", epochs=1, layer=1),
        PaddedCoCoOp("tiny", epochs=1, batch_size=300, init="a"),
    ],
    expected_failed_checks=failing,
)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_a_pandas_series_of_paths_is_a_list_of_images(backbone: Backbone, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        Image.new("RGB", (16, 16), (80 * index, 9, 9)).save(path)
    zero_shot = fc.ZeroShot(backbone).fit(None, class_names=NAMES)
    expected = zero_shot.decision_function(paths)
    assert (zero_shot.decision_function(pd.Series(paths)) == expected).all()
