"""A dataset: its images, splits and class names; and half of its classes, for base-to-new studies."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.datasets.files import FEWSHOT_FOLDER
from fastcoop.errors import UserError, abbreviate
from fastcoop.memo import memoize
from fastcoop.progress import counted

SPLITS = ("train", "val", "test")
HALVES = ("base", "new")  # runs are trained on one half of the classes and tested on both
MAX_NAME_BYTES = 120  # files are named after it, and file systems allow 255
WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # no names for files
EXAMPLE = 'for example: template: "a photo of a {}, a type of flower."'
Item = tuple[str, int, str]  # relative path, label, class name: an entry of the official split files
Items = dict[str, list[Item]]  # by split

log = logging.getLogger("fastcoop.datasets")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process: a sweep loads the same dataset many times."""
    log.warning(message)


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels.

    Attributes:
        paths: Posix paths relative to ``Dataset.root``.
        labels: int64 (len(paths),), indices into ``Dataset.class_names``.
    """

    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset on disk.

    Attributes:
        name: Short name, safe as a file name.
        root: The folder that the paths of all splits are relative to.
        class_names: Class names in label order.
        template: The hand-written prompt, with one ``{}`` for the class name (paper, Table 6).
        splits: "train" and "val" (absent from datasets for testing only) and "test".
        digest: sha256 hex of the class names and the splits' paths and labels. Image bytes are not included.
        title: The name in tables and figures.
        fewshot_dir: The folder of few-shot subsets that were drawn elsewhere.
        store: The feature file that replaces images which are not on this machine; else None.
        class_ids: WordNet IDs in label order, where the classes have them; else empty. They identify the classes that
            two datasets share.
        whole: The dataset that this is half the classes of; else None.
        notes: Warnings, a sentence each, such as on images left out or shared by two splits.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    template: str
    splits: Mapping[str, Split]
    digest: str
    title: str
    fewshot_dir: Path
    store: Path | None = None
    class_ids: tuple[str, ...] = ()
    whole: Dataset | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def files(self, split: str, rows: Iterable[int]) -> list[Path]:
        """Return the image files at ``rows`` of a split."""
        return [self.root / self.splits[split].paths[row] for row in rows]


def make_dataset(
    name: str,
    root: Path,
    class_names: Sequence[str],
    template: str,
    splits: Mapping[str, Split],
    **others: Any,
) -> Dataset:
    """Make a dataset, after checking that it can be trained or tested on, and that prompts can contain its names.

    ``others`` are further fields of `Dataset`; by default the title is the name.
    """
    splits = {key: splits[key] for key in SPLITS if key in splits and len(splits[key])}
    place = f"Dataset {name} in {root}"
    if len(class_names) < 2:
        classes = counted(len(class_names), "class")
        raise UserError(f"{place} has {classes}, expected at least two; add images of others.")
    for class_name in class_names:
        try:
            class_name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"The class name {class_name!r} of {name} is not UTF-8 text; set PYTHONUTF8=1 where the locale is not "
                "UTF-8, else rename its folder, or the class in the file that names it."
            ) from None
        if not class_name.replace("_", " ").strip():
            raise UserError(
                f'The class name "{class_name}" of {name} is empty in a prompt; rename it, or give it a name under '
                "class_names of the dataset's YAML."
            )
    if "test" not in splits:
        raise UserError(f"{place} has no test images, which accuracies are measured on.")
    if "train" in splits:
        rows = trainable_rows(splits)
        present = set(splits["train"].labels[rows].tolist())
        if empty := [class_name for label, class_name in enumerate(class_names) if label not in present]:
            also_val = "" if len(rows) == len(splits["train"]) else " that is not in val too"
            raise UserError(
                f"{place} has no training image for {abbreviate(empty)}{also_val}; add some, or take such classes out "
                "of the other splits too."
            )
    others = {"title": name, "fewshot_dir": root / FEWSHOT_FOLDER, **others}
    digest = content_digest(class_names, splits)
    return Dataset(name, root, tuple(class_names), template, splits, digest, **others)


def check_name_and_template(name: str, template: str, where: str = "") -> None:
    """Raise a UserError for a name that cannot name files, or a template without one ``{}``."""
    too_long = len(name.encode()) > MAX_NAME_BYTES
    if too_long or not re.fullmatch(r"\w([\w.-]*[\w-])?", name) or WINDOWS_NAMES.fullmatch(name):
        raise UserError(
            f'{where}name must be letters, digits, "_", "-" or ".", so that it can name files on every system: at most '
            f'{MAX_NAME_BYTES} bytes, no "." at the end and none of Windows\' own names (con, nul, ...); got "{name}". '
            "Give another name, for a folder or CSV under name: of its YAML."
        )
    before, braces, after = template.partition("{}")
    if not braces or re.search("[{}]", before + after):
        place = "where the class name goes"
        raise UserError(f'{where}template must have {{}} once, {place}, got "{template}"; {EXAMPLE}')


def trainable_rows(splits: Mapping[str, Split]) -> np.ndarray:
    """Return the rows of the training images that are not validation images too, int64, ascending."""
    held_out = set(splits["val"].paths) if "val" in splits else set()
    rows = [row for row, path in enumerate(splits["train"].paths) if path not in held_out]
    return np.array(rows, np.int64)


def content_digest(class_names: Sequence[str], splits: Mapping[str, Split]) -> str:
    """Return the sha256 hex of the class names and of every split's paths and labels, in order."""
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    for key in SPLITS:
        if key in splits:
            split = splits[key]
            digest.update(f"\n{key} {len(split)}\n".encode())
            digest.update("\n".join(split.paths).encode("utf-8", "surrogateescape"))
            if any("\n" in path for path in split.paths):  # else different lists could have the same digest
                digest.update(json.dumps(split.paths).encode())
            digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def test_digest(dataset: Dataset, skipped: Sequence[int]) -> str:
    """Return the sha256 hex of a test: the dataset's digest, unless test images were ``skipped`` as unreadable."""
    if not skipped:
        return dataset.digest
    return hashlib.sha256(f"{dataset.digest} without {list(skipped)}".encode()).hexdigest()


