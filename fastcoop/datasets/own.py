"""A dataset of the user's own: a folder of pictures, or a CSV."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastcoop import escape
from fastcoop.datasets.config import DatasetConfig, described_by, read_config
from fastcoop.datasets.dataset import SPLITS, Dataset, Item, make_dataset, make_splits
from fastcoop.datasets.files import FEWSHOT_FOLDER, Tree, abbreviate, find_images, normalized, reading
from fastcoop.datasets.layout import FORMS, SPLIT_NAMES, class_level, find_layout, split_called
from fastcoop.datasets.notes import (
    notes_on_absent_classes,
    notes_on_left_out,
    notes_on_masks,
    notes_on_names,
    notes_on_overlap,
)
from fastcoop.datasets.splits import find_items, names_by_label, read_items, split_by_class, split_train_val
from fastcoop.errors import UserError, nearest

WORDNET_ID = re.compile(r"n\d{8}")  # names of ImageNet's class folders
SPLIT_FILE = "split.json"
COLUMNS = ("path", "class", "split")
DESCRIPTIONS = (SPLIT_FILE, "dataset.yaml", "dataset.yml")  # each makes a folder the user's own dataset
Items = dict[str, list[Item]]


def load_folder(folder: Path, default_name: str | None = None) -> Dataset:
    """Load ``folder``, described by its ``dataset.yaml`` if any, in the first of these forms that it has:

    - ``split.json`` in the official format, paths relative to ``images/`` if that exists, else to the folder;
    - ``train/``, ``val/`` and ``test/`` with a folder per class in each; one of the latter two is enough;
    - a folder per class, split at random into 50% train, 20% val and 30% test.

    Either may be inside one further folder, and a class's images in one folder inside the class's own. Classes are
    numbered in sorted order of their folders. A missing validation set is drawn from train; a missing test set is
    the validation set.

    Raises:
        UserError: The folder has no such form, an empty class, missing images, or a malformed file.
    """
    config = read_config(described_by(folder, "dataset"), default_name or folder.name)
    fewshot_dir = folder / FEWSHOT_FOLDER
    split_file = folder / SPLIT_FILE
    if split_file.is_file():
        root = folder / "images" if (folder / "images").is_dir() else folder
        items = read_items(split_file)
        if "test" not in items and "val" not in items:
            raise UserError(f'{split_file} has no "test" split, nor "val"; add one of them.')
        items = find_items(items, root, str(split_file))
        return _make(config, root, names_by_label(items, str(split_file)), items, fewshot_dir)
    whole = Tree(folder)
    layout = find_layout(whole, DESCRIPTIONS)
    root = folder / layout.at
    if layout.at and any((root / file).is_file() for file in DESCRIPTIONS):
        return load_folder(root, config.name)
    tree = Tree(root)
    folders = tree.listing().folders
    if layout.splits:
        if "test" not in layout.splits and "val" not in layout.splits:
            train = layout.splits["train"]
            raise UserError(
                f"{root} has a {train}/ folder but no test/ folder beside it, nor val/, that holds images; expected "
                f"{FORMS}. Add one, or pass {root / train}, which is split at random."
            )
        names, items = _split_folders(tree, layout.splits)
    elif folders:
        names = list(folders)
        items = split_by_class(
            [(name, _images(tree, name)) for name in names], str(root), config.share_of_val
        )
    else:
        raise UserError(
            f"{folder} has no classes: expected {FORMS}; for pictures that lie side by side write a .csv with "
            "the columns path, class, split, and name that."
        )
    paths = [path for part in items.values() for path, *_ in part]
    notes = [
        *notes_on_left_out(config.name, whole, (posixpath.join(layout.at, path) for path in paths)),
        *notes_on_masks(config.name, paths),
    ]
    random_because = "" if layout.splits else f"{folder} has no split of its own"
    return _make(config, root, names, items, fewshot_dir, random_because, notes)


def _images(tree: Tree, class_folder: str) -> list[str]:
    """Return the paths of the images of a class."""
    at = tree.image_folder(class_folder)
    return [f"{at}/{file}" for file in tree.listing(at).images]


def _split_folders(tree: Tree, splits: Mapping[str, str]) -> tuple[list[str], Items]:
    """Return class names and items by split. Class folders that differ in how letters are composed are the same."""
    folders = {key: class_level(tree, splits[key]) for key in SPLITS if key in splits}
    written = [tree.listing(folder).folders for folder in folders.values()]
    distinct = all(len(set(map(normalized, names))) == len(names) for names in written)
    shown: dict[str, str] = {}
    for name in (name for names in written for name in names):
        shown.setdefault(normalized(name) if distinct else name, name)
    names = sorted(shown.values())
    labels = {name: label for label, name in enumerate(names)}
    items: Items = {key: [] for key in folders}
    for key, folder in folders.items():
        for name in tree.listing(folder).folders:
            class_name = shown[normalized(name) if distinct else name]
            items[key] += [
                (path, labels[class_name], class_name) for path in _images(tree, f"{folder}/{name}")
            ]
    return names, items


def _make(
    config: DatasetConfig,
    root: Path,
    names: list[str],
    items: Items,
    fewshot_dir: Path,
    random_because: str = "",
    notes: Iterable[str] = (),
) -> Dataset:
    """Make the dataset of these items. ``random_because``: why they were split at random; "" if they were not."""
    notes = list(notes)
    if random_because:
        notes.insert(0, f"{random_because}: its images are split at random, the same way each time.")
    if not items.get("test") and items.get("val"):
        items["test"] = items.pop("val")
        part = " Part of the training images validate." if items.get("train") else ""
        notes.append(
            f"{config.name} has no test images of its own: its validation images are the test set.{part}"
        )
    notes += notes_on_overlap(config.name, root, items)
    if items.get("val") and config.val_share is not None and not random_because:
        notes.append(f"val_share in {config.source} changes nothing: {config.name} has a validation set.")
    if items.get("train") and not items.get("val"):
        items["train"], items["val"] = split_train_val(items["train"], config.share_of_val)
    shown, splits = config.rename(names), make_splits(items)
    notes += notes_on_names(config.name, shown)
    notes += notes_on_absent_classes(config.name, shown, splits)
    # IDs choose among the classes of a target, so they must be in the digest: as class names or in the paths.
    recorded = shown == names or all(
        f"/{name}/" in f"/{path}" for part in items.values() for path, _, name in part
    )
    ids = names if recorded and all(WORDNET_ID.fullmatch(name) for name in names) else []
    return make_dataset(
        config.name, root, shown, config.template, splits, fewshot_dir=fewshot_dir, class_ids=ids, notes=notes,
    )  # fmt: skip


def load_csv(path: Path) -> Dataset:
    """Load a CSV with the columns path, class and (optional) split; a YAML of the same name may describe it.

    Paths are relative to the CSV's folder. Without a split column every class is split at random.

    Raises:
        UserError: A missing column, a malformed line (with its number), or images that do not exist.
    """
    if path.suffix == ".h5":
        command = escape.shell_command("fastcoop", "features", "check", path)
        raise UserError(f"{path} is a feature store, which holds no images; `{command}` looks into it.")
    if path.suffix.lower() != ".csv":
        raise UserError(
            f"{path} is a file; expected a folder, or a .csv with the columns path, class and (optional) split."
        )
    config = read_config(described_by(path.parent, path.stem), path.stem)
    columns, rows = _read_csv(path)
    _find_rows(path, rows)
    names = sorted({row["class"] for row in rows.values()})
    labels = {name: label for label, name in enumerate(names)}
    unused = [column for column in columns if column not in COLUMNS]
    notes = [f"{path} has columns that are not used: {abbreviate(unused)}."] if unused else []
    if "split" in columns:
        items: Items = {key: [] for key in SPLITS}
        for line, row in rows.items():
            split = split_called(row["split"])
            if split is None:
                raise UserError(
                    f'{path} line {line} has the split "{row["split"]}", but expected train, val or test.'
                    f"{nearest(row['split'], SPLIT_NAMES)}"
                )
            items[split].append((row["path"], labels[row["class"]], row["class"]))
        random_because = ""
    else:
        images: dict[str, list[str]] = {name: [] for name in names}
        for row in rows.values():
            images[row["class"]].append(row["path"])
        items = split_by_class(images.items(), str(path), config.share_of_val)
        random_because = f"{path} has no split column"
    fewshot_dir = path.parent / f"{path.stem}_{FEWSHOT_FOLDER}"
    return _make(config, path.parent, names, items, fewshot_dir, random_because, notes)


def _read_csv(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Return the columns, and the rows by line number."""
    rows: dict[int, dict[str, str]] = {}
    try:
        with reading(path, "a CSV"), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
            for column in COLUMNS:
                if columns.count(column) > 1:
                    raise UserError(f'{path} line 1 names the column "{column}" twice; rename one of them.')
                if column != "split" and column not in columns:
                    raise UserError(
                        f"{path} line 1 must name the columns path, class and (optional) split; "
                        f'separated by commas; there is no "{column}".{nearest(column, columns)}'
                    )
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path} line {reader.line_num} does not have the {len(columns)} columns of line 1."
                    )
                # Space around a path may be part of the file's name.
                rows[reader.line_num] = {key: row[key] if key == "path" else row[key].strip() for key in row}
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num} is not valid CSV: {error}.") from None
    return columns, rows


def _find_rows(path: Path, rows: Mapping[int, dict[str, str]]) -> None:
    """Replace the paths of a CSV's rows by those of the images that they name."""
    for line, row in rows.items():
        for column in ("path", "class"):
            if not row[column].strip():
                raise UserError(f"{path} line {line} has an empty {column}.")
        if os.path.isabs(row["path"]):
            row["path"] = os.path.relpath(row["path"], path.parent)
    found = find_images(path.parent, (row["path"] for row in rows.values()), inside=False)
    first_lines: dict[tuple[str | None, str], int] = {}
    for line, row in rows.items():
        place = found[row["path"]]
        if place is None:
            missing = sum(found.get(row["path"], "") is None for row in rows.values())
            raise UserError(
                f"{path} line {line} names {row['path']}, which is not under {path.parent} "
                f"({missing} of {len(rows)} images are missing); paths are relative to the CSV's folder."
            )
        row["path"] = place
        first = first_lines.setdefault((split_called(row.get("split", "")), place), line)
        if first != line:
            raise UserError(
                f"{path} line {line} lists {place} again, after line {first}; list each image once."
            )
