"""Few-shot subsets by the official rule: drawn, or read from the files that keep an earlier draw."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from fastcoop.datasets.dataset import Dataset, Split, some, warn_once
from fastcoop.errors import UserError

MAX_VAL_SHOTS = 4


@dataclass(frozen=True)
class FewShot:
    """A few-shot subset.

    Attributes:
        train: int64 indices into ``dataset.splits["train"]``, class by class.
        val: int64 indices into ``dataset.splits["val"]``, at most four per class.
    """

    train: np.ndarray
    val: np.ndarray


def few_shot(dataset: Dataset, shots: int | str, seed: int) -> FewShot:
    """The training and validation images of ``shots`` images per class and ``seed``; ``"all"`` is everything.

    One stream of Python's ``random``, seeded with ``seed``, draws the training and then the validation set,
    class by class in order of first image. A class with fewer images gives all it has, with a warning.

    Raises:
        UserError: the dataset has no training images, or ``shots`` is neither positive nor ``"all"``.
    """
    if "train" not in dataset.splits:
        raise UserError(f"Dataset {dataset.name} has only test images; nothing can be trained on it.")
    train, val = dataset.splits["train"], dataset.splits.get("val", Split((), np.zeros(0, np.int64)))
    if shots == "all":
        return FewShot(np.arange(len(train), dtype=np.int64), np.arange(len(val), dtype=np.int64))
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise UserError(f'shots must be a positive whole number or "all", got {shots!r}.')
    _warn_of_small_classes(dataset, train, shots)
    rng = random.Random(seed)
    return FewShot(_draw(train.labels, shots, rng), _draw(val.labels, min(shots, MAX_VAL_SHOTS), rng))


def _draw(labels: np.ndarray, shots: int, rng: random.Random) -> np.ndarray:
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(index)
    drawn: list[int] = []
    for members in by_class.values():
        drawn += rng.sample(members, shots) if len(members) >= shots else members
    return np.array(drawn, dtype=np.int64)


def _warn_of_small_classes(dataset: Dataset, train: Split, shots: int) -> None:
    counts = np.bincount(train.labels, minlength=len(dataset.class_names))
    small = [f"{dataset.class_names[label]} ({counts[label]})" for label in np.flatnonzero(counts < shots)]
    if small:
        warn_once(
            f"{dataset.name} has classes with fewer than {shots} training images, all used: {some(small, 5)}."
        )
