"""Datasets of the user's own: a CSV, or a folder of images as people have them, read into items by split.

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
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastcoop import escape
from fastcoop.datasets import splits as rules
from fastcoop.datasets.dataset import SPLITS, Dataset, Items, make_dataset
from fastcoop.datasets.files import FEWSHOT_FOLDER, Tree, find_images, normalized, read_csv
from fastcoop.datasets.names import WORDNET_ID, DatasetConfig, read_config, suggest_names
from fastcoop.datasets.notes import notes_on_classes, notes_on_overlap, notes_on_pictures
from fastcoop.errors import UserError, abbreviate, nearest

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
    """What a folder or CSV contains: items with paths relative to ``root``, and notes. ``home`` is the folder or CSV
    whose YAML describes it: the one that was read, or a folder inside."""

    home: Path
    root: Path
    items: Items
    notes: list[str]


def _stem(name: str) -> str:
    """Return the key in `SPLIT_NAMES` of a name in any case, such as "Test_Set"."""
    return SUFFIX.sub("", name.strip().lower())


def is_described(folder: Path) -> bool:
    """Return whether a folder is a dataset of the user's own, whatever its name: it has a YAML or a split file."""
    return any(os.path.isfile(folder / file) for file in (SPLIT_FILE, "dataset.yaml", "dataset.yml"))


def read_folder(folder: Path) -> Content:
    """Read a folder in one of the layouts above; a UserError says what is wrong with another."""
    file, root = folder / SPLIT_FILE, folder / "images"
    if file.is_file():
        items, root = rules.read_items(file), root if root.is_dir() else folder
        if "test" not in items and "val" not in items:
            raise UserError(f'{file} has no "test" split, nor "val"; add one of them.')
        return Content(folder, root, rules.find_items(items, root, file), [])
    tree, at = Tree(folder), ""
    while not (splits := _find_splits(tree, at)) and (inner := _only_folder(tree, at)):
        at = inner
        if is_described(folder / at):
            return read_folder(folder / at)
    items = _read_classes(Tree(folder / at), splits)
    paths = [path for path, _, _ in chain(*items.values())]
    return Content(folder, folder / at, items, list(notes_on_pictures(str(folder), tree, at, paths)))


def _read_classes(tree: Tree, splits: dict[str, str]) -> Items:
    """Return the images of class folders by split; classes are numbered in sorted order. Class folders of two splits
    whose names differ in how letters are composed are the same class."""
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
    shown = {form(name): name for name in reversed([*chain(*folders.values())])}  # as the first split has it
    labels = {name: label for label, name in enumerate(sorted(shown.values()))}
    items: Items = {}
    for key, names in folders.items():
        classes = [(posixpath.join(places[key], name), shown[form(name)]) for name in names]
        items[key] = rules.class_items(tree, ((at, labels[name], name) for at, name in classes), nested=True)
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
    named = {name: split for name in inside if (split := SPLIT_NAMES.get(_stem(name)))}
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
        is_only = len(with_classes) == 1
        instead = f", or pass {place / with_classes[0]}, which is split at random" if is_only else ""
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


COLUMNS = ("path", "class", "split")
CSV = "a .csv with the columns path, class and (optional) split, separated by commas"


