"""Folders of images: class folders, images, and what is missing. Everything is sorted."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastcoop.errors import UserError

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


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Raise a UserError where ``path``, which should be ``kind``, cannot be read or is not UTF-8 text."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); check that you may read it, and the disk."
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8 text; save it as UTF-8, or get it again if it is not {kind}."
        ) from None


@dataclass(frozen=True)
class Listing:
    """Names in one folder, sorted, without hidden files, ``SYSTEM_NAMES`` and few-shot subsets."""

    folders: tuple[str, ...]
    images: tuple[str, ...]
    others: tuple[str, ...]


def list_folder(folder: Path) -> Listing:
    """List the folders, images and other files in ``folder``; links count as what they lead to.

    Raises:
        UserError: The folder cannot be read.
    """
    folders: list[str] = []
    images: list[str] = []
    others: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.lower() in SYSTEM_NAMES:
                    continue
                is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                if _is_folder(entry, follow_links=not is_image):
                    if not name.endswith(FEWSHOT_FOLDER):
                        folders.append(name)
                else:
                    (images if is_image else others).append(name)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be read ({error.strerror or error}); check that it exists and that you "
            "may read it."
        ) from None
    return Listing(tuple(sorted(folders)), tuple(sorted(images)), tuple(sorted(others)))


def _is_folder(entry: os.DirEntry[str], follow_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError:  # a link that leads to itself
        return False


class Tree:
    """A folder and all below it. Each folder is read once, when it is first needed.

    Folders and images are named by posix paths relative to ``root``; "" is the root itself.
    """

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, Listing] = {}

    def listing(self, folder: str = "") -> Listing:
        """Return the names in ``folder``."""
        if folder not in self._listings:
            self._listings[folder] = list_folder(self.root / folder)
        return self._listings[folder]

    def below(self, folder: str = "") -> Iterator[str]:
        """Yield ``folder`` and every folder below it, through links too; each once."""
        seen, waiting = set(), [folder]
        while waiting:
            at = waiting.pop()
            real = os.path.realpath(self.root / at)
            if real not in seen:
                seen.add(real)
                yield at
                waiting += [posixpath.join(at, name) for name in reversed(self.listing(at).folders)]

    def images(self, folder: str = "") -> Iterator[str]:
        """Yield the paths of the images in ``folder`` and below."""
        return (posixpath.join(at, name) for at in self.below(folder) for name in self.listing(at).images)

    def others(self, folder: str = "") -> Iterator[str]:
        """Yield the paths of the other files in ``folder`` and below."""
        return (posixpath.join(at, name) for at in self.below(folder) for name in self.listing(at).others)

    def with_images(self, folder: str = "") -> list[str]:
        """Return the names of the folders in ``folder`` with an image in them or below."""
        names = self.listing(folder).folders
        return [name for name in names if any(self.images(posixpath.join(folder, name)))]

    def image_folder(self, folder: str) -> str:
        """Return where the images of the class ``folder`` are: in it, or in the only folder inside with any.

        Raises:
            UserError: There are none, or they are in several folders.
        """
        at = folder
        while not self.listing(at).images:
            inside = self.with_images(at)
            if len(inside) != 1:
                raise self._no_images(folder, at, inside)
            at = posixpath.join(at, inside[0])
        return at

    def _no_images(self, folder: str, at: str, inside: Sequence[str]) -> UserError:
        place = self.root / folder
        if inside:
            return UserError(
                f"The class folder {place} holds no images itself, but {abbreviate([f'{name}/' for name in inside])} "
                f"in {self.root / at} do; move the images up into {place}, or, if these folders are the classes, pass "
                f"{self.root / at}."
            )
        if other := next(self.others(folder), None):
            return UserError(
                f"Class folder {place} holds no images, only files such as {other}; expected names that end in "
                ".jpg, .png or another known ending. Convert or rename the images, or move the folder elsewhere."
            )
        return UserError(f"Class folder {place} holds no images; add some or remove the folder.")


def class_folders(folder: Path, names: Sequence[str], prefix: str = "") -> dict[str, list[str]]:
    """Return the paths ``{prefix}{name}/{file}`` of the images in each class folder.

    Raises:
        UserError: A class folder has no images.
    """
    tree, images = Tree(folder), {}
    for name in names:
        images[name] = [f"{prefix}{name}/{file}" for file in tree.listing(name).images]
        if not images[name]:
            raise tree._no_images(name, name, tree.with_images(name))
    return images


def normalized(text: str) -> str:
    """Return Unicode's composed form (NFC): macOS may write e and its accent as two characters, others as one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def find_images(root: Path, paths: Iterable[str], inside: bool = True) -> dict[str, str | None]:
    """Find images: posix paths relative to ``root``, or None where they do not exist, by path.

    A path is used as it is written where that exists; else without space around it, with backslashes as separators,
    or with its letters composed differently, if one file fits. Each folder is read once.

    Args:
        root: The folder that the paths are relative to.
        paths: Paths as they are written.
        inside: Whether a path that leaves ``root`` counts as missing.
    """
    listings: dict[str, dict[str, list[str]]] = {}

    def names_in(folder: str) -> dict[str, list[str]]:
        """Return the names in a folder by their normalized form."""
        if folder not in listings:
            found: dict[str, list[str]] = {}
            leaves = inside and (folder.startswith("/") or ".." in folder.split("/"))
            try:
                names = [] if leaves else os.listdir(root / folder)
            except (OSError, ValueError):  # the latter for characters that no path can have
                names = []
            for name in names:
                found.setdefault(normalized(name), []).append(name)
            listings[folder] = found
        return listings[folder]

    def exists(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in names_in(folder).get(normalized(name), ())

    def composed_differently(path: str) -> str | None:
        at = "/" if path.startswith("/") else ""
        for part in path.strip("/").split("/"):
            fitting = names_in(at).get(normalized(part), []) if part != ".." else [part]
            if len(fitting) != 1 and part not in fitting:
                return None
            at = posixpath.join(at, part if part in fitting else fitting[0])
        return at

    found: dict[str, str | None] = {}
    for path in paths:
        forms = [path, path.strip(), path.replace("\\", "/"), path.strip().replace("\\", "/")]
        forms = [posixpath.normpath(form) for form in dict.fromkeys(forms)]
        found[path] = next((form for form in forms if exists(form)), None)
        if found[path] is None and not path.isascii():
            found[path] = next(filter(None, map(composed_differently, forms)), None)
    return found


def abbreviate(names: Sequence[str], most: int = 3) -> str:
    """Return ``a, b, c and 7 more``, the beginning of a list."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
