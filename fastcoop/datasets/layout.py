"""Folders of images as people have them, read into items by split.

| what a folder holds | its splits |
|---|---|
| ``split.json``, and images in ``images/`` or in the folder | those of the file |
| ``train/cat/``, ``val/cat/``, ``test/cat/``, under any of ``SPLIT_NAMES``; val or test may be missing | the folders |
| ``cat/``, ``dog/`` | none: `ALL` |
| one other folder with images, and no images of its own | those of that folder |

The images of a class may be in a folder inside the class's own, if that is the only one.
"""

from __future__ import annotations

import os
import posixpath
import re
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastcoop.datasets.dataset import SPLITS, Items
from fastcoop.datasets.files import Tree, abbreviate, normalized
from fastcoop.datasets.notes import notes_on_pictures
from fastcoop.datasets.splits import class_items, find_items, read_items
from fastcoop.errors import UserError

ALL = "all"  # the split of images that have none
SPLIT_FILE = "split.json"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SUFFIX = re.compile(r"(?<=.)[ _-]?(?:set|data|images)$")
FORMS = (
    "train/ and test/ (or val/) folders with a folder per class, or a folder per class, or a split.json "
    "in the official format"
)
USE_CSV = "for pictures that lie side by side write a .csv with the columns path, class, split, and load that"


class Content(NamedTuple):
    """What a folder or CSV contains: items with paths relative to ``root``, and notes.

    ``home`` is the folder or CSV whose YAML describes it: the one that was read, or a folder inside.
    """

    home: Path
    root: Path
    items: Items
    notes: list[str]


def split_called(name: str) -> str | None:
    """Return "train", "val" or "test" for their usual names, in any case, such as "Test_Set"; None for other names."""
    return SPLIT_NAMES.get(_stem(name))


def _stem(name: str) -> str:
    return SUFFIX.sub("", name.strip().lower())


def is_described(folder: Path) -> bool:
    """Return whether a folder is a dataset of the user's own, whatever its name: it has a YAML or a split file."""
    return any(os.path.isfile(folder / file) for file in (SPLIT_FILE, "dataset.yaml", "dataset.yml"))


def read_folder(folder: Path) -> Content:
    """Read a folder in one of the layouts above; a UserError says what is wrong with another."""
    file, root = folder / SPLIT_FILE, folder / "images"
    if file.is_file():
        items, root = read_items(file), root if root.is_dir() else folder
        if "test" not in items and "val" not in items:
            raise UserError(f'{file} has no "test" split, nor "val"; add one of them.')
        return Content(folder, root, find_items(items, root, file), [])
    tree, at = Tree(folder), ""
    while not (splits := _find_splits(tree, at)) and (inner := _only_folder(tree, at)):
        at = inner
        if is_described(folder / at):
            return read_folder(folder / at)
    items = _read_classes(Tree(folder / at), splits)
    paths = [path for path, _, _ in chain(*items.values())]
    return Content(folder, folder / at, items, list(notes_on_pictures(str(folder), tree, at, paths)))


def _read_classes(tree: Tree, splits: dict[str, str]) -> Items:
    """Return the images of class folders by split; classes are numbered in sorted order.

    Class folders of two splits whose names differ in how letters are composed are the same class.
    """
    root = tree.root
    if splits and not {"test", "val"} & splits.keys():
        train = splits["train"]
        raise UserError(
            f"{root} has a {train}/ folder but no test/ folder beside it, nor val/, that holds images; expected "
            f"{FORMS}. Add one, or pass {root / train}, which is split at random."
        )
    places = {key: _class_level(tree, splits[key]) for key in SPLITS if key in splits} or {ALL: ""}
    folders = {key: tree.listing(place).folders for key, place in places.items()}
    if not any(folders.values()):
        raise UserError(f"{root} has no classes: expected {FORMS}; {USE_CSV}.")
    is_unique = all(len(set(map(normalized, names))) == len(names) for names in folders.values())
    form = normalized if is_unique else str
    shown: dict[str, str] = {}
    for name in chain(*folders.values()):
        shown.setdefault(form(name), name)
    labels = {name: label for label, name in enumerate(sorted(shown.values()))}
    items: Items = {}
    for key, names in folders.items():
        classes = [(posixpath.join(places[key], name), shown[form(name)]) for name in names]
        items[key] = class_items(tree, ((at, labels[name], name) for at, name in classes), nested=True)
    return items


def _only_folder(tree: Tree, folder: str) -> str:
    """Return the path of the only folder in ``folder`` with images below it, unless it holds some itself; else ""."""
    inside = tree.with_images(folder)
    inner = posixpath.join(folder, inside[0]) if len(inside) == 1 else ""
    return "" if inner and tree.listing(inner).images else inner


def _class_level(tree: Tree, split: str) -> str:
    """Return the folder of a split's class folders: itself, or the only folder inside with several."""
    at = split
    while inner := _only_folder(tree, at):
        at = inner
    return at if len(tree.with_images(at)) > 1 else split


def _has_classes(tree: Tree, folder: str) -> bool:
    """Whether a folder beside others holds class folders rather than the images of one class."""
    inside = tree.with_images(folder)
    deeper = sum(len(tree.listing(posixpath.join(folder, name)).images) for name in inside)
    return len(inside) > 1 and deeper > len(tree.listing(folder).images)


def _find_splits(tree: Tree, at: str) -> dict[str, str]:
    """Find the folders in ``at`` that are splits, by their names and the class folders inside."""
    inside, place = tree.with_images(at), tree.root / at
    named = {name: split for name in inside if (split := split_called(name))}
    others = [f"{name}/" for name in inside if name not in named]
    if not named or (others and not any(_has_classes(tree, posixpath.join(at, name)) for name in named)):
        return {}  # class folders, one of which may be called train
    if others:
        raise UserError(
            f"{place} has a {next(iter(named))}/ folder but also {abbreviate(others)} beside it, which "
            f"hold images too; expected {FORMS}. Move what is no split elsewhere."
        )
    with_classes = [name for name in named if tree.with_images(posixpath.join(at, name))]
    if flat := next((name for name in named if name not in with_classes), None):
        instead = (
            f", or pass {place / with_classes[0]}, which is split at random" if len(with_classes) == 1 else ""
        )
        raise UserError(
            f"The folder {place / flat} holds images but no class folders; sort them into a folder per class"
            f"{instead}; {USE_CSV}."
        )
    has_test = any(_stem(name) in ("test", "testing") for name in named)
    splits: dict[str, str] = {}
    for name, split in named.items():
        if has_test and _stem(name).startswith("eval") and "val" not in named.values():
            split = "val"
        if split in splits:
            pair = f"{splits[split]}/ and {name}/"
            raise UserError(
                f"{place} has two folders for {split}, {pair}; merge them, or move one elsewhere."
            )
        splits[split] = name
    return splits
