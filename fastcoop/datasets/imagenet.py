"""ImageNet and its four shifted test sets: classes are folders named by WordNet ID, or by number."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

from fastcoop.datasets.class_names import paper_class_names
from fastcoop.datasets.dataset import Item
from fastcoop.datasets.files import class_folders, list_folders, reading, some
from fastcoop.datasets.splits import SPLIT_SEED
from fastcoop.errors import MissingFile, UserError

HELD_OUT = 4  # validation images per class: what a few-shot validation set has at most


def train_and_val(home: Path) -> dict[str, list[Item]]:
    """ImageNet: its validation set is the test set; ``HELD_OUT`` training images per class validate.

    The held-out images stay listed in train, which is the official list; few-shot sampling leaves them out.
    """
    names = wordnet_names(home)
    items = {
        split: _wordnet_folders(home / "images" / folder, names, f"{folder}/")
        for split, folder in (("train", "train"), ("test", "val"))
    }
    folders = [{path.split("/")[1] for path, _, _ in items[split]} for split in ("train", "test")]
    if folders[0] != folders[1]:
        odd = sorted(folders[0] ^ folders[1])
        raise UserError(
            f"Expected the same class folders in {home / 'images'}/train and /val; only one has {some(odd)}."
        )
    items["val"] = _hold_out(items["train"])
    return items


def shifted(images: str) -> Callable[[Path], dict[str, list[Item]]]:
    """A test set of folders named by WordNet ID; only the classes present are candidates."""
    return lambda home: {"test": _wordnet_folders(home / images, wordnet_names(home))}


def numbered(images: str) -> Callable[[Path], dict[str, list[Item]]]:
    """A test set of folders named 0 to 999, by ImageNet's label; only the classes present are candidates."""

    def read(home: Path) -> dict[str, list[Item]]:
        names = list(wordnet_names(home).values())
        folders = list_folders(home / images)
        wrong = [folder for folder in folders if not (folder.isdecimal() and int(folder) < len(names))]
        if wrong:
            raise UserError(f"{home / images} must hold folders 0 to {len(names) - 1}, found {some(wrong)}.")
        folders.sort(key=int)
        return {"test": _items(home / images, folders, [names[int(folder)] for folder in folders])}

    return read


def class_ids(home: Path, items: dict[str, list[Item]]) -> tuple[str, ...]:
    """WordNet IDs in label order, from the folders that the test images lie in."""
    folders = {label: path.split("/")[-2] for path, label, _ in reversed(items["test"])}
    ids = list(wordnet_names(home))
    ordered = [folders[label] for label in range(len(folders))]
    return tuple(ids[int(folder)] if folder.isdecimal() else folder for folder in ordered)


def wordnet_folders(home: Path) -> list[str]:
    """The 1,000 class folders of a complete copy."""
    return list(wordnet_names(home))


def folders_of_train_and_val(home: Path) -> list[str]:
    """The 2,000 class folders of a complete ImageNet."""
    return [f"{split}/{folder}" for split in ("train", "val") for folder in wordnet_names(home)]


def numbered_folders(home: Path) -> list[str]:
    """The class folders of a complete ImageNetV2."""
    return [str(label) for label in range(len(wordnet_names(home)))]


def wordnet_names(home: Path) -> dict[str, str]:
    """ImageNet's class names by WordNet ID, in label order.

    They come from ``classnames.txt`` in ``home`` or in ImageNet's own folder beside it, else from ``class_names.json``.

    Raises:
        UserError: a line of ``classnames.txt`` is not an ID and a name.
    """
    for path in (home / "classnames.txt", home.parent / "imagenet" / "classnames.txt"):
        if path.is_file():
            names = {}
            with reading(path, "a list of class names"):
                text = path.read_text(encoding="utf-8-sig")
            for number, line in enumerate(text.splitlines(), start=1):
                folder, _, name = line.strip().partition(" ")
                if not name and line.strip():
                    raise UserError(
                        f'{path} line {number}: expected a folder and a class name, got "{line}".'
                    )
                if name:
                    names[folder] = name
            return names
    return _packaged_names()


@functools.cache
def _packaged_names() -> dict[str, str]:
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), paper_class_names()["imagenet"], strict=True))


def _wordnet_folders(folder: Path, names: dict[str, str], prefix: str = "") -> list[Item]:
    if not folder.is_dir():
        raise MissingFile(f"{folder} is missing; it should hold a folder per class (n01440764, ...).")
    folders = list_folders(folder)
    if not folders:
        raise UserError(
            f"{folder} holds no class folders; sort its images into a folder per class (n01440764, ...)."
        )
    unknown = [wordnet_id for wordnet_id in folders if wordnet_id not in names]
    if unknown:
        raise UserError(f"{folder} holds folders that are none of ImageNet's 1,000 classes: {some(unknown)}.")
    return _items(folder, folders, [names[wordnet_id] for wordnet_id in folders], prefix)


def _items(folder: Path, folders: list[str], names: list[str], prefix: str = "") -> list[Item]:
    paths = class_folders(folder, folders, prefix)
    return [(path, label, names[label]) for label, name in enumerate(folders) for path in paths[name]]


def _hold_out(train: list[Item]) -> list[Item]:
    rng = random.Random(SPLIT_SEED)
    by_class: dict[int, list[Item]] = {}
    for item in train:
        by_class.setdefault(item[1], []).append(item)
    return [
        item
        for members in by_class.values()
        for item in rng.sample(members, min(HELD_OUT, max(1, len(members) // 5), len(members) - 1))
    ]
