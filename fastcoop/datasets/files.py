"""Looking at folders: classes, images, and what is missing. Everything comes back sorted."""

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
SYSTEM_NAMES = {  # left behind by macOS, Windows, Linux, Synology and QNAP, in lower case
    *("__macosx", "icon\r", "network trash folder", "temporary items", "__pycache__"),
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("lost+found", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
}


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is hidden (``.DS_Store``, ``._1.jpg``) or one that systems leave behind."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether a file is taken as an image, told by the ending of its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a file that cannot be read, or is not UTF-8 text, raises into a UserError. kind: what it should be."""
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
    """Names in one folder, sorted; without what ``is_passed_over``, and without few-shot subsets."""

    folders: tuple[str, ...]
    images: tuple[str, ...]
    others: tuple[str, ...]


def list_folder(folder: Path) -> Listing:
    """Names of the folders, images and other files in ``folder``; links count as what they lead to.

    Raises:
        UserError: it cannot be read.
    """
    folders, images, others = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_passed_over(entry.name):
                    continue
                if _is_folder(entry):
                    if not entry.name.endswith(FEWSHOT_FOLDER):
                        folders.append(entry.name)
                elif is_image(entry.name):
                    images.append(entry.name)
                else:
                    others.append(entry.name)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be read ({error.strerror or error}); check that it exists and that you "
            "may read it."
        ) from None
    return Listing(tuple(sorted(folders)), tuple(sorted(images)), tuple(sorted(others)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=not is_image(entry.name))  # links to images need no look at these
    except OSError:  # a link that leads to itself
        return False


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``; hidden ones, few-shot subsets and what systems leave are left out."""
    return list(list_folder(folder).folders)


class Tree:
    """A folder and all below it. Each folder is read once, when it is first asked for.

    Folders and images are named by posix paths relative to ``root``; "" is the root itself.
    """

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, Listing] = {}

    def listing(self, folder: str = "") -> Listing:
        """What lies directly in ``folder``."""
        if folder not in self._listings:
            self._listings[folder] = list_folder(self.root / folder)
        return self._listings[folder]

    def below(self, folder: str = "") -> Iterator[str]:
        """``folder`` and every folder below it, those that links lead to included; each once."""
        seen, waiting = set(), [folder]
        while waiting:
            at = waiting.pop()
            real = os.path.realpath(self.root / at)
            if real not in seen:
                seen.add(real)
                yield at
                waiting += [posixpath.join(at, name) for name in reversed(self.listing(at).folders)]

    def with_images(self, folder: str = "") -> list[str]:
        """Names of the folders in ``folder`` that hold an image, directly or anywhere below."""
        return [
            name for name in self.listing(folder).folders if self.holds_images(posixpath.join(folder, name))
        ]

    def holds_images(self, folder: str) -> bool:
        """Whether there is an image in ``folder`` or anywhere below."""
        return any(self.listing(one).images for one in self.below(folder))

    def image_folder(self, folder: str) -> str:
        """Where the images of the class ``folder`` lie: in it, or in the only folder inside that holds any.

        Raises:
            UserError: there are none, or they lie in several folders.
        """
        at = folder
        while not self.listing(at).images:
            inside = self.with_images(at)
            if len(inside) != 1:
                raise _no_images(self, folder, at, inside)
            at = posixpath.join(at, inside[0])
        return at


def _no_images(tree: Tree, folder: str, at: str, inside: Sequence[str]) -> UserError:
    place = tree.root / folder
    if inside:
        return UserError(
            f"The class folder {place} holds no images itself, but {some([f'{name}/' for name in inside])} in "
            f"{tree.root / at} do; move the images up into {place}, or, if these folders are the classes, pass "
            f"{tree.root / at}."
        )
    files = [posixpath.join(one, name) for one in tree.below(folder) for name in tree.listing(one).others]
    if files:
        return UserError(
            f"Class folder {place} holds no images, only files such as {files[0]}; expected names that end in "
            ".jpg, .png or another known ending. Convert or rename the images, or move the folder elsewhere."
        )
    return UserError(f"Class folder {place} holds no images; add some or remove the folder.")


def class_folders(folder: Path, names: Sequence[str], prefix: str = "") -> dict[str, list[str]]:
    """Paths ``{prefix}{name}/{file}`` of the images in each class folder.

    Raises:
        UserError: a class folder without images.
    """
    tree, images = Tree(folder), {}
    for name in names:
        files = tree.listing(name).images
        if not files:
            raise _no_images(tree, name, name, tree.with_images(name))
        images[name] = [f"{prefix}{name}/{file}" for file in files]
    return images


def normalized(text: str) -> str:
    """Unicode's composed form (NFC): macOS may write e and its accent as two characters, others as one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def find_images(root: Path, paths: Iterable[str], inside: bool = True) -> dict[str, str | None]:
    """Where images lie, as posix paths relative to ``root``; None for those that do not exist.

    A path is taken as it is written where that exists; else without space around it, with backslashes as
    separators, or with its letters composed otherwise, if one file fits. Each folder is read once.

    inside: whether a path that leaves ``root``, by its first or another part, counts as missing.
    """
    listings: dict[str, dict[str, list[str]]] = {}

    def names_in(folder: str) -> dict[str, list[str]]:
        """{name, and normalized name: names}"""
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

    def composed_otherwise(path: str) -> str | None:
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
            found[path] = next(filter(None, map(composed_otherwise, forms)), None)
    return found


def some(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 7 more``: enough of a list to act on."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
