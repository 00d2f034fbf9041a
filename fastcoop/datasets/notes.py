"""Warnings about a dataset, a sentence each: images left out, masks, images in two splits, class names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fastcoop.datasets.dataset import Item, Split
from fastcoop.datasets.files import Tree, in_prompt
from fastcoop.errors import abbreviate
from fastcoop.progress import counted

# Endings of pictures that not every Pillow can decode; files with other endings are checked by their first bytes.
OTHER_PICTURES = {
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".ico", ".j2k", ".jpx", ".qoi", ".exr", ".hdr", ".dcm"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|BM....\0\0\0\0|....ftyp(?:hei|hev|mif1|avif)",
    re.DOTALL,
)
MASK_WORD = re.compile(r"(?i:masks?|seg|segmentation|labels?|gt|annotations?|trimap|matte|alpha|depth)")
MASK = re.compile(rf"(.+?)[-_. ]+{MASK_WORD.pattern}(?:[-_ ]?\d+)?", re.DOTALL)
MAX_COMPARED = 1000  # files of the same size whose contents are compared for two splits
END = 4096  # bytes at the end of a file, compared before its whole content
OVERLAPS = {  # effects of images that two splits share
    ("train", "test"): "runs are tested on images that they learn from",
    ("train", "val"): "what is chosen on the validation images is chosen on images that runs learn from",
    ("val", "test"): "what is chosen on the validation images is chosen on the test set",
}
Found = tuple[str, os.stat_result]


def notes_on_pictures(name: str, tree: Tree, at: str, paths: Sequence[str]) -> Iterator[str]:
    """Report pictures in ``tree`` that are not used, and those of the used ``paths`` in ``at`` that may be masks."""
    used = {posixpath.join(at, path) for path in paths}
    if unused := [path for path in tree.paths("images") if path not in used]:
        yield (
            f"{name} leaves out {counted(len(unused), 'image')} beside or below its class folders, such as "
            f"{abbreviate(unused, 1)}; move them into a class folder to use them, or list them in a CSV."
        )
    yield from notes_on_unknown_endings(name, tree)
    yield from _notes_on_masks(name, paths)


def notes_on_unknown_endings(name: str, tree: Tree) -> Iterator[str]:
    """Report the pictures below ``tree.root`` whose names do not end as those of images do."""
    if unknown := [path for path in tree.paths("others") if _is_picture(tree.root / path)]:
        yield (
            f"{name} leaves out {counted(len(unknown), 'picture')} with an unknown ending, such as "
            f"{abbreviate(unknown, 1)}; let the names of JPEG files end in .jpg, and save other kinds as .jpg or .png."
        )


def _is_picture(path: Path) -> bool:
    if path.suffix.lower() in OTHER_PICTURES:
        return True
    with contextlib.suppress(OSError):
        if path.is_file():  # opening a pipe would block
            with path.open("rb") as file:
                return MAGIC.match(file.read(16)) is not None
    return False


def _notes_on_masks(name: str, paths: Iterable[str]) -> Iterator[str]:
    """Report images that have another's name but for the ending or a word such as "mask", and folders of such names."""
    stems: dict[str, list[str]] = defaultdict(list)  # paths by path without ending
    for path in sorted(paths):
        stems[os.path.splitext(path)[0]].append(path)
    folders = {posixpath.dirname(stem) for stem in stems}
    if masks := [folder for folder in folders if MASK_WORD.fullmatch(posixpath.basename(folder))]:
        yield f"{name} has a class folder {min(masks)}/; if it holds masks, move it elsewhere."
    pairs = [(alike[0], other) for alike in stems.values() for other in alike[1:]]
    for stem, alike in stems.items():
        if (match := MASK.fullmatch(stem)) and match[1] in stems:
            pairs += [(stems[match[1]][0], other) for other in alike]
    if pairs:
        first, other = min(pairs)
        yield (
            f"{name} uses {counted(len(pairs), 'image')} with the name of another one but for its ending or a word "
            f'such as "mask": {first} and {other}; if these are masks or copies, move them out of the class folders.'
        )


