"""A dataset of the user's own: a folder of pictures, or a CSV."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from pathlib import Path

from fastcoop.datasets.config import DatasetConfig, check_known, read_config
from fastcoop.datasets.dataset import SPLITS, Dataset, Item, make_dataset, make_splits, warn_once
from fastcoop.datasets.files import FEWSHOT_FOLDER, class_folders, list_folders, missing_images, some
from fastcoop.datasets.splits import check_images, class_names, read_items, split_by_class, split_train_val
from fastcoop.errors import UserError, nearest

WORDNET_ID = re.compile(r"n\d{8}")  # as ImageNet's class folders are called
FORMS = "a split.json, or train/ and test/ folders with a folder per class, or a folder per class"


def load_folder(folder: Path) -> Dataset:
    """Load ``folder``, described by its ``dataset.yaml`` if any, in the first of these forms that it has:

    - ``split.json`` in the official format, paths relative to ``images/`` if that exists, else to the folder;
    - ``train/``, ``val/`` (optional) and ``test/`` with a folder per class in each;
    - a folder per class, split at random into 50% train, 20% val and 30% test.

    Classes are numbered in sorted order of their folders. A missing validation set is drawn from train.

    Raises:
        UserError: no such form, an empty class, missing images, or a malformed file.
    """
    config = read_config(folder / "dataset.yaml", folder.name)
    split_file = folder / "split.json"
    if split_file.is_file():
        root = folder / "images" if (folder / "images").is_dir() else folder
        items = read_items(split_file, required=("test",))
        names = class_names(items, str(split_file))
        check_images(items, root, str(split_file))
        return _finish(config, root, names, items, folder / FEWSHOT_FOLDER)
    folders = list_folders(folder)
    if "test" in folders and not (set(folders) - set(SPLITS)):
        names, items = _split_folders(folder)
    elif "train" in folders:
        raise UserError(f"{folder} has a train/ folder but {_extra(folders)}; expected {FORMS}.")
    elif folders:
        images = class_folders(folder, folders)
        warn_once(
            f"{folder} has no split of its own: split at random into train, val and test, the same each time."
        )
        names, items = folders, split_by_class(list(images.items()), str(folder), config.val_share)
    else:
        raise UserError(
            f"{folder} has no classes: expected {FORMS}; for pictures that lie side by side write a .csv with "
            "the columns path, class, split, and name that."
        )
    return _finish(config, folder, names, items, folder / FEWSHOT_FOLDER)


def _extra(folders: list[str]) -> str:
    others = [name for name in folders if name not in SPLITS]
    return f"also {', '.join(others[:3])}/ beside it" if others else "no test/ folder beside it"


def _split_folders(folder: Path) -> tuple[list[str], dict[str, list[Item]]]:
    folders = {key: list_folders(folder / key) for key in SPLITS if (folder / key).is_dir()}
    names = sorted(set().union(*folders.values()))
    labels = {name: label for label, name in enumerate(names)}
    items: dict[str, list[Item]] = {}
    for key, present in folders.items():
        images = class_folders(folder / key, present, f"{key}/")
        items[key] = [(path, labels[name], name) for name, paths in images.items() for path in paths]
    return names, items


def _finish(
    config: DatasetConfig, root: Path, names: list[str], items: dict[str, list[Item]], fewshot_dir: Path
) -> Dataset:
    shared = sorted(
        {path for path, *_ in items.get("train", ())} & {path for path, *_ in items.get("test", ())}
    )
    if shared:
        warn_once(
            f"{config.name} tests on {len(shared)} of its own training images, such as {some(shared, 1)}."
        )
    both = sorted({path for path, *_ in items.get("train", ())} & {path for path, *_ in items.get("val", ())})
    if both:
        warn_once(
            f"{config.name} has {len(both)} images in both train and val, such as {some(both, 1)}: "
            "they validate and are not learned from."
        )
    if items.get("train") and not items.get("val"):
        items["train"], items["val"] = split_train_val(items["train"], config.val_share)
    _warn_of_same_prompts(config.name, config.rename(names))
    ids = names if all(WORDNET_ID.fullmatch(name) for name in names) else []
    return make_dataset(
        config.name, root, config.rename(names), config.template, make_splits(items),
        fewshot_dir=fewshot_dir, class_ids=ids,
    )  # fmt: skip


def _warn_of_same_prompts(dataset: str, class_names: list[str]) -> None:
    """Say which classes have the same prompt: one name but for case, underscores and spaces, as CLIP reads them."""
    read: dict[str, list[str]] = {}
    for name in class_names:
        read.setdefault(" ".join(name.replace("_", " ").lower().split()), []).append(name)
    for alike in (names for names in read.values() if len(names) > 1):
        warn_once(
            f"The classes {some(alike)} of {dataset} have the same prompt, which cannot tell them apart; name them "
            "differently under class_names of its YAML."
        )


def load_csv(path: Path) -> Dataset:
    """Load a CSV with the columns path, class and (optional) split; a YAML of the same name may describe it.

    Paths are relative to the CSV's folder. Without a split column every class is split at random.

    Raises:
        UserError: a missing column, a malformed line (with its number), or images that do not exist.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(
            f"{path} is a file; a dataset is a folder, or a .csv with the columns path, class, split."
        )
    config = read_config(path.with_suffix(".yaml"), path.stem)
    rows = _rows(path)
    names = sorted({row["class"] for _, row in rows})
    labels = {name: label for label, name in enumerate(names)}
    if rows and "split" in rows[0][1]:
        items: dict[str, list[Item]] = {key: [] for key in SPLITS}
        for line, row in rows:
            check_known(
                [row["split"]], SPLITS, f"{path} line {line} has the split", "expected train, val or test"
            )
            items[row["split"]].append((row["path"], labels[row["class"]], row["class"]))
    else:
        images: dict[str, list[str]] = {name: [] for name in names}
        for _, row in rows:
            images[row["class"]].append(row["path"])
        warn_once(
            f"{path} has no split column: split at random into train, val and test, the same each time."
        )
        items = split_by_class(list(images.items()), str(path), config.val_share)
    return _finish(config, path.parent, names, items, path.parent / f"{path.stem}_{FEWSHOT_FOLDER}")


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [column.strip().lower() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            for column in ("path", "class"):
                if column not in columns:
                    raise UserError(
                        f"{path} line 1 must name the columns path, class and (optional) split; "
                        f'separated by commas; there is no "{column}".{nearest(column, columns)}'
                    )
            rows: list[tuple[int, dict[str, str]]] = []
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path} line {reader.line_num} does not have the {len(columns)} columns of line 1."
                    )
                rows.append((reader.line_num, {key: row[key].strip() for key in row}))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the CSV as UTF-8.") from None
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num} is not valid CSV: {error}.") from None
    lines: dict[tuple[str, str], int] = {}
    for line, row in rows:
        for column in ("path", "class"):
            if not row[column]:
                raise UserError(f"{path} line {line} has an empty {column}.")
        if os.path.isabs(row["path"]):
            row["path"] = os.path.relpath(row["path"], path.parent)
        row["path"] = posixpath.normpath(row["path"].replace("\\", "/"))
        first = lines.setdefault((row.get("split", ""), row["path"]), line)
        if first != line:
            raise UserError(
                f"{path} line {line} lists {row['path']} again, after line {first}; list each image once."
            )
    missing = set(missing_images(path.parent, (row["path"] for _, row in rows), inside=False))
    for line, row in rows:
        if row["path"] in missing:
            raise UserError(
                f"{path} line {line} names {row['path']}, which is not under {path.parent} "
                f"({len(missing)} of {len(rows)} images are missing); paths are relative to the CSV's folder."
            )
    return rows