def split_spec(spec: str) -> tuple[str, str | None]:
    """Return ``"NAME:base"`` as ("NAME", "base"), and a name without a half with None."""
    name, colon, half = spec.rpartition(":")
    return (name, half) if colon and half in HALVES else (spec, None)


def half_of(dataset: Dataset, half: str) -> Dataset:
    """Return the dataset "NAME:base", the first ceil(n / 2) of NAME's n classes, or "NAME:new", the others.

    The official rule (Zhou et al., "Conditional Prompt Learning for Vision-Language Models", 2022, section 4.1).
    Labels start at 0. The few-shot subsets of a half are those of the whole dataset, restricted to images of its
    classes; its features are the whole dataset's, too. Refuses a half of fewer than two classes or without test images.
    """
    name, classes = f"{dataset.name}:{half}", len(dataset.class_names)
    cut = (classes + 1) // 2
    first, stop = (0, cut) if half == "base" else (cut, classes)
    splits = {}
    for key, split in dataset.splits.items():
        rows = np.flatnonzero((split.labels >= first) & (split.labels < stop))
        splits[key] = Split(tuple(split.paths[row] for row in rows), split.labels[rows] - first)
    return make_dataset(
        name, dataset.root, dataset.class_names[first:stop], dataset.template, splits, store=dataset.store,
        title=f"{dataset.title} ({half})", fewshot_dir=dataset.fewshot_dir, notes=dataset.notes, whole=dataset,
        class_ids=dataset.class_ids[first:stop],
    )  # fmt: skip


@memoize(3)
def rows_in_whole(half: Dataset, split: str) -> np.ndarray:
    """Return the positions of a half's images in the whole dataset's split, int64 (images,), ascending."""
    assert half.whole is not None
    paths = half.whole.splits[split].paths if split in half.whole.splits else ()
    of_half = set(half.splits[split].paths) if split in half.splits else set()
    return np.array([row for row, path in enumerate(paths) if path in of_half], dtype=np.int64)
