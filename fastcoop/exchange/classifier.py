"""A finished classifier in one file, with all that a CLIP model needs to classify images; and its predictions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fastcoop.backbones import Backbone, Preprocess, backbone_from_spec
from fastcoop.checks import several
from fastcoop.datasets.files import Tree
from fastcoop.datasets.notes import notes_on_unknown_endings
from fastcoop.errors import MissingFile, UserError, writing
from fastcoop.features.images import RECIPES, UnreadableImage, encode_pictures
from fastcoop.methods import unit
from fastcoop.results.parameters import write_arrays

FORMAT = {"format": "fastcoop classifier"}
VERSIONS = ("1", "2")  # 2: with a bias

log = logging.getLogger("fastcoop")


def load_backbone_of(made: Any, owner: str, spec: str | None = None, device: str = "auto") -> Backbone:
    """Load the backbone that something was made with.

    Args:
        made: has its name and digest, as ``backbone`` and ``backbone_digest``.
        owner: what was made, for messages.
        spec: a tag, a folder or a weights file; None: the backbone of the recorded name.
        device: of the towers; "auto": a GPU if there is one.

    Raises:
        UserError: there is no such backbone, or its weights differ.
    """
    try:
        backbone = backbone_from_spec(made.backbone if spec is None else spec, device=device)
    except UserError as error:
        if spec is not None:
            raise
        raise UserError(
            f"The backbone {made.backbone}, which {owner} was made with, is not found by its name alone; pass its "
            f"folder or weights with --backbone. ({error})"
        ) from None
    check_backbone(made, owner, backbone)
    return backbone


def check_backbone(made: Any, owner: str, backbone: Backbone) -> None:
    """Raise UserError for another backbone than that of `load_backbone_of`."""
    if backbone.digest != made.backbone_digest:
        raise UserError(
            f"The backbone {backbone.name} ({backbone.digest[:12]}) is not {made.backbone} "
            f"({made.backbone_digest[:12]}), which {owner} was made with; name that backbone with --backbone."
        )


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear classifier of image features of length 1, such as by cosine similarity to class features.

    Attributes:
        class_names: in label order.
        text_features: float32 (classes, dim), of length 1 where the method compares by cosine.
        logit_scale: factor of the cosine similarities, already exponentiated.
        preprocess: how images are prepared for the image tower.
        backbone, backbone_digest: the model whose image features are classified.
        origin: the run that it was made from, as text by name: key, dataset, settings.
        recipe: "current", or "official-2021", whose test-time crop squashes images to ``preprocess.size``, enlarges
            them by an eighth and crops the center.
        bias: float32 (classes,), added to the scaled products; None for none.
    """

    class_names: tuple[str, ...]
    text_features: np.ndarray
    logit_scale: float
    preprocess: Preprocess
    backbone: str
    backbone_digest: str
    origin: dict[str, str]
    recipe: str = "current"
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.text_features).all() or not np.isfinite(self.logit_scale):
            raise UserError(
                "The classifier's text features or its scale are not finite: the run diverged; choose another run."
            )

    def load_backbone(self, spec: str | None = None, device: str = "auto") -> Backbone:
        """Load the backbone of the classifier, by its recorded name or else ``spec``, as `export_run` takes it."""
        return load_backbone_of(self, "the classifier", spec, device)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return class probabilities.

        Args:
            features: image features (images, dim), of any length.

        Returns:
            float32 (images, classes); NaN for features that are zero or not finite.
        """
        logits = self.logit_scale * unit(features.astype(np.float32)) @ self.text_features.T
        if self.bias is not None:
            logits = logits + self.bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def save(self, path: str | Path) -> None:
        """Write ``text_features``, ``logit_scale`` and ``bias`` to a safetensors file, the rest as text in its header.

        Raises:
            UserError: the file cannot be written.
        """
        arrays = {"text_features": self.text_features, "logit_scale": np.array(self.logit_scale)}
        if self.bias is not None:
            arrays["bias"] = self.bias
        header = FORMAT | {
            "format_version": VERSIONS[self.bias is not None],
            "class_names": json.dumps(list(self.class_names)),
            "preprocess": json.dumps(self.preprocess.facts()),
            "backbone": self.backbone,
            "backbone_digest": self.backbone_digest,
            "origin": json.dumps(self.origin),
            "recipe": self.recipe,
        }
        with writing(Path(path)):
            write_arrays(Path(path), {name: a.astype(np.float32) for name, a in arrays.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or something else.
        """
        if not Path(path).is_file():
            raise MissingFile(f"There is no classifier {path}; make one with `fastcoop export`.")
        try:
            with safe_open(path, "np") as file:
                header = file.metadata() or {}
                if not FORMAT.items() <= header.items() or header.get("format_version") not in VERSIONS:
                    raise ValueError("its header names another format")
                texts, scale = file.get_tensor("text_features"), float(file.get_tensor("logit_scale"))
                bias = file.get_tensor("bias") if header["format_version"] == "2" else None
            names, preprocess = json.loads(header["class_names"]), json.loads(header["preprocess"])
            if texts.ndim != 2 or len(texts) != len(names):
                raise ValueError(f"{len(names)} class names for text features {texts.shape}")
            if bias is not None and bias.shape != (len(names),):
                raise ValueError(f"{len(names)} class names for a bias {bias.shape}")
            if (recipe := header.get("recipe", "current")) not in RECIPES:
                raise ValueError(f'there is no recipe "{recipe}"')
            preprocess |= {name: tuple(preprocess[name]) for name in ("mean", "std")}
            return cls(
                tuple(names), texts, scale, Preprocess(**preprocess), header["backbone"], header["backbone_digest"],
                json.loads(header["origin"]), recipe, bias,
            )  # fmt: skip
        except UserError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} should be a classifier of `fastcoop export --format classifier` but is not ({error})."
            ) from None


class Prediction(NamedTuple):
    """The class probabilities of an image."""

    path: Path
    probabilities: np.ndarray | None  # float32 (classes,), in label order; None where there are none
    problem: str | None = None  # why there are none: the file is unreadable, or its features are not finite


def image_files(places: Sequence[str | Path]) -> list[Path]:
    """Return the files given, and all images in the folders given and below them, sorted within each.

    Pictures that are left out because of the endings of their names are counted in a warning.

    Raises:
        UserError: a place does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            tree = Tree(place)
            found += sorted(place / path for path in tree.paths("images"))
            for note in notes_on_unknown_endings(str(place), tree):
                log.warning(note)
        elif place.is_file():
            found.append(place)
        else:
            raise MissingFile(f"There is no file or folder {place}.")
    if not found:
        raise UserError(f"There are no images in {' or '.join(map(str, places))}.")
    return found


def predict(classifier: Classifier, backbone: Backbone, images: Sequence[str | Path]) -> Iterator[Prediction]:
    """Classify image files, prepared by the test-time crop of the classifier's recipe.

    Args:
        classifier: the classifier.
        backbone: the backbone that it was made for.
        images: paths of image files.

    Yields:
        One prediction per image, in order; for an unreadable image it holds the reason.

    Raises:
        UserError: the backbone is not the classifier's.
    """
    check_backbone(classifier, "the classifier", backbone)
    paths = [Path(image) for image in several(images)]
    for path, found in zip(paths, encode_pictures(backbone, paths, classifier.recipe), strict=True):
        if isinstance(found, UnreadableImage):
            yield Prediction(path, None, str(found))
        elif np.isfinite(row := classifier.probabilities(found[None])[0]).all():
            yield Prediction(path, row)
        else:
            yield Prediction(path, None, f"{backbone.name} gives it features that are not finite")
