"""From what a user calls a dataset to the dataset."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastcoop.datasets.config import described_by, read_config
from fastcoop.datasets.dataset import Dataset, warn_once
from fastcoop.datasets.files import list_folder, list_folders, normalized
from fastcoop.datasets.halves import half_of, split_spec
from fastcoop.datasets.official import OFFICIAL, Official, find_official, load_official
from fastcoop.datasets.own import DESCRIPTIONS, load_csv, load_folder
from fastcoop.errors import MissingFile, UserError, nearest


def load_dataset(spec: str | Path, data_root: str | Path | None = None) -> Dataset:
    """Load a dataset. Each of its notes is logged as a warning, once.

    Args:
        spec: one of the paper's fifteen by name, whose official layout is expected under ``data_root``; or
            the path of a folder or CSV of the user's own, itself or relative to ``data_root``. Either followed by
            ":base" or ":new" is the first or second half of its classes.
        data_root: the folder that holds the datasets; the current one if None.

    Raises:
        UserError: there is no such dataset (the nearest name is suggested), or its files cannot be used.
    """
    name, half = split_spec(str(spec))
    if half is not None:
        return half_of(load_dataset(name, data_root), half)
    place, row = locate(spec, data_root)
    if row is not None:
        _refuse_own_folder(spec, data_root, place, row)
        return load_official(row, place)
    dataset = load_folder(place) if place.is_dir() else load_csv(place)
    _refuse_misread_names(dataset)
    dataset = replace(dataset, notes=(*dataset.notes, *_notes_on_namesakes(dataset.name, place)))
    for note in dataset.notes:
        warn_once(note)
    return dataset


def _refuse_misread_names(dataset: Dataset) -> None:
    """Refuse names of folders that a locale without UTF-8 reads as other letters: prompts would say them."""
    encoding = sys.getfilesystemencoding().lower()
    odd = next((name for name in (dataset.name, *dataset.class_names) if not name.isascii()), None)
    if odd is not None and encoding != "utf-8":
        raise UserError(
            f"The name {odd!r} of {dataset.title} may be misread: this system's locale reads file names as {encoding}, "
            "not as UTF-8; set PYTHONUTF8=1 and run the same command again."
        )


def _refuse_own_folder(spec: str | Path, data_root: str | Path | None, home: Path, row: Official) -> None:
    """Say how a folder is the user's own that has the name of one of the fifteen, which is not there."""
    own = _expanded(data_root if data_root is not None else "") / spec
    if not (home / row.images).is_dir() and own.is_dir() and any(list_folder(own).folders):
        todo = "; ".join(download.sentence(home.parent) for download in row.downloads)
        raise UserError(
            f"{row.title} is not in {home / row.images}; {todo}. If {own} is a dataset of your own, put a "
            "dataset.yaml into it, which may be empty."
        )


def locate(spec: str | Path, data_root: str | Path | None) -> tuple[Path, Official | None]:
    """Where the dataset lies, and its row if it is one of the fifteen; only then it need not exist.

    A folder with a ``dataset.yaml`` or ``split.json`` is always the user's own, whatever it is called.

    Raises:
        UserError: as ``load_dataset``.
    """
    root = _expanded(data_root) if data_root is not None else Path()
    if not os.path.exists(_expanded(spec)):
        check_data_root(root)
    row = find_official(str(spec))
    if row is not None and not _is_described(root / spec):
        return root / row.folder, row
    places = list(dict.fromkeys((root / spec, _expanded(spec))))
    for place in places:
        row = find_official(place.name)
        if row is not None and os.path.isdir(place / row.images) and not _is_described(place):
            return place, row
        if os.path.exists(place):
            return place, None
    own = own_datasets(root)
    composed = [name for name in own if normalized(name) == normalized(str(spec))]
    if len(composed) == 1:  # its letters are composed otherwise than they were typed
        return root / composed[0], None
    valid = [official.name for official in OFFICIAL] + own
    raise MissingFile(
        f"There is no dataset {spec}: looked for {' and '.join(map(str, places))}.{nearest(str(spec), valid)}"
    )


def check_data_root(root: Path) -> None:
    """Raise MissingFile unless ``root`` is a folder."""
    if not os.path.isdir(root):
        raise MissingFile(f"The data root {root} is not a folder; pass the folder that holds the datasets.")


def own_datasets(root: Path) -> list[str]:
    """Names under ``root`` of what may be datasets of the user's own: folders, and CSV files."""
    official = {row.folder for row in OFFICIAL}
    folders = [name for name in list_folders(root) if name not in official or _is_described(root / name)]
    return folders + [name for name in list_folder(root).others if name.lower().endswith(".csv")]


def _notes_on_namesakes(name: str, place: Path) -> Iterator[str]:
    """Sentences on what shares a dataset's name, and so the names of its features and results."""
    rename = f"give another name under name: of {_yaml_of(place)}"
    row = next((row for row in OFFICIAL if row.name == name), None)
    if row is not None:
        yield f"{place} is called {name}, as the paper's {row.title} is; {rename}, unless it is that dataset."
    try:
        parent = Path(os.path.abspath(place)).parent
        others = [parent / other for other in own_datasets(parent)]
    except UserError:  # a folder that may be entered, but not listed
        return
    for other in others:
        if _name_of(other) == name and not os.path.samefile(other, place) and _is_dataset(other):
            yield (
                f"{place} and {other} are both called {name}, so that their features and results would be mixed up; "
                f"{rename}."
            )


def _yaml_of(place: Path) -> Path:
    return described_by(place, "dataset") if place.is_dir() else described_by(place.parent, place.stem)


def _name_of(place: Path) -> str | None:
    try:
        return read_config(_yaml_of(place), place.name if place.is_dir() else place.stem).name
    except UserError:
        return None


def _is_dataset(place: Path) -> bool:
    """Whether it is a CSV, or a folder that is described or holds folders."""
    return not place.is_dir() or _is_described(place) or bool(list_folders(place))


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~name" of nobody here
        return Path(path)


def _is_described(folder: Path) -> bool:
    return any(os.path.isfile(folder / file) for file in DESCRIPTIONS)
