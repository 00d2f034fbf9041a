"""Split files in the official format, and the official rules that make splits where there is none."""

from __future__ import annotations

import json
import posixpath
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastcoop.datasets.dataset import SPLITS, Item, Items, Split
from fastcoop.datasets.files import Tree, find_images
from fastcoop.errors import UserError, abbreviate, nearest
from fastcoop.files import read_json
from fastcoop.progress import counted

SPLIT_SEED = 1  # of splits made here; the official code does not publish its own
VAL_SHARE = 0.2
FORMAT = '{"train": [[path, label, class name], ...], "val": [...], "test": [...]}'
T = TypeVar("T", bound=tuple[Any, ...])


def read_items(path: Path, required: Sequence[str] = ()) -> Items:
    """Read a split file of the form ``FORMAT`` with the splits ``required``; refuse one that is malformed."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key, []), list) for key in SPLITS):
        raise UserError(f"{path} must hold {FORMAT}.")
    for key in content:
        if key not in (*SPLITS, "digest"):
            raise UserError(f'{path} has a split "{key}", expected train, val or test.{nearest(key, SPLITS)}')
    for key in required:
        if key not in content:
            raise UserError(f'{path} has no "{key}" split; expected {FORMAT}.')
    items: Items = {key: [] for key in SPLITS if key in content}
    for key, part in items.items():
        for index, entry in enumerate(content[key]):
            match entry:
                case [str(image), int(label), str(name)] if (
                    label >= 0 and not isinstance(label, bool) and image and name.strip()
                ):
                    part.append((posixpath.normpath(image), label, name))
                case _:
                    place, shown = f"{path}: entry {index} of {key}", json.dumps(entry)[:80]
                    raise UserError(f"{place} must be [path, label, class name], got {shown}.")
    return _distinct(items, path)


def find_items(items: Items, root: Path, source: str | Path) -> Items:
    """Return the items with the paths of their images under ``root``; refuse missing and repeated images."""
    found = find_images(root, (image for image, _, _ in chain(*items.values())))
    if missing := [image for image, place in found.items() if place is None]:
        images = counted(len(missing), "image")
        raise UserError(
            f"{source} names {images} (of {sum(map(len, items.values()))}) that cannot be found under {root}: "
            f"{abbreviate(missing)}; extract the whole dataset there, or fix the list."
        )
    placed = {key: [(found[one[0]] or "", *one[1:]) for one in part] for key, part in items.items()}
    return _distinct(placed, source)


def _distinct(items: Items, source: str | Path) -> Items:
    for key, part in items.items():
        if repeated := [image for image, count in Counter(one[0] for one in part).items() if count > 1]:
            images = abbreviate(repeated)
            raise UserError(f"{source} lists {images} more than once in {key}; list each image once.")
    return items


def names_by_label(items: Items, source: str | Path) -> list[str]:
    """Return the class names of the items in label order; refuse labels with two names, or not 0, 1, 2, ..."""
    names: dict[int, str] = {}
    for image, label, name in chain(*items.values()):
        if names.setdefault(label, name) != name:
            pair = f'"{names[label]}" and "{name}"'
            raise UserError(f"{source} gives label {label} two names: {pair} ({image}).")
    if gaps := abbreviate([str(label) for label in range(len(names)) if label not in names]):
        raise UserError(f"{source} must number classes 0, 1, 2, ... without gaps; no image has label {gaps}.")
    return [names[label] for label in sorted(names)]


def by_class(items: Iterable[T]) -> list[list[T]]:
    """Group tuples by their second entry, the label; classes are in order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


def class_items(tree: Tree, classes: Iterable[Item], nested: bool = False) -> list[Item]:
    """Return the images of class folders, given as (folder, label, class name); refuse a folder without images. If
    ``nested``, the images of a class may be in a folder inside its own."""
    return [
        (f"{folder}/{file}", label, name)
        for class_folder, label, name in classes
        for folder in [tree.image_folder(class_folder, nested)]
        for file in tree.listing(folder).images
    ]


def split_by_class(items: Iterable[Item], source: str | Path, val_share: float = VAL_SHARE) -> Items:
    """Split every class at random: 30% test, ``val_share`` validation, the rest (50%) training."""
    train_share = round(0.7 - val_share, 9)  # 0.7 - 0.2 is a little below 0.5, which would round down
    rng = random.Random(SPLIT_SEED)
    splits: Items = {key: [] for key in SPLITS}
    for members in by_class(sorted(items, key=itemgetter(1))):
        n = len(members)
        if n < 3:
            raise UserError(
                f'Class "{members[0][2]}" of {source} has {counted(n, "image")}, too few to split into three; '
                "add images, or say which image goes where in a split file or CSV."
            )
        rng.shuffle(members)
        n_train = max(1, min(round(n * train_share), n - 2))
        n_val = max(1, min(round(n * val_share), n - n_train - 1))
        splits["train"] += members[:n_train]
        splits["val"] += members[n_train : n_train + n_val]
        splits["test"] += members[n_train + n_val :]
    return splits


def split_train_val(trainval: Iterable[Item], val_share: float = VAL_SHARE) -> tuple[list[Item], list[Item]]:
    """Move ``val_share`` of every class, drawn at random, from the training to a validation set. A class with a
    single image keeps it for training. Classes are in order of first appearance."""
    rng, train, val = random.Random(SPLIT_SEED), list[Item](), list[Item]()
    for members in by_class(trainval):
        rng.shuffle(members)
        n_val = min(max(1, round(len(members) * val_share)), len(members) - 1)
        val += members[:n_val]
        train += members[n_val:]
    return train, val


def make_splits(items: Items) -> dict[str, Split]:
    """Turn items into splits; their class names are dropped."""
    return {
        key: Split(tuple(path for path, _, _ in part), np.array([label for _, label, _ in part], np.int64))
        for key, part in items.items()
    }
