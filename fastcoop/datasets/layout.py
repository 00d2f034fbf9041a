"""Where the class folders of a folder of pictures lie, and which folders are its splits."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastcoop.datasets.files import Tree, some
from fastcoop.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
FORMS = (
    "train/ and test/ (or val/) folders with a folder per class, or a folder per class, or a split.json "
    "in the official format"
)


def split_called(name: str) -> str | None:
    """ "train", "val" or "test" for what people call them, in any case; None for other names."""
    return _SPLIT_OF.get(name.strip().lower())


@dataclass(frozen=True)
class Layout:
    """Attributes:
    at: the folder, relative to the tree's root, that holds the class folders or those of the splits.
    splits: split -> the name of its folder; {} for a folder per class.
    """

    at: str
    splits: Mapping[str, str]


def find_layout(tree: Tree, is_described: Sequence[str]) -> Layout:
    """The layout of a folder, through folders that hold nothing but one other folder with images.

    is_described: names of files that make a folder a dataset of its own; it is not looked further into then.

    Raises:
        UserError: folders of splits beside other folders with images, or without class folders.
    """
    at = ""
    while True:
        splits = _splits(tree, at)
        inside = tree.with_images(at)
        if splits or len(inside) != 1 or tree.listing(posixpath.join(at, inside[0])).images:
            return Layout(at, splits)
        at = posixpath.join(at, inside[0])
        if any(file in tree.listing(at).others for file in is_described):
            return Layout(at, {})


def class_level(tree: Tree, folder: str) -> str:
    """The folder of a split's class folders: itself, or the only folder inside that holds any images."""
    at = folder
    while len(inside := tree.with_images(at)) == 1 and not tree.listing(posixpath.join(at, inside[0])).images:
        deeper = posixpath.join(at, inside[0])
        if len(tree.with_images(deeper)) < 2:  # the folder inside the only class
            return at
        at = deeper
    return at


def _has_classes(tree: Tree, folder: str, inside: Sequence[str]) -> bool:
    """Whether a folder beside others holds class folders rather than the images of one class."""
    deeper = sum(len(tree.listing(posixpath.join(folder, name)).images) for name in inside)
    return len(inside) > 1 and deeper > len(tree.listing(folder).images)


def _splits(tree: Tree, at: str) -> dict[str, str]:
    """Folders of ``at`` that are splits, told by their names and by the class folders inside."""
    inside = tree.with_images(at)
    named = [name for name in inside if split_called(name)]
    others = [name for name in inside if not split_called(name)]
    classes = {name: tree.with_images(posixpath.join(at, name)) for name in named}
    place = tree.root / at
    if not named:
        return {}
    if others and not any(_has_classes(tree, posixpath.join(at, name), classes[name]) for name in named):
        return {}  # classes, one of which is called train
    if others:
        raise UserError(
            f"{place} has a {named[0]}/ folder but also {some([f'{name}/' for name in others])} beside it, which "
            f"hold images too; expected {FORMS}. Move what is no split elsewhere."
        )
    flat = [name for name in named if not classes[name]]
    if flat:
        with_classes = [name for name in named if classes[name]]
        instead = (
            f", or pass {place / with_classes[0]}, which is split at random" if len(with_classes) == 1 else ""
        )
        raise UserError(
            f"The folder {place / flat[0]} holds images but no class folders; sort them into a folder per class"
            f"{instead}; for pictures that lie side by side write a .csv with the columns path, class, split."
        )
    splits: dict[str, str] = {}
    taken = {split_called(name) for name in named}
    for name in named:
        split = split_called(name)
        assert split is not None
        if name.lower() in ("eval", "evaluation") and any(
            other.lower() in ("test", "testing") for other in named
        ):
            split = "val" if "val" not in taken else split
        if split in splits:
            raise UserError(
                f"{place} has two folders for {split}, {splits[split]}/ and {name}/; put their images into one of "
                "them, or move one elsewhere."
            )
        splits[split] = name
    return splits
