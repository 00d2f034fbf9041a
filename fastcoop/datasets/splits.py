"""Split files in the official format, and the official rules that make splits where there is none."""

from __future__ import annotations

import json
import posixpath
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastcoop.datasets.dataset import SPLITS, Item
from fastcoop.datasets.files import abbreviate, find_images, reading
from fastcoop.errors import UserError, nearest

SPLIT_SEED = 1  # of splits made here; the official code does not publish its own
FORMAT = '{"train": [[path, label, class name], ...], "val": [...], "test": [...]}'
T = TypeVar("T", bound=tuple[Any, ...])


def read_json(path: Path) -> Any:
    """Parse a JSON file; a UserError names the file and the line of a mistake."""
    try:
        with reading(path, "a JSON file"):
            return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} is not valid JSON: {error.msg}; download or write the file again."
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a split file.") from None


def read_items(path: Path, required: Sequence[str] = ()) -> dict[str, list[Item]]:
    """Read a split file of the form ``FORMAT``.

    Raises:
        UserError: Malformed JSON, a missing or unknown split, an entry of another form, or an image listed twice.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key, []), list) for key in SPLITS):
        raise UserError(f"{path} must hold {FORMAT}.")
    for key in content:
        if key not in (*SPLITS, "digest"):
            raise UserError(f'{path} has a split "{key}", expected train, val or test.{nearest(key, SPLITS)}')
    for key in required:
        if key not in content:
            raise UserError(f'{path} has no "{key}" split; expected {FORMAT}.')
    items: dict[str, list[Item]] = {key: [] for key in SPLITS if key in content}
    for key, part in items.items():
        for index, entry in enumerate(content[key]):
            match entry:
                case [str(image), int(label), str(name)] if (
                    label >= 0 and not isinstance(label, bool) and image and name.strip()
                ):
                    part.append((posixpath.normpath(image), label, name))
                case _:
                    raise UserError(
                        f"{path}: entry {index} of {key} must be [path, label, class name], "
                        f"got {json.dumps(entry)[:80]}."
                    )
    _check_distinct(items, path)
    return items


def _check_distinct(items: Mapping[str, Sequence[Item]], source: str | Path) -> None:
    for key, part in items.items():
        repeated = [image for image, count in Counter(image for image, _, _ in part).items() if count > 1]
        if repeated:
            raise UserError(
                f"{source} lists {abbreviate(repeated)} more than once in {key}; list each image once."
            )


def find_items(items: Mapping[str, Sequence[Item]], root: Path, source: str) -> dict[str, list[Item]]:
    """Return the items with the paths of their images under ``root``.

    Raises:
        UserError: Images do not exist, or two items are the same image.
    """
    found = find_images(root, (image for part in items.values() for image, _, _ in part))
    missing = [image for image, place in found.items() if place is None]
    if missing:
        raise UserError(
            f"{source} names {len(missing)} images (of {sum(map(len, items.values()))}) that are not under {root}: "
            f"{abbreviate(missing)}; extract the whole dataset there, or fix the list."
        )
    placed = {
        key: [(found[image] or image, label, name) for image, label, name in part]
        for key, part in items.items()
    }
    _check_distinct(placed, source)
    return placed


def names_by_label(items: Mapping[str, Sequence[Item]], source: str) -> list[str]:
    """Return the class names of the items in label order.

    Raises:
        UserError: A label has two names, or labels are not 0, 1, 2, ...
    """
    names: dict[int, str] = {}
    for image, label, name in (item for part in items.values() for item in part):
        if names.setdefault(label, name) != name:
            raise UserError(
                f'{source} gives label {label} two names: "{names[label]}" and "{name}" ({image}).'
            )
    gaps = [str(label) for label in range(len(names)) if label not in names]
    if gaps:
        raise UserError(
            f"{source} must number its classes 0, 1, 2, ... without gaps; no image has label {abbreviate(gaps)}."
        )
    return [names[label] for label in sorted(names)]


def by_class(items: Iterable[T]) -> list[list[T]]:
    """Group tuples by their second entry, the label; classes are in order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


def split_by_class(
    images: Iterable[tuple[str, Sequence[str]]], source: str, val_share: float = 0.2
) -> dict[str, list[Item]]:
    """Split every class at random: 30% test, ``val_share`` validation, the rest (50%) training.

    Args:
        images: Class name and paths of each class, in label order.
        source: What the images come from, for messages.
        val_share: Share of the validation images.

    Raises:
        UserError: A class has fewer than three images.
    """
    train_share = round(0.7 - val_share, 9)  # 0.7 - 0.2 is a little below 0.5, which would round down
    rng = random.Random(SPLIT_SEED)
    items: dict[str, list[Item]] = {key: [] for key in SPLITS}
    for label, (name, paths) in enumerate(images):
        n = len(paths)
        if n < 3:
            raise UserError(
                f'Class "{name}" of {source} has {n} image(s), too few to split into three; '
                "add images, or say which image goes where in a split file or CSV."
            )
        shuffled = [(path, label, name) for path in paths]
        rng.shuffle(shuffled)
        n_train = max(1, min(round(n * train_share), n - 2))
        n_val = max(1, min(round(n * val_share), n - n_train - 1))
        items["train"] += shuffled[:n_train]
        items["val"] += shuffled[n_train : n_train + n_val]
        items["test"] += shuffled[n_train + n_val :]
    return items


def split_train_val(trainval: Sequence[Item], val_share: float = 0.2) -> tuple[list[Item], list[Item]]:
    """Move ``val_share`` of every class, drawn at random, from the training to a validation set.

    A class with a single image keeps it for training. Classes are in order of first appearance.
    """
    rng = random.Random(SPLIT_SEED)
    train: list[Item] = []
    val: list[Item] = []
    for members in by_class(trainval):
        rng.shuffle(members)
        n_val = min(max(1, round(len(members) * val_share)), len(members) - 1)
        val += members[:n_val]
        train += members[n_val:]
    return train, val
