"""Folders of images: the names in a folder, the images below it, and images by path. Everything is sorted."""

from __future__ import annotations

import csv
import functools
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fastcoop.errors import UserError, abbreviate
from fastcoop.files import reading

# The same on every machine, since which files are images decides how a folder is split at random.
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif"),
}
FEWSHOT_FOLDER = "split_fewshot"
SYSTEM_NAMES = {  # made by macOS, Windows, Linux, Synology and QNAP, in lower case
    *("__macosx", "icon\r", "network trash folder", "temporary items", "__pycache__"),
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("lost+found", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
}


def read_csv(
    path: Path, columns: Sequence[str], required: Sequence[str], form: str
) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Return the columns of a CSV with a header, and its rows by line number.

    None of the known ``columns`` may be there twice. Those ``required`` must be there, and not be empty in any row.
    ``form`` is what is expected, for the message.
    """
    rows: dict[int, dict[str, str]] = {}
    try:
        with reading(path, "a CSV"), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = found = [name.strip().lower() for name in reader.fieldnames or []]
            for column in columns:
                if found.count(column) > 1:
                    raise UserError(f'{path} line 1 names the column "{column}" twice; rename one of them.')
                if column in required and column not in found:
                    raise UserError(
                        f"{path} line 1: expected {form}; got {abbreviate(found, 8)}. "
                        f'Name one of its columns "{column}".'
                    )
            for row in reader:
                line = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{line} does not have the {len(found)} columns of line 1.")
                if empty := [column for column in required if not row[column].strip()]:
                    raise UserError(f"{line} has an empty {empty[0]}.")
                rows[reader.line_num] = row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num} is not valid CSV: {error}.") from None
    return found, rows


class Listing(NamedTuple):
    """Names in one folder, sorted, without hidden files, ``SYSTEM_NAMES`` and few-shot subsets."""

    folders: list[str]
    images: list[str]
    others: list[str]


class Tree:
    """A folder and all below it. Each folder is read once, when it is first needed.

    Folders and images are named by posix paths relative to ``root``; "" is the root itself.
    """

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, Listing] = {}

    def listing(self, folder: str = "") -> Listing:
        """Return the names in ``folder``; links are followed."""
        if folder in self._listings:
            return self._listings[folder]
        found = Listing([], [], [])
        with reading(self.root / folder, "a folder"), os.scandir(self.root / folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.lower() in SYSTEM_NAMES:
                    continue
                is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                # entry.is_dir() would raise an exception for a link that leads to itself.
                is_folder_link = entry.is_symlink() and not is_image and os.path.isdir(entry.path)
                if not (is_folder_link or entry.is_dir(follow_symlinks=False)):
                    (found.images if is_image else found.others).append(name)
                elif not name.endswith(FEWSHOT_FOLDER):
                    found.folders.append(name)
        for names in found:
            names.sort()
        return self._listings.setdefault(folder, found)

    def paths(self, kind: Literal["images", "others"], folder: str = "") -> Iterator[str]:
        """Yield the paths of the images, or of the other files, in ``folder`` and below; each folder once."""
        seen, waiting = set(), [folder]
        while waiting:
            at = waiting.pop()
            real = os.path.realpath(self.root / at)
            if real not in seen:
                seen.add(real)
                listing = self.listing(at)
                yield from (posixpath.join(at, name) for name in getattr(listing, kind))
                waiting += [posixpath.join(at, name) for name in reversed(listing.folders)]

    def with_images(self, folder: str = "") -> list[str]:
        """Return the names of the folders in ``folder`` with an image in them or below."""
        names = self.listing(folder).folders
        return [name for name in names if any(self.paths("images", posixpath.join(folder, name)))]

    def image_folder(self, folder: str, nested: bool = True) -> str:
        """Return where the images of the class ``folder`` are: in it or, if ``nested``, in the only folder inside."""
        at, place = folder, self.root / folder
        while not self.listing(at).images:
            inside = self.with_images(at)
            if len(inside) == 1 and nested:
                at = posixpath.join(at, inside[0])
            elif inside:
                raise UserError(
                    f"The class folder {place} holds no images, but {abbreviate([f'{name}/' for name in inside])} "
                    f"in {self.root / at} do; move the images up into {place}, or, if these folders are the classes, "
                    f"pass {self.root / at}."
                )
            elif other := next(self.paths("others", folder), None):
                raise UserError(
                    f"The class folder {place} holds no images, only files such as {other}; expected names that "
                    "end in .jpg, .png or another known ending. Convert or rename the images, or move the folder "
                    "elsewhere."
                )
            else:
                raise UserError(f"The class folder {place} holds no images; add some or remove the folder.")
        return at


def normalized(text: str) -> str:
    """Return Unicode's composed form (NFC): macOS may write e and its accent as two characters, others as one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def in_prompt(class_name: str) -> str:
    """Return what a prompt can tell of a class name: not case, underscores, spaces, or how letters are composed."""
    return " ".join(normalized(class_name).replace("_", " ").lower().split())


def find_images(root: Path, paths: Iterable[str], inside: bool = True) -> dict[str, str | None]:
    """Find images: posix paths relative to ``root``, or None where they do not exist, by path.

    Each path is tried as it is written, without space around it, and with backslashes as separators. Letters that are
    composed differently match if exactly one name fits. If ``inside``, a path that leaves ``root`` counts as missing.
    """

    @functools.cache
    def names_in(folder: str) -> dict[str, list[str]]:
        """Return the names in a folder by their normalized form."""
        names: dict[str, list[str]] = {}
        try:
            for name in os.listdir(root / folder):
                names.setdefault(normalized(name), []).append(name)
        except (OSError, ValueError):  # the latter for characters that no path can have
            return {}
        return names

    def child(folder: str, name: str) -> str | None:
        alike = names_in(folder).get(normalized(name), []) if name != ".." else [name]
        if name in alike:
            return posixpath.join(folder, name)
        return posixpath.join(folder, alike[0]) if len(alike) == 1 else None

    @functools.cache
    def on_disk(folder: str) -> str | None:
        found: str | None = "/" if folder.startswith("/") else ""
        for name in filter(None, folder.split("/")):
            found = None if found is None else child(found, name)
        return found

    def find(path: str) -> str | None:
        written = path, path.strip()
        for form in dict.fromkeys((*written, *(one.replace("\\", "/") for one in written))):
            form = posixpath.normpath(form)
            folder, name = posixpath.split(form)
            leaves = form.startswith("/") or form.split("/")[0] == ".."
            place = None if inside and leaves else on_disk(folder)
            if place is not None and name != ".." and (image := child(place, name)):
                return image
        return None

    return {path: find(path) for path in paths}
