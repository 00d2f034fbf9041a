"""The layout of a folder of pictures: where its class folders are, and which folders are its splits."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastcoop.datasets.files import Tree, abbreviate
from fastcoop.errors import UserError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
FORMS = (
    "train/ and test/ (or val/) folders with a folder per class, or a folder per class, or a split.json "
    "in the official format"
)


def split_called(name: str) -> str | None:
    """Return "train", "val" or "test" for their usual names, in any case; None for other names."""
    return SPLIT_NAMES.get(name.strip().lower())


@dataclass(frozen=True)
class Layout:
    """Where the classes of a folder are.

    Attributes:
        at: The folder that holds the class folders or those of the splits, relative to the tree's root.
        splits: The name of each split's folder; {} for a folder per class.
    """

    at: str
    splits: Mapping[str, str]


def find_layout(tree: Tree, descriptions: Sequence[str]) -> Layout:
    """Find the layout of a folder, through folders that hold nothing but one other folder with images.

    Args:
        tree: The folder.
        descriptions: Names of files that make a folder inside a dataset of its own, which is not searched further.

    Raises:
        UserError: There are folders of splits beside other folders with images, or without class folders.
    """
    at = ""
    while True:
        splits = _find_splits(tree, at)
        inside = tree.with_images(at)
        if splits or len(inside) != 1 or tree.listing(posixpath.join(at, inside[0])).images:
            return Layout(at, splits)
        at = posixpath.join(at, inside[0])
        if not set(descriptions).isdisjoint(tree.listing(at).others):
            return Layout(at, {})


def class_level(tree: Tree, folder: str) -> str:
    """Return the folder of a split's class folders: itself, or the only folder inside with images."""
    at = folder
    while len(inside := tree.with_images(at)) == 1 and not tree.listing(posixpath.join(at, inside[0])).images:
        deeper = posixpath.join(at, inside[0])
        if len(tree.with_images(deeper)) < 2:  # the folder inside the only class
            return at
        at = deeper
    return at


def _has_classes(tree: Tree, folder: str) -> bool:
    """Whether a folder beside others holds class folders rather than the images of one class."""
    inside = tree.with_images(folder)
    deeper = sum(len(tree.listing(posixpath.join(folder, name)).images) for name in inside)
    return len(inside) > 1 and deeper > len(tree.listing(folder).images)


def _find_splits(tree: Tree, at: str) -> dict[str, str]:
    """Find the folders in ``at`` that are splits, by their names and the class folders inside."""
    inside = tree.with_images(at)
    named = {name: split for name in inside if (split := split_called(name))}
    others = [f"{name}/" for name in inside if name not in named]
    place = tree.root / at
    if not named or (others and not any(_has_classes(tree, posixpath.join(at, name)) for name in named)):
        return {}  # class folders, one of which may be called train
    if others:
        raise UserError(
            f"{place} has a {next(iter(named))}/ folder but also {abbreviate(others)} beside it, which "
            f"hold images too; expected {FORMS}. Move what is no split elsewhere."
        )
    with_classes = [name for name in named if tree.with_images(posixpath.join(at, name))]
    flat = next((name for name in named if name not in with_classes), None)
    if flat is not None:
        instead = (
            f", or pass {place / with_classes[0]}, which is split at random" if len(with_classes) == 1 else ""
        )
        raise UserError(
            f"The folder {place / flat} holds images but no class folders; sort them into a folder per class"
            f"{instead}; for pictures that lie side by side write a .csv with the columns path, class, split."
        )
    is_test = {name for name in named if name.lower() in ("test", "testing")}
    splits: dict[str, str] = {}
    for name, split in named.items():
        if split == "test" and is_test and name not in is_test and "val" not in named.values():
            split = "val"  # eval/ beside test/
        if split in splits:
            raise UserError(
                f"{place} has two folders for {split}, {splits[split]}/ and {name}/; put their images into one of "
                "them, or move one elsewhere."
            )
        splits[split] = name
    return splits
