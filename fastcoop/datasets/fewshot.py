"""Few-shot subsets by the official rule: drawn, or read from the files of an earlier draw."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from fastcoop.checks import whole_number
from fastcoop.datasets.dataset import Dataset, Split, warn_once
from fastcoop.datasets.fewshot_files import read_subset
from fastcoop.datasets.files import abbreviate
from fastcoop.datasets.halves import rows_in_whole
from fastcoop.datasets.splits import by_class
from fastcoop.errors import UserError

MAX_VAL_SHOTS = 4


@dataclass(frozen=True, eq=False)
class FewShot:
    """A few-shot subset.

    Attributes:
        train: int64 indices into ``dataset.splits["train"]``, class by class.
        val: int64 indices into ``dataset.splits["val"]``, at most four per class.
    """

    train: np.ndarray
    val: np.ndarray


def few_shot(dataset: Dataset, shots: int | str, seed: int) -> FewShot:
    """Return the training and validation images for ``shots`` per class and ``seed``.

    A subset in ``dataset.fewshot_dir`` is read: the official code's ``shot_K-seed_S.pkl``, else a JSON file of the
    same content. Otherwise one stream of Python's ``random``, seeded with ``seed``, draws the training and then the
    validation set, class by class in order of first image. Nothing is written: the same arguments draw the same
    images. All images of a class with fewer are used, with a warning. Training images that are validation images too
    (ImageNet's) are not drawn. The subset of half a dataset's classes is the whole dataset's, restricted to images of
    these classes: the official base-to-new rule.

    Args:
        dataset: The dataset.
        shots: Training images per class, or "all".
        seed: Seed of the draw.

    Raises:
        UserError: The dataset has no training images, ``shots`` is neither positive nor "all", or a file of a subset
            is damaged or of another split.
    """
    if not (isinstance(shots, str) and shots == "all"):
        shots = whole_number(shots, 'shots (or "all")', 1)
    seed = whole_number(seed, "the seed")
    if dataset.whole is not None:
        return _restrict(few_shot(dataset.whole, shots, seed), dataset)
    if "train" not in dataset.splits:
        raise UserError(f"Dataset {dataset.name} has only test images; nothing can be trained on it.")
    train, val = dataset.splits["train"], dataset.splits.get("val", Split((), np.zeros(0, np.int64)))
    held_out = set(val.paths)
    free = np.array([index for index, path in enumerate(train.paths) if path not in held_out], dtype=np.int64)
    if shots == "all":
        return FewShot(free, np.arange(len(val), dtype=np.int64))
    assert isinstance(shots, int)
    _warn_about_small_classes(dataset, train.labels[free], shots)
    subset = read_subset(dataset, shots, seed)
    if "val" in subset:
        return FewShot(subset["train"], subset["val"])
    rng = random.Random(seed)
    # ImageNet's official subsets have no validation set: the one drawn here shares no image with them.
    drawn = subset["train"] if subset else free[_draw(train.labels[free], shots, rng)]
    used = {train.paths[index] for index in drawn} if subset else set()
    val_drawn = _draw(val.labels, min(shots, MAX_VAL_SHOTS), rng)
    return FewShot(drawn, np.array([i for i in val_drawn if val.paths[i] not in used], dtype=np.int64))


def _restrict(subset: FewShot, half: Dataset) -> FewShot:
    """Turn a subset of the whole dataset into indices into the splits of half its classes."""

    def restrict(split: str, drawn: np.ndarray) -> np.ndarray:
        if half.whole is None or split not in half.whole.splits:
            return np.zeros(0, np.int64)
        rows = rows_in_whole(half, split)
        return np.searchsorted(rows, drawn[np.isin(drawn, rows)]).astype(np.int64)

    return FewShot(restrict("train", subset.train), restrict("val", subset.val))


def _draw(labels: np.ndarray, shots: int, rng: random.Random) -> np.ndarray:
    """Draw the positions of ``shots`` labels of every class, or of all where there are fewer."""
    drawn: list[int] = []
    for members in by_class(enumerate(labels.tolist())):
        positions = [position for position, _ in members]
        drawn += rng.sample(positions, shots) if len(positions) >= shots else positions
    return np.array(drawn, dtype=np.int64)


def _warn_about_small_classes(dataset: Dataset, labels: np.ndarray, shots: int) -> None:
    counts = np.bincount(labels, minlength=len(dataset.class_names))
    small = [f"{dataset.class_names[label]} ({counts[label]})" for label in np.flatnonzero(counts < shots)]
    if small:
        warn_once(
            f"{dataset.name} has classes with fewer than {shots} training images, all used: {abbreviate(small, 5)}."
        )
