"""Few-shot subsets by the official rule: drawn, or read from the files that keep an earlier draw."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from fastcoop.checks import whole_number
from fastcoop.datasets.dataset import Dataset, Split, warn_once
from fastcoop.datasets.fewshot_files import read_official, read_saved
from fastcoop.datasets.files import some
from fastcoop.datasets.halves import rows_in_whole
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
    """The training and validation images for ``shots`` per class and ``seed``; ``"all"`` is all of them.

    A subset kept in ``dataset.fewshot_dir`` is read: the official code's ``shot_K-seed_S.pkl``, else a JSON
    of the same content. Otherwise one stream of Python's ``random``, seeded with ``seed``, draws the training
    and then the validation set, class by class in order of first image. Nothing is written: the same arguments
    draw the same images. A class with fewer images gives all it has, with a warning. Training images
    that the validation set holds (ImageNet's) are not drawn. The subset of half a dataset's classes is the whole
    dataset's, so far as its images are of these classes: the official base-to-new rule.

    Raises:
        UserError: the dataset has no training images, ``shots`` is neither positive nor ``"all"``, or a kept
            subset is damaged or of another split.
    """
    if not (isinstance(shots, str) and shots == "all"):
        shots = whole_number(shots, 'shots (or "all")', 1)
    seed = whole_number(seed, "the seed")
    if dataset.whole is not None:
        return _within(dataset, few_shot(dataset.whole, shots, seed))
    if "train" not in dataset.splits:
        raise UserError(f"Dataset {dataset.name} has only test images; nothing can be trained on it.")
    train, val = dataset.splits["train"], dataset.splits.get("val", Split((), np.zeros(0, np.int64)))
    held_out = set(val.paths)
    free = np.array([index for index, path in enumerate(train.paths) if path not in held_out], dtype=np.int64)
    if shots == "all":
        return FewShot(free, np.arange(len(val), dtype=np.int64))
    assert isinstance(shots, int)
    _warn_of_small_classes(dataset, train.labels[free], shots)
    kept = read_official(dataset, shots, seed) or read_saved(dataset, shots, seed)
    if kept is not None and "val" in kept:
        return FewShot(kept["train"], kept["val"])
    rng = random.Random(seed)
    if (
        kept is not None
    ):  # ImageNet's official subsets have no validation set: ours must not share an image with them
        drawn = kept["train"]
        used = {train.paths[index] for index in drawn}
    else:
        drawn, used = free[_draw(train.labels[free], shots, rng)], set()
    val_drawn = _draw(val.labels, min(shots, MAX_VAL_SHOTS), rng)
    return FewShot(drawn, np.array([i for i in val_drawn if val.paths[i] not in used], dtype=np.int64))


def _within(half: Dataset, subset: FewShot) -> FewShot:
    """A subset of the whole dataset, as indices into the splits of half its classes."""

    def kept(split: str, drawn: np.ndarray) -> np.ndarray:
        if half.whole is None or split not in half.whole.splits:
            return np.zeros(0, np.int64)
        rows = rows_in_whole(half, split)
        return np.searchsorted(rows, drawn[np.isin(drawn, rows)]).astype(np.int64)

    return FewShot(kept("train", subset.train), kept("val", subset.val))


def _draw(labels: np.ndarray, shots: int, rng: random.Random) -> np.ndarray:
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(index)
    drawn: list[int] = []
    for members in by_class.values():
        drawn += rng.sample(members, shots) if len(members) >= shots else members
    return np.array(drawn, dtype=np.int64)


def _warn_of_small_classes(dataset: Dataset, labels: np.ndarray, shots: int) -> None:
    counts = np.bincount(labels, minlength=len(dataset.class_names))
    small = [f"{dataset.class_names[label]} ({counts[label]})" for label in np.flatnonzero(counts < shots)]
    if small:
        warn_once(
            f"{dataset.name} has classes with fewer than {shots} training images, all used: {some(small, 5)}."
        )
