"""ImageNet and its four shifted test sets: class folders are named by WordNet ID, or by number."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

from fastcoop.datasets.class_names import paper_class_names
from fastcoop.datasets.dataset import Item
from fastcoop.datasets.files import abbreviate, class_folders, list_folder, reading
from fastcoop.datasets.splits import SPLIT_SEED, by_class
from fastcoop.errors import MissingFile, UserError

HELD_OUT = 4  # validation images per class, the most that a few-shot validation set has
Reader = Callable[[Path], dict[str, list[Item]]]


def train_and_val(home: Path) -> dict[str, list[Item]]:
    """Read ImageNet: its validation images are the test set; ``HELD_OUT`` training images per class validate.

    The held-out images stay in train, which is the official list; few-shot sampling leaves them out.
    """
    names = wordnet_names(home)
    train, test = (_items(home / "images" / folder, names, f"{folder}/") for folder in ("train", "val"))
    folders = [{path.split("/")[1] for path, _, _ in part} for part in (train, test)]
    if folders[0] != folders[1]:
        odd = sorted(folders[0] ^ folders[1])
        raise UserError(
            f"Expected the same class folders in {home / 'images'}/train and /val; only one has {abbreviate(odd)}."
        )
    rng = random.Random(SPLIT_SEED)
    val = [
        item
        for members in by_class(train)
        for item in rng.sample(members, min(HELD_OUT, max(1, len(members) // 5), len(members) - 1))
    ]
    return {"train": train, "val": val, "test": test}


def shifted(images: str) -> Reader:
    """Return a reader of a test set with folders named by WordNet ID; classes without a folder are left out."""
    return lambda home: {"test": _items(home / images, wordnet_names(home))}


def numbered(images: str) -> Reader:
    """Return a reader of a test set with folders named 0 to 999; classes without a folder are left out."""

    def read(home: Path) -> dict[str, list[Item]]:
        names = list(wordnet_names(home).values())
        folders = list_folder(home / images).folders
        known = {name: names[int(name)] for name in folders if name.isdecimal() and int(name) < len(names)}
        return {"test": _items(home / images, known, key=int)}

    return read


def class_ids(home: Path, items: dict[str, list[Item]]) -> tuple[str, ...]:
    """Return WordNet IDs in label order, from the folders of the test images."""
    folders = {label: path.split("/")[-2] for path, label, _ in reversed(items["test"])}
    ids = list(wordnet_names(home))
    ordered = [folders[label] for label in range(len(folders))]
    return tuple(ids[int(folder)] if folder.isdecimal() else folder for folder in ordered)


READERS: dict[str, Reader] = {
    "imagenet": train_and_val,
    "imagenetv2": numbered("imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": shifted("images"),
    "imagenet_a": shifted("imagenet-a"),
    "imagenet_r": shifted("imagenet-r"),
}
# The class folders of a complete copy, given the dataset's folder.
CLASS_FOLDERS: dict[str, Callable[[Path], list[str]]] = {
    "imagenet": lambda home: [
        f"{split}/{name}" for split in ("train", "val") for name in wordnet_names(home)
    ],
    "imagenetv2": lambda home: [str(label) for label in range(len(wordnet_names(home)))],
    "imagenet_sketch": lambda home: list(wordnet_names(home)),
}


def wordnet_names(home: Path) -> dict[str, str]:
    """Return ImageNet's class names by WordNet ID, in label order.

    They come from ``classnames.txt`` in ``home`` or in ImageNet's own folder beside it, else from ``class_names.json``.

    Raises:
        UserError: A line of ``classnames.txt`` is not an ID and a name.
    """
    for path in (home / "classnames.txt", home.parent / "imagenet" / "classnames.txt"):
        if path.is_file():
            with reading(path, "a list of class names"):
                text = path.read_text(encoding="utf-8-sig")
            names = {}
            for number, line in enumerate(text.splitlines(), start=1):
                folder, _, name = line.strip().partition(" ")
                if name:
                    names[folder] = name
                elif folder:
                    raise UserError(
                        f'{path} line {number}: expected a folder and a class name, got "{line}".'
                    )
            return names
    return _packaged_names()


@functools.cache
def _packaged_names() -> dict[str, str]:
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), paper_class_names()["imagenet"], strict=True))


def _items(
    folder: Path, names: dict[str, str], prefix: str = "", key: Callable[[str], int] | None = None
) -> list[Item]:
    """Return the items of the class folders in ``folder``, labeled in the order of ``key``.

    Args:
        folder: The folder of the class folders.
        names: Class names by folder name.
        prefix: Written before the paths.
        key: Sort key of folder names; None sorts them as text.
    """
    if not folder.is_dir():
        raise MissingFile(f"{folder} is missing; it should hold a folder per class (n01440764, ...).")
    folders = list_folder(folder).folders
    if not folders:
        raise UserError(
            f"{folder} holds no class folders; sort its images into a folder per class (n01440764, ...)."
        )
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise UserError(
            f"{folder} holds folders that are none of ImageNet's 1,000 classes: {abbreviate(unknown)}."
        )
    paths = class_folders(folder, sorted(folders, key=key), prefix)
    return [(path, label, names[name]) for label, name in enumerate(paths) for path in paths[name]]
