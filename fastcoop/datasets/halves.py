"""Half of a dataset's classes, for base-to-new studies: runs are trained on one half and tested on both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastcoop.datasets.dataset import Dataset, Split, content_digest
from fastcoop.errors import UserError

HALVES = ("base", "new")


def split_spec(spec: str) -> tuple[str, str | None]:
    """Return ``"NAME:base"`` as ("NAME", "base"), and a name without a half with None."""
    name, colon, half = spec.rpartition(":")
    return (name, half) if colon and half in HALVES else (spec, None)


def half_of(dataset: Dataset, half: str) -> Dataset:
    """Return the dataset "NAME:base", the first ceil(n / 2) of NAME's n classes, or "NAME:new", the others.

    The official rule (Zhou et al., "Conditional Prompt Learning for Vision-Language Models", 2022, section 4.1).
    Labels start at 0. The few-shot subsets of a half are those of the whole dataset, restricted to images of its
    classes; its features are the whole dataset's, too.

    Raises:
        UserError: The half would have fewer than two classes, or no test images.
    """
    name, classes = f"{dataset.name}:{half}", len(dataset.class_names)
    cut = (classes + 1) // 2
    first, stop = (0, cut) if half == "base" else (cut, classes)
    if stop - first < 2:
        raise UserError(
            f"The half {name} has {stop - first} class(es), expected at least two: {dataset.name} has {classes} in all."
        )
    splits = {}
    for key, split in dataset.splits.items():
        rows = np.flatnonzero((split.labels >= first) & (split.labels < stop))
        if len(rows):
            splits[key] = Split(tuple(split.paths[row] for row in rows), split.labels[rows] - first)
    if "test" not in splits:
        raise UserError(f"The half {name} has no test images, which accuracies are measured on.")
    names, ids = dataset.class_names[first:stop], dataset.class_ids[first:stop]
    title, digest = f"{dataset.title} ({half})", content_digest(names, splits)
    return replace(
        dataset, name=name, title=title, class_names=names, class_ids=ids, splits=splits, digest=digest, whole=dataset
    )  # fmt: skip


def rows_in_whole(half: Dataset, split: str) -> np.ndarray:
    """Return the positions of a half's images in the whole dataset's split, int64 (images,), ascending."""
    assert half.whole is not None
    paths = half.whole.splits[split].paths if split in half.whole.splits else ()
    of_half = set(half.splits[split].paths) if split in half.splits else set()
    return np.array([row for row, path in enumerate(paths) if path in of_half], dtype=np.int64)
