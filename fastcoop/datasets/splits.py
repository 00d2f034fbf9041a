"""Split files in the official format, and the official rules that make splits where there is none."""

from __future__ import annotations

import json
import posixpath
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastcoop.datasets.dataset import SPLITS, Item
from fastcoop.datasets.files import find_images, reading, some
from fastcoop.errors import UserError, nearest

SPLIT_SEED = 1  # of splits made here; the official code's own were never published as rules


def read_json(path: Path) -> object:
    """Parse a JSON file; a UserError names the file and line of a mistake."""
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
    """Read ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``.

    Raises:
        UserError: malformed JSON, a missing or unknown split, an entry of another shape, or an image listed twice.
    """
    content = read_json(path)
    expected = '{"train": [[path, label, class name], ...], "val": [...], "test": [...]}'
    if not isinstance(content, dict) or not all(isinstance(content.get(key, []), list) for key in SPLITS):
        raise UserError(f"{path} must hold {expected}.")
    content = {key: value for key, value in content.items() if key != "digest"}
    for key in content:
        if key not in SPLITS:
            raise UserError(f'{path} has a split "{key}", expected train, val or test.{nearest(key, SPLITS)}')
    for key in required:
        if key not in content:
            raise UserError(f'{path} has no "{key}" split; expected {expected}.')
    items = {
        key: [_item(path, key, i, entry) for i, entry in enumerate(content[key])]
        for key in SPLITS
        if key in content
    }
    _refuse_repeated(items, path)
    return items


def _refuse_repeated(items: Mapping[str, Sequence[Item]], source: str | Path) -> None:
    for key, part in items.items():
        counts = Counter(image for image, _, _ in part)
        if len(counts) < len(part):
            repeated = [image for image, count in counts.items() if count > 1]
            raise UserError(f"{source} lists {some(repeated)} more than once in {key}; list each image once.")


def _item(path: Path, key: str, index: int, entry: object) -> Item:
    match entry:
        case [str(image), int(label), str(name)] if (
            label >= 0 and not isinstance(label, bool) and image and name.strip()
        ):
            return posixpath.normpath(image), label, name
    raise UserError(
        f"{path}: entry {index} of {key} must be [path, label, class name], got {json.dumps(entry)[:80]}."
    )


def find_items(items: Mapping[str, Sequence[Item]], root: Path, source: str) -> dict[str, list[Item]]:
    """The items with the paths that their images have under ``root``.

    Raises:
        UserError: some do not exist there, or two are one image.
    """
    found = find_images(root, (image for part in items.values() for image, _, _ in part))
    missing = [image for image, place in found.items() if place is None]
    if missing:
        total = sum(len(part) for part in items.values())
        raise UserError(
            f"{source} names {len(missing)} images (of {total}) that are not under {root}: {some(missing)}; "
            "extract the whole dataset there, or fix the list."
        )
    placed = {
        key: [(found[image] or image, label, name) for image, label, name in part]
        for key, part in items.items()
    }
    _refuse_repeated(placed, source)
    return placed


def names_by_label(items: Mapping[str, Sequence[Item]], source: str) -> list[str]:
    """The class names in label order, as items carry them."""
    names: dict[int, str] = {}
    for part in items.values():
        for image, label, name in part:
            if names.setdefault(label, name) != name:
                raise UserError(
                    f'{source} gives label {label} two names: "{names[label]}" and "{name}" ({image}).'
                )
    gaps = [str(label) for label in range(len(names)) if label not in names]  # however large the largest is
    if gaps:
        raise UserError(
            f"{source} must number its classes 0, 1, 2, ... without gaps; no image has label {some(gaps)}."
        )
    return [names[label] for label in sorted(names)]


def split_by_class(
    images: Sequence[tuple[str, Sequence[str]]], source: str, val_share: float = 0.2
) -> dict[str, list[Item]]:
    """Split every class at random: 30% test, ``val_share`` validation, the rest (50%) training.

    Args:
        images: (class name, paths) in label order.

    Raises:
        UserError: a class with fewer than three images.
    """
    train_share = round(
        0.7 - val_share, 9
    )  # 0.7 - 0.2 is a little below a half, and halves are rounded below
    rng = random.Random(SPLIT_SEED)
    items: dict[str, list[Item]] = {key: [] for key in SPLITS}
    for label, (name, paths) in enumerate(images):
        if len(paths) < 3:
            raise UserError(
                f'Class "{name}" of {source} has {len(paths)} image(s), too few to split into three; '
                "add images, or say which image goes where in a split file or CSV."
            )
        shuffled = list(paths)
        rng.shuffle(shuffled)
        n = len(shuffled)
        n_train = max(1, min(round(n * train_share), n - 2))
        n_val = max(1, min(round(n * val_share), n - n_train - 1))
        for key, part in (
            ("train", shuffled[:n_train]),
            ("val", shuffled[n_train : n_train + n_val]),
            ("test", shuffled[n_train + n_val :]),
        ):
            items[key] += [(path, label, name) for path in part]
    return items


def split_train_val(trainval: Sequence[Item], val_share: float = 0.2) -> tuple[list[Item], list[Item]]:
    """Move ``val_share`` of every class, drawn at random, from the training to a validation set.

    A class with a single image keeps it for training. Classes come in order of first appearance.
    """
    rng = random.Random(SPLIT_SEED)
    by_class: dict[int, list[Item]] = {}
    for item in trainval:
        by_class.setdefault(item[1], []).append(item)
    train: list[Item] = []
    val: list[Item] = []
    for members in by_class.values():
        rng.shuffle(members)
        n_val = min(max(1, round(len(members) * val_share)), len(members) - 1)
        val += members[:n_val]
        train += members[n_val:]
    return train, val
