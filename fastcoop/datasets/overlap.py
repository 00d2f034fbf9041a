"""Images that two splits share: by path, by link, or as copies of one name."""

from __future__ import annotations

import filecmp
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastcoop.datasets.dataset import Item

MOST_COMPARED = 500  # files of equal name, class and size that are compared byte by byte for two splits
OVERLAPS = {  # what images in two splits mean
    ("train", "test"): "runs are tested on images that they learn from",
    ("train", "val"): "what is chosen on the validation images is chosen on images that runs learn from",
    ("val", "test"): "what is chosen on the validation images is chosen on the test set",
}

Pair = tuple[str, str]
File = tuple[str, int, int, int, int]  # path, label, device, inode, size


def notes_on_overlap(name: str, root: Path, items: Mapping[str, Sequence[Item]]) -> Iterator[str]:
    """Yield sentences about the images that train, val and test share."""
    files = {split: _files(root, part) for split, part in items.items()}
    for (first, second), effect in OVERLAPS.items():
        pairs = _shared(root, files.get(first, []), files.get(second, []))
        if second == "val":  # images listed in both validate and are not drawn for training
            if same := [pair for pair in pairs if pair[0] == pair[1]]:
                yield (
                    f"{name} has {len(same)} images in both train and val, such as {_example(same)}: "
                    "they validate and are not learned from."
                )
            pairs = [pair for pair in pairs if pair[0] != pair[1]]
        if pairs:
            yield f"{name} has {len(pairs)} images in both {first} and {second}, such as {_example(pairs)}: {effect}."


def _files(root: Path, part: Sequence[Item]) -> list[File]:
    files = []
    for path, label, _ in part:
        try:
            stat = os.stat(root / path)
        except (OSError, ValueError):  # reported when features are cached
            continue
        files.append((path, label, stat.st_dev, stat.st_ino, stat.st_size))
    return files


def _shared(root: Path, first: Sequence[File], second: Sequence[File]) -> list[Pair]:
    paths = {path for path, *_ in first}
    by_place = {(device, inode): path for path, _, device, inode, _ in first if inode}
    by_name = {(posixpath.basename(path), label, size): path for path, label, _, _, size in first if size}
    found: list[Pair] = []
    candidates: list[Pair] = []
    for path, label, device, inode, size in second:
        if path in paths:
            found.append((path, path))
        elif (device, inode) in by_place:
            found.append((by_place[device, inode], path))
        elif twin := by_name.get((posixpath.basename(path), label, size)):
            candidates.append((twin, path))
    step = -(-len(candidates) // MOST_COMPARED) or 1
    return found + [pair for pair in candidates[::step] if _equal(root / pair[0], root / pair[1])]


def _equal(first: Path, second: Path) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False


def _example(pairs: Sequence[Pair]) -> str:
    first, second = min(pairs)
    more = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return f"{second}{more}" if first == second else f"{second} (the same as {first}){more}"
