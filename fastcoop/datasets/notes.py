"""Warnings about a dataset, a sentence each: images left out, masks, images in two splits, class names."""

from __future__ import annotations

import filecmp
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastcoop.datasets.dataset import Item, Split
from fastcoop.datasets.files import Tree, abbreviate, normalized

# Endings of pictures that not every Pillow can decode; files with other endings are checked by their first bytes.
OTHER_PICTURES = {
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".ico", ".j2k", ".jpx", ".qoi", ".exr", ".hdr", ".dcm"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|BM....\0\0\0\0|....ftyp(?:hei|hev|mif1|avif)",
    re.DOTALL,
)
WORDS = r"(?:mask|masks|seg|segmentation|label|labels|gt|annotation|annotations|trimap|matte|alpha|depth)"
MASK = re.compile(rf"(.+?)[-_. ]+{WORDS}(?:[-_ ]?\d+)?", re.IGNORECASE)
MAX_COMPARED = 500  # files of the same name, class and size whose contents are compared for two splits
OVERLAPS = {  # effects of images that two splits share
    ("train", "test"): "runs are tested on images that they learn from",
    ("train", "val"): "what is chosen on the validation images is chosen on images that runs learn from",
    ("val", "test"): "what is chosen on the validation images is chosen on the test set",
}


def notes_on_left_out(name: str, tree: Tree, used: Iterable[str]) -> Iterator[str]:
    """Report the pictures below ``tree.root`` that are not among ``used`` (paths relative to it)."""
    taken = set(used)
    unused = [path for path in tree.images() if path not in taken]
    if unused:
        yield (
            f"{name} leaves out {len(unused)} image(s) that lie beside or below its class folders, such as "
            f"{abbreviate(unused, 1)}; move them into a class folder to use them, or list them in a CSV."
        )
    yield from notes_on_unknown_endings(name, tree)


def notes_on_unknown_endings(name: str, tree: Tree) -> Iterator[str]:
    """Report the pictures below ``tree.root`` whose names do not end as those of images do."""
    unknown = [path for path in tree.others() if _is_picture(tree.root / path)]
    if unknown:
        yield (
            f"{name} leaves out {len(unknown)} picture(s) because of how their names end, such as "
            f"{abbreviate(unknown, 1)}; let the names of JPEG files end in .jpg, and save other kinds as .jpg or .png."
        )


def _is_picture(path: Path) -> bool:
    if path.suffix.lower() in OTHER_PICTURES:
        return True
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with path.open("rb") as file:
            return MAGIC.match(file.read(16)) is not None
    except OSError:
        return False


def notes_on_masks(name: str, paths: Iterable[str]) -> Iterator[str]:
    """Report images that have another's name but for the ending or a word such as "mask", and folders of such names."""
    stems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(paths):
        folder, file = posixpath.split(path)
        stems[folder, os.path.splitext(file)[0]].append(path)
    folders = {
        folder for folder, _ in stems if re.fullmatch(WORDS, posixpath.basename(folder), re.IGNORECASE)
    }
    if folders:
        yield f"{name} has a class folder {min(folders)}/; if it holds masks, move it elsewhere."
    pairs = []
    for (folder, stem), alike in stems.items():
        pairs += [(alike[0], other) for other in alike[1:]]
        match = MASK.fullmatch(stem)
        if match and (folder, match[1]) in stems:
            pairs += [(stems[folder, match[1]][0], other) for other in alike]
    if pairs:
        first, other = min(pairs)
        yield (
            f"{name} uses {len(pairs)} image(s) that have the name of another one but for its ending or a word such as "
            f'"mask", such as {first} and {other}; if these are masks or copies, move them out of the class folders.'
        )


class _File(NamedTuple):
    path: str
    label: int
    device: int
    inode: int
    size: int


def notes_on_overlap(name: str, root: Path, items: Mapping[str, Sequence[Item]]) -> Iterator[str]:
    """Report images that two splits share: by path, by link, or as copies with the same file name."""
    files = {split: list(_files(root, part)) for split, part in items.items()}
    for (first, second), effect in OVERLAPS.items():
        pairs = _shared(root, files.get(first, []), files.get(second, []))
        if second == "val":  # images listed in both are not drawn for training
            if same := [pair for pair in pairs if pair[0] == pair[1]]:
                yield (
                    f"{name} has {len(same)} images in both train and val, such as {_example(same)}: "
                    "they are used for validation only."
                )
            pairs = [pair for pair in pairs if pair[0] != pair[1]]
        if pairs:
            yield f"{name} has {len(pairs)} images in both {first} and {second}, such as {_example(pairs)}: {effect}."


def _example(pairs: Sequence[tuple[str, str]]) -> str:
    first, second = min(pairs)
    more = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return f"{second}{more}" if first == second else f"{second} (the same as {first}){more}"


def _files(root: Path, part: Sequence[Item]) -> Iterator[_File]:
    for path, label, _ in part:
        try:
            stat = os.stat(root / path)
        except (OSError, ValueError):  # reported when features are cached
            continue
        yield _File(path, label, stat.st_dev, stat.st_ino, stat.st_size)


def _shared(root: Path, first: Sequence[_File], second: Sequence[_File]) -> list[tuple[str, str]]:
    """Return pairs of paths, one of each split, that are the same image."""
    paths = {file.path for file in first}
    by_inode = {(file.device, file.inode): file.path for file in first if file.inode}
    by_name = {
        (posixpath.basename(file.path), file.label, file.size): file.path for file in first if file.size
    }
    found: list[tuple[str, str]] = []
    candidates: list[tuple[str, str]] = []
    for path, label, device, inode, size in second:
        if path in paths:
            found.append((path, path))
        elif (device, inode) in by_inode:
            found.append((by_inode[device, inode], path))
        elif twin := by_name.get((posixpath.basename(path), label, size)):
            candidates.append((twin, path))
    step = -(-len(candidates) // MAX_COMPARED) or 1
    return found + [pair for pair in candidates[::step] if _equal(root / pair[0], root / pair[1])]


def _equal(first: Path, second: Path) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False


def notes_on_names(
    dataset: str, class_names: Sequence[str], where: str = "under class_names of its YAML"
) -> Iterator[str]:
    """Report classes whose names differ only by case, underscores, spaces and how letters are composed."""
    read: dict[str, list[str]] = defaultdict(list)
    for name in class_names:
        read[" ".join(normalized(name).replace("_", " ").lower().split())].append(name)
    for alike in (names for names in read.values() if len(names) > 1):
        yield (
            f"The classes {abbreviate(alike)} of {dataset} have the same prompt, which cannot tell them apart; name "
            f"them differently {where}."
        )


def notes_on_absent_classes(
    dataset: str, class_names: Sequence[str], splits: Mapping[str, Split]
) -> Iterator[str]:
    """Report classes without validation or test images."""
    for split, words, so in (
        ("val", "validation", "what is chosen on the validation images is chosen without them"),
        ("test", "test", "accuracies do not include them"),
    ):
        if split in splits and len(splits[split]):
            present = set(splits[split].labels.tolist())
            absent = [name for label, name in enumerate(class_names) if label not in present]
            if absent:
                yield f"{dataset} has no {words} images of {abbreviate(absent)}: {so}."
