"""Classify image files with a `Classifier`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.checks import several
from fastcoop.datasets.files import Tree
from fastcoop.datasets.notes import notes_on_unknown_endings
from fastcoop.errors import MissingFile, UserError
from fastcoop.exchange.classifier import Classifier
from fastcoop.features.images import UnreadableImage, crops, normalize, read_rgb

BATCH_SIZE = 32  # images

log = logging.getLogger("fastcoop")


@dataclass(frozen=True, eq=False)
class Prediction:
    """The class probabilities of an image.

    Attributes:
        path: the image file.
        probabilities: float32 (classes,), in label order; None where there are none.
        problem: why there are none: the file is unreadable, or its features are not finite.
    """

    path: Path
    probabilities: np.ndarray | None
    problem: str | None = None


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
            found += sorted(
                place / folder / name for folder in tree.below() for name in tree.listing(folder).images
            )
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
    classifier.check(backbone)
    paths = [Path(image) for image in several(images)]
    for start in range(0, len(paths), BATCH_SIZE):
        yield from _predict_batch(classifier, backbone, paths[start : start + BATCH_SIZE])


def _predict_batch(
    classifier: Classifier, backbone: Backbone, images: Sequence[Path]
) -> Iterator[Prediction]:
    pixels: list[np.ndarray] = []
    problems: dict[int, str] = {}
    for index, path in enumerate(images):
        try:
            pixels.append(crops(read_rgb(path), path.name, [0], classifier.preprocess, classifier.recipe, 0))
        except UnreadableImage as error:
            problems[index] = str(error)
    rows: Iterator[np.ndarray] = iter(())
    if pixels:
        batch = normalize(np.concatenate(pixels), classifier.preprocess, backbone.device)
        rows = iter(classifier.probabilities(backbone.encode_images(batch).float().cpu().numpy()))
    for index, path in enumerate(images):
        probabilities = None if index in problems else next(rows)
        if probabilities is not None and not np.isfinite(probabilities).all():
            probabilities, problems[index] = None, f"{backbone.name} gives it features that are not finite"
        yield Prediction(path, probabilities, problems.get(index))
