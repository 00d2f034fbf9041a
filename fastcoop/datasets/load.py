"""Datasets by name or path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fastcoop.datasets.dataset import Dataset, half_of, split_spec, warn_once
from fastcoop.datasets.files import Tree, find_images
from fastcoop.datasets.names import config_file, read_config, save_names
from fastcoop.datasets.official import OFFICIAL, OfficialDataset, find_official, load_official
from fastcoop.datasets.own import classes_of, is_described, load_own
from fastcoop.errors import MissingFile, UserError, nearest

ClassNames = str | Path | Mapping[str, str]


def load_dataset(
    spec: str | Path | Dataset, data_root: str | Path | None = None, class_names: ClassNames | None = None
) -> Dataset:
    """Load a dataset. Each of its notes is logged as a warning, once.

    Args:
        spec: The name of one of the paper's fifteen or of an installed package's, whose official layout is expected
            under ``data_root``; or the path of a folder or CSV of the user's own, itself or relative to ``data_root``.
            Either followed by ":base" or ":new" is the first or second half of its classes. A dataset is returned as
            it is.
        data_root: The folder that holds the datasets; None: the current folder.
        class_names: A name to show for each class of a dataset of the user's own: a mapping, or a CSV as
            `fastcoop.datasets.write_class_names` writes it.

    Raises:
        UserError: There is no such dataset (the message suggests the nearest name), or its files cannot be used.
    """
    if isinstance(spec, Dataset):
        return spec
    name, half = split_spec(str(spec))
    if half is not None:
        return half_of(load_dataset(name, data_root, class_names), half)
    place, row = locate(spec, data_root)
    if row is not None:
        refuse_names(row, class_names)
        own = Path(os.path.expanduser(data_root or ""), spec)
        if not (place / row.images).is_dir() and own.is_dir() and Tree(own).listing().folders:
            advice = f"If {own} is a dataset of your own, put a dataset.yaml into it, which may be empty."
            raise UserError(f"{row.missing(place)} {advice}")
        return load_official(row, place)
    dataset = load_own(place, class_names)
    encoding = sys.getfilesystemencoding().lower()
    odd = next((name for name in (dataset.name, *dataset.class_names) if not name.isascii()), None)
    if odd is not None and encoding != "utf-8":  # prompts would have other letters
        raise UserError(
            f"The name {odd!r} of {dataset.title} may be misread: this system's locale reads file names as {encoding}, "
            "not as UTF-8; set PYTHONUTF8=1 and run the same command again."
        )
    dataset = replace(dataset, notes=(*dataset.notes, *_notes_on_namesakes(dataset.name, place)))
    for note in dataset.notes:
        warn_once(note)
    return dataset


def write_class_names(
    spec: str | Path, out: str | Path | None = None, data_root: str | Path | None = None
) -> tuple[Path, dict[str, str]]:
    """Write a CSV with a name to show for each class of a dataset of the user's own, to be corrected by hand.

    Args:
        spec, data_root: As `load_dataset` takes them.
        out: The file, which must not exist; by default ``<name>-names.csv`` in the current folder.

    Returns:
        The file, and its names by class. They are those of the dataset's YAML or else cleaned: without numbers,
        WordNet IDs and words like "class" in front, and with spaces between words.

    Raises:
        UserError: As `load_dataset`; or the dataset is an official one, or ``out`` exists.
    """
    place, row = locate(spec, data_root)
    if row is not None:
        refuse_names(row, "")
    classes, names, name = classes_of(place)
    path = Path(out or f"{name}-names.csv")
    save_names(classes, names, path)
    return path, dict(zip(classes, names, strict=True))


def refuse_names(row: OfficialDataset, class_names: ClassNames | None) -> None:
    """Raise UserError for class names that are given for an official dataset."""
    if class_names is not None:
        raise UserError(
            f"{row.title} has class names of its own; give names for a folder or CSV of yours only."
        )


def own_specs(specs: Sequence[str | Path | Dataset], data_root: str | Path | None) -> list[str]:
    """Return the datasets of the user's own among ``specs``, each once, without features computed elsewhere."""
    names = dict.fromkeys(split_spec(str(spec))[0] for spec in specs if not isinstance(spec, Dataset))
    return [name for name in names if Path(name).suffix != ".h5" and locate(name, data_root)[1] is None]


def locate(spec: str | Path, data_root: str | Path | None) -> tuple[Path, OfficialDataset | None]:
    """Return a dataset's place, and its row if it is an official one; only then it may not exist.

    A folder that `is_described` is always the user's own, whatever its name.
    """
    root, path = Path(os.path.expanduser(data_root or "")), Path(os.path.expanduser(spec))
    if not os.path.exists(path):
        check_data_root(root)
    row = find_official(str(spec))
    if row is not None and not is_described(root / spec):
        return root / row.folder, row
    places = list(dict.fromkeys((root / spec, path)))
    for place in places:
        row = find_official(place.name)
        if row is not None and os.path.isdir(place / row.images) and not is_described(place):
            return place, row
        if os.path.exists(place):
            return place, None
    if same := find_images(root, [str(spec)])[str(spec)]:  # the file system composes letters differently
        return root / same, None
    names = nearest(str(spec), [*OFFICIAL, *own_datasets(root)])
    raise MissingFile(f"There is no dataset {spec}: looked for {' and '.join(map(str, places))}.{names}")


def check_data_root(root: Path) -> None:
    """Raise MissingFile unless ``root`` is a folder."""
    if not os.path.isdir(root):
        raise MissingFile(f"The data root {root} is not a folder; pass the folder that holds the datasets.")


def own_datasets(root: Path) -> list[str]:
    """Return the names under ``root`` that may be datasets of the user's own: folders, and CSV files."""
    listing = Tree(root).listing()
    official = {row.folder for row in OFFICIAL.values()}
    folders = [name for name in listing.folders if name not in official or is_described(root / name)]
    return folders + [name for name in listing.others if name.lower().endswith(".csv")]


def _notes_on_namesakes(name: str, place: Path) -> Iterator[str]:
    """Report what has the same name, and so the same names of features and results."""
    rename = f"give another name under name: of {config_file(place)}"
    if row := OFFICIAL.get(name):
        yield f"{place} is called {name}, as the paper's {row.title} is; {rename}, unless it is that dataset."
    try:
        parent = Path(os.path.abspath(place)).parent
        others = [parent / other for other in own_datasets(parent)]
    except UserError:  # a folder that may be entered, but not listed
        return
    for other in others:
        try:
            is_dataset = not other.is_dir() or is_described(other) or Tree(other).listing().folders
            same = is_dataset and read_config(other).name == name and not os.path.samefile(other, place)
        except UserError:  # reported when that dataset is loaded
            continue
        if same:
            yield (
                f"{place} and {other} are both called {name}, so that their features and results would be mixed up; "
                f"{rename}."
            )
