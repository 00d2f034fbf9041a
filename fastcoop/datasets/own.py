"""A dataset of the user's own: a folder of images, or a CSV."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from fastcoop import escape
from fastcoop.datasets.config import DatasetConfig, read_config
from fastcoop.datasets.dataset import Dataset, Items, make_dataset, make_splits
from fastcoop.datasets.files import FEWSHOT_FOLDER, abbreviate, find_images, read_csv
from fastcoop.datasets.layout import ALL, SPLIT_NAMES, Content, read_folder, split_called
from fastcoop.datasets.names import WORDNET_ID, suggest_names
from fastcoop.datasets.notes import notes_on_classes, notes_on_overlap
from fastcoop.datasets.splits import VAL_SHARE, names_by_label, split_by_class, split_train_val
from fastcoop.errors import UserError, nearest

COLUMNS = ("path", "class", "split")
CSV = "a .csv with the columns path, class and (optional) split, separated by commas"


def load_own(place: Path, class_names: str | Path | Mapping[str, str] | None = None) -> Dataset:
    """Load a folder in one of the layouts of `layout`, or a CSV; a YAML file may describe either.

    ``class_names``, which `load_dataset` describes, are in place of those of the YAML.

    Images without splits are split at random into 50% train, 20% val and 30% test of every class. A missing
    validation set is drawn from train; a missing test set is the validation set.
    """
    config, (home, root, items, notes) = _read(place)
    names, name, val_share = names_by_label(items, home), config.name, config.val_share or VAL_SHARE
    if ALL in items:
        notes.append(f"{home} has no splits: its images are split at random, the same way each time.")
        items = split_by_class(items[ALL], home, val_share)
    elif config.val_share is not None and items.get("val") and items.get("test"):
        notes.append(f"val_share in {config.source} changes nothing: {name} has a validation set.")
    if not items.get("test") and items.get("val"):
        items["test"] = items.pop("val")
        drawn = " Part of the training images validate." if items.get("train") else ""
        notes.append(f"{name} has no test images of its own: its validation images are the test set.{drawn}")
    notes += notes_on_overlap(name, root, items)
    if items.get("train") and not items.get("val"):
        items["train"], items["val"] = split_train_val(items["train"], val_share)
    shown, splits = config.rename(names, home, class_names), make_splits(items)
    notes += notes_on_classes(name, shown, splits)
    # IDs choose among the classes of a target, so they must be in the digest: as class names or in the paths.
    in_paths = (f"/{old}/" in f"/{path}" for path, _, old in chain(*items.values()))
    ids = names if all(map(WORDNET_ID.fullmatch, names)) and (shown == names or all(in_paths)) else []
    fewshot_dir = root / f"{home.stem}_{FEWSHOT_FOLDER}" if home.is_file() else home / FEWSHOT_FOLDER
    return make_dataset(
        name, root, shown, config.template, splits, fewshot_dir=fewshot_dir, class_ids=ids, notes=notes
    )


def classes_of(place: Path) -> tuple[list[str], list[str], str]:
    """Return the classes of a folder or CSV, a name to show for each, by its YAML or else suggested, and its name."""
    config, content = _read(place)
    classes = names_by_label(content.items, content.home)
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
    rows = {line: _checked(row, path, line) for line, row in table.items()}
    unused = [column for column in columns if column not in COLUMNS]
    notes = [f"{path} has columns that are not used: {abbreviate(unused)}."] if unused else []
    found = find_images(path.parent, (row["path"] for row in rows.values()), inside=False)
    missing = sum(found[row["path"]] is None for row in rows.values())
    labels = {name: label for label, name in enumerate(sorted({row["class"] for row in rows.values()}))}
    items: Items = {}
    lines: dict[tuple[str, str], int] = {}
    for line, row in rows.items():
        image, split = found[row["path"]], row["split"]
        if image is None:
            raise UserError(
                f"{path} line {line} names {row['path']}, which is not under {path.parent} "
                f"({missing} of {len(rows)} images are missing); paths are relative to the CSV's folder."
            )
        if (first := lines.setdefault((split, image), line)) != line:
            raise UserError(f"{path} line {line} lists {image}, as line {first} does; list each image once.")
        items.setdefault(split, []).append((image, labels[row["class"]], row["class"]))
    return Content(path, path.parent, items, notes)


def _checked(row: dict[str, str], path: Path, line: int) -> dict[str, str]:
    split = split_called(row["split"]) if "split" in row else ALL
    if split is None:
        known = nearest(row["split"], SPLIT_NAMES)
        raise UserError(
            f'{path} line {line} has the split "{row["split"]}", expected train, val or test.{known}'
        )
    image = os.path.relpath(row["path"], path.parent) if os.path.isabs(row["path"]) else row["path"]
    return {"path": image, "class": row["class"].strip(), "split": split}  # a path may end with a space
