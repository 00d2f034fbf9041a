"""Images that two splits share: by path, by link, or as copies of one name."""

from __future__ import annotations

import filecmp
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastcoop.datasets.dataset import Item
from fastcoop.datasets.files import some

COMPARED = 500  # files of one name, class and size that are compared at most for two splits

Pair = tuple[str, str]


def notes_on_overlap(name: str, root: Path, items: Mapping[str, Sequence[Item]]) -> Iterator[str]:
    """Sentences on what train, val and test share."""
    files = {split: _files(root, part) for split, part in items.items()}

    def shared(first: str, second: str) -> tuple[list[Pair], list[Pair]]:
        """Pairs of one path, and pairs of two paths of the same picture."""
        pairs = _shared(root, files.get(first, []), files.get(second, []))
        return [pair for pair in pairs if pair[0] == pair[1]], [pair for pair in pairs if pair[0] != pair[1]]

    same, copies = shared("train", "test")
    if same or copies:
        yield f"{name} tests on {len(same + copies)} of its own training images, such as {_example(same + copies)}."
    same, copies = shared("train", "val")
    if same:
        yield (
            f"{name} has {len(same)} images in both train and val, such as {_example(same)}: "
            "they validate and are not learned from."
        )
    if copies:
        yield (
            f"{name} validates on {len(copies)} copies of its training images, such as {_example(copies)}: what is "
            "chosen on the validation images is chosen on what was learned from."
        )
    same, copies = shared("val", "test")
    if same or copies:
        yield (
            f"{name} validates on {len(same + copies)} of its test images, such as {_example(same + copies)}: what is "
            "chosen on the validation images is chosen on the test set."
        )


File = tuple[str, int, int, int, int]  # path, label, device, inode, size


def _files(root: Path, part: Sequence[Item]) -> list[File]:
    files = []
    for path, label, _ in part:
        try:
            stat = os.stat(root / path)
        except (OSError, ValueError):  # it is named when features are cached
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
    step = -(-len(candidates) // COMPARED) or 1
    return found + [pair for pair in candidates[::step] if _equal(root / pair[0], root / pair[1])]


def _equal(first: Path, second: Path) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False


def _example(pairs: Sequence[Pair]) -> str:
    first, second = min(pairs)
    if first == second:
        return some(sorted({pair[1] for pair in pairs if pair[0] == pair[1]}), 1)
    return f"{second} (the same as {first})"