def load_own(place: Path, class_names: str | Path | Mapping[str, str] | None = None) -> Dataset:
    """Load a folder in one of the layouts above, or a CSV; a YAML file may describe either. ``class_names`` replace
    those of the YAML.

    Images without splits are split at random into 50% train, 20% val and 30% test of every class. A missing validation
    set is drawn from train; a missing test set is the validation set.
    """
    config, (home, root, items, notes) = _read(place)
    names, name = rules.names_by_label(items, home), config.name
    val_share = config.val_share or rules.VAL_SHARE
    if ALL in items:
        notes.append(f"{home} has no splits: its images are split at random, the same way each time.")
        items = rules.split_by_class(items[ALL], home, val_share)
    elif config.val_share is not None and items.get("val") and items.get("test"):
        notes.append(f"val_share in {config.source} changes nothing: {name} has a validation set.")
    if not items.get("test") and items.get("val"):
        items["test"] = items.pop("val")
        drawn = " Part of the training images validate." if items.get("train") else ""
        notes.append(f"{name} has no test images of its own: its validation images are the test set.{drawn}")
    notes += notes_on_overlap(name, root, items)
    if items.get("train") and not items.get("val"):
        items["train"], items["val"] = rules.split_train_val(items["train"], val_share)
    shown, splits = config.rename(names, home, class_names), rules.make_splits(items)
    notes += notes_on_classes(name, shown, splits)
    # IDs choose among the classes of a target, so they must be in the digest: as class names or in the paths.
    in_paths = (f"/{old}/" in f"/{path}" for path, _, old in chain(*items.values()))
    ids = names if all(map(WORDNET_ID.fullmatch, names)) and (shown == names or all(in_paths)) else []
    draws = root / f"{home.stem}_{FEWSHOT_FOLDER}" if home.is_file() else home / FEWSHOT_FOLDER
    others = {"fewshot_dir": draws, "class_ids": tuple(ids), "notes": tuple(notes)}
    return make_dataset(name, root, shown, config.template, splits, **others)


def classes_of(place: Path) -> tuple[list[str], list[str], str]:
    """Return the classes of a folder or CSV, a name to show for each, by its YAML or else suggested, and its name."""
    config, content = _read(place)
    classes = rules.names_by_label(content.items, content.home)
    shown = config.rename(classes, content.home) if config.class_names else suggest_names(classes)
    return classes, shown, config.name


def _read(place: Path) -> tuple[DatasetConfig, Content]:
    config = read_config(place)
    content = read_folder(place) if place.is_dir() else _read_csv(place)
    return config if content.home == place else read_config(content.home, config.name), content


def _read_csv(path: Path) -> Content:
    """Read a CSV with the columns path, class and (optional) split."""
    if path.suffix == ".h5":
        command = escape.shell_command("fastcoop", "features", "check", path)
        raise UserError(f"{path} is a feature store, which holds no images; `{command}` looks into it.")
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path} is a file; expected a folder, or {CSV}.")
    columns, table = read_csv(path, COLUMNS, COLUMNS[:2], CSV)
    unused = [column for column in columns if column not in COLUMNS]
    notes = [f"{path} has columns that are not used: {abbreviate(unused)}."] if unused else []
    rows: dict[int, tuple[str, str, str]] = {}  # image, class and split by line
    for line, row in table.items():
        split = SPLIT_NAMES.get(_stem(row["split"])) if "split" in row else ALL
        if split is None:
            named, near = f'the split "{row["split"]}"', nearest(row["split"], SPLIT_NAMES)
            raise UserError(f"{path} line {line} has {named}, expected train, val or test.{near}")
        image = row["path"]  # may end with a space
        image = os.path.relpath(image, path.parent) if os.path.isabs(image) else image
        rows[line] = image, row["class"].strip(), split
    found = find_images(path.parent, (image for image, _, _ in rows.values()), inside=False)
    missing = sum(found[image] is None for image, _, _ in rows.values())
    labels = {name: label for label, name in enumerate(sorted({name for _, name, _ in rows.values()}))}
    items: Items = {}
    lines: dict[tuple[str, str], int] = {}
    for line, (image, name, split) in rows.items():
        if (place := found[image]) is None:
            raise UserError(
                f"{path} line {line} names {image}, which is not under {path.parent} "
                f"({missing} of {len(rows)} images are missing); paths are relative to the CSV's folder."
            )
        if (first := lines.setdefault((split, place), line)) != line:
            raise UserError(f"{path} line {line} lists {place}, as line {first} does; list each image once.")
        items.setdefault(split, []).append((place, labels[name], name))
    return Content(path, path.parent, items, notes)