def notes_on_overlap(name: str, root: Path, items: Mapping[str, Sequence[Item]]) -> Iterator[str]:
    """Report images that two splits share: by path, by link, or as copies."""
    files: dict[str, list[Found]] = {split: [] for split in items}
    for split, part in items.items():
        for path, *_ in part:
            with contextlib.suppress(OSError, ValueError):  # reported when features are cached
                files[split].append((path, os.stat(root / path)))
    for (first, second), effect in OVERLAPS.items():
        pairs = _shared(root, files.get(first, []), files.get(second, []))
        # Images listed in both train and val are not drawn for training.
        listed = [pair for pair in pairs if second == "val" and pair[0] == pair[1]]
        others = [pair for pair in pairs if second != "val" or pair[0] != pair[1]]
        for some, result in ((listed, "they are used for validation only"), (others, effect)):
            if some:
                one, same = min(some)
                example = same if one == same else f"{same} (the same as {one})"
                example += f" and {len(some) - 1} more" if len(some) > 1 else ""
                images = counted(len(some), "image")
                yield f"{name} has {images} in both {first} and {second}, such as {example}: {result}."


def _shared(root: Path, first: Sequence[Found], second: Sequence[Found]) -> list[tuple[str, str]]:
    """Return pairs of paths, one of each split, that are the same image."""
    paths = {path: path for path, _ in first}
    by_inode = {(stat.st_dev, stat.st_ino): path for path, stat in first if stat.st_ino}
    found: dict[str, str] = {}  # paths in the first split, by those in the second
    others = []
    for path, stat in second:
        if same := paths.get(path) or by_inode.get((stat.st_dev, stat.st_ino)):
            found[path] = same
        else:
            others.append((path, stat))
    found |= _copies(root, first, others)
    return [(one, other) for other, one in found.items()]


def _copies(root: Path, first: Sequence[Found], second: Sequence[Found]) -> dict[str, str]:
    """Return paths of ``first`` of equal contents by paths of ``second``, comparing equal names and few files first."""
    groups: dict[tuple[bool, int, str], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for part, files in enumerate((first, second)):
        for path, stat in files:
            for name in (posixpath.basename(path), ""):
                groups[not name, stat.st_size, name][part].append(path)
    found: dict[str, str] = {}
    left = MAX_COMPARED
    for (_, size, _), pair in sorted(
        groups.items(), key=lambda one: (one[0][0], sum(map(len, one[1])), one[0])
    ):
        if not size or not all(pair) or sum(map(len, pair)) > left:
            continue
        left -= sum(map(len, pair))
        for start in (max(0, size - END), 0):  # the ends of most files differ
            ones, others = ({path: _content(root / path, start) for path in part} for part in pair)
            both = (set(ones.values()) & set(others.values())) - {b""}
            pair = (
                [path for path in ones if ones[path] in both],
                [path for path in others if others[path] in both],
            )
        known = {content: path for path, content in ones.items()}
        found |= {path: known[others[path]] for path in pair[1]}
    return found


def _content(path: Path, start: int) -> bytes:
    """Return the digest of a file's bytes from ``start`` on, b"" of a file that cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read()).digest()
    return b""


def notes_on_classes(
    name: str,
    class_names: Sequence[str],
    splits: Mapping[str, Split],
    where: str = "under class_names of its YAML",
) -> Iterator[str]:
    """Report classes with the same prompt (advice: to name them differently ``where``), or without images in a
    split. Names that differ only by case, underscores, spaces and how letters are composed make the same prompt."""
    read: dict[str, list[str]] = defaultdict(list)
    for class_name in class_names:
        read[in_prompt(class_name)].append(class_name)
    for alike in (names for names in read.values() if len(names) > 1):
        yield (
            f"The classes {abbreviate(alike)} of {name} have the same prompt, which cannot tell them apart; name "
            f"them differently {where}."
        )
    for split, words, effect in (
        ("val", "validation", "what is chosen on the validation images is chosen without them"),
        ("test", "test", "accuracies do not include them"),
    ):
        present = set(splits[split].labels.tolist()) if split in splits else set()
        absent = [one for label, one in enumerate(class_names) if label not in present]
        if present and absent:
            yield f"{name} has no {words} images of {abbreviate(absent)}: {effect}."
