"""Pictures in a dataset's folder that are not used, or that may be masks: counted, and said in a sentence each."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastcoop.datasets.files import Tree, some

# Endings of pictures that not every Pillow can decode; files of other endings are told by how they begin.
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


def notes_on_left_out(name: str, tree: Tree, used: Iterable[str]) -> Iterator[str]:
    """Sentences on the pictures below ``tree.root`` that are not among ``used`` (paths relative to it)."""
    taken = set(used)
    deeper = [
        path
        for folder in tree.below()
        for image in tree.listing(folder).images
        if (path := posixpath.join(folder, image)) not in taken
    ]
    if deeper:
        yield (
            f"{name} leaves out {len(deeper)} image(s) that lie beside or below its class folders, such as "
            f"{some(deeper, 1)}; move them into a class folder to use them, or list them in a CSV."
        )
    yield from notes_on_unknown_endings(name, tree)


def notes_on_unknown_endings(name: str, tree: Tree) -> Iterator[str]:
    """A sentence on the pictures below ``tree.root`` whose names do not end as those of images do."""
    unknown = [
        path
        for folder in tree.below()
        for other in tree.listing(folder).others
        if is_picture(tree.root / (path := posixpath.join(folder, other)))
    ]
    if unknown:
        yield (
            f"{name} leaves out {len(unknown)} picture(s) because of how their names end, such as "
            f"{some(unknown, 1)}; let the names of JPEG files end in .jpg, and save other kinds as .jpg or .png."
        )


def is_picture(path: Path) -> bool:
    """Whether a file without a known ending is a picture, by its ending or its first bytes."""
    if path.suffix.lower() in OTHER_PICTURES:
        return True
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            return MAGIC.match(file.read(16)) is not None
    except OSError:
        return False


def notes_on_masks(name: str, paths: Iterable[str]) -> Iterator[str]:
    """A sentence on images that lie beside another of the same name but for the ending, or for a word such as mask."""
    stems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        folder, file = posixpath.split(path)
        stems[folder, os.path.splitext(file)[0]].append(path)
    pairs = []
    folders = sorted(
        {folder for folder, _ in stems if re.fullmatch(WORDS, posixpath.basename(folder), re.IGNORECASE)}
    )
    if folders:
        yield f"{name} has a class folder {folders[0]}/; if it holds masks, move it elsewhere."
    for (folder, stem), alike in stems.items():
        pairs += [(first, other) for first in sorted(alike)[:1] for other in sorted(alike)[1:]]
        match = MASK.fullmatch(stem)
        if match and (folder, match[1]) in stems:
            pairs += [(stems[folder, match[1]][0], one) for one in alike]
    if pairs:
        first, other = min(pairs)
        yield (
            f"{name} uses {len(pairs)} image(s) that have the name of another one but for its ending or a word such as "
            f'"mask", such as {first} and {other}; if these are masks or copies, move them out of the class folders.'
        )
