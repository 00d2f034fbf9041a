"""What a classifier says of images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.checks import several
from fastcoop.datasets.files import Tree
from fastcoop.datasets.left_out import notes_on_unknown_endings
from fastcoop.errors import UserError
from fastcoop.exchange.classifier import Classifier
from fastcoop.features.images import UnreadableImage, crops, normalize, read_rgb

AT_ONCE = 32  # images

log = logging.getLogger("fastcoop")


@dataclass(frozen=True, eq=False)
class Prediction:
    """An image's probabilities, float32 (classes,) in label order; None where it cannot be read or its features are not
    finite, with the reason."""

    path: Path
    probabilities: np.ndarray | None
    problem: str | None = None


def image_files(places: Sequence[str | Path]) -> list[Path]:
    """The files given, and the images anywhere in the folders given, sorted in each. A warning counts the pictures
    there that are left out because of how their names end.

    Raises UserError for what does not exist, and where there is no image at all.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            tree = Tree(place)
            images = [
                place / folder / name for folder in tree.below() for name in tree.listing(folder).images
            ]
            found += sorted(images)
            for note in notes_on_unknown_endings(str(place), tree):
                log.warning(note)
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"There is no file or folder {place}.")
    if not found:
        raise UserError(f"There are no images in {' or '.join(map(str, places))}.")
    return found


def predict(classifier: Classifier, backbone: Backbone, images: Sequence[str | Path]) -> Iterator[Prediction]:
    """Classify image files by the test-time crop of the classifier's recipe, in order.

    Raises:
        UserError: the backbone is not the classifier's. An unreadable image is a Prediction that says so.
    """
    classifier.check(backbone)
    paths = [Path(image) for image in several(images)]
    for start in range(0, len(paths), AT_ONCE):
        yield from _batch(classifier, backbone, paths[start : start + AT_ONCE])


def _batch(classifier: Classifier, backbone: Backbone, images: Sequence[Path]) -> Iterator[Prediction]:
    pixels: list[np.ndarray] = []
    problems: dict[Path, str] = {}
    for path in images:
        try:
            pixels.append(crops(read_rgb(path), path.name, [0], classifier.preprocess, classifier.recipe, 0))
        except UnreadableImage as error:
            problems[path] = str(error)
    rows: Iterator[np.ndarray] = iter(())
    if pixels:
        batch = normalize(np.concatenate(pixels), classifier.preprocess, backbone.device)
        rows = iter(classifier.probabilities(backbone.encode_images(batch).float().cpu().numpy()))
    for path in images:
        if path in problems:
            yield Prediction(path, None, problems[path])
            continue
        probabilities = next(rows)
        if np.isfinite(probabilities).all():
            yield Prediction(path, probabilities)
        else:
            yield Prediction(path, None, f"{backbone.name} gives it features that are not finite numbers")
