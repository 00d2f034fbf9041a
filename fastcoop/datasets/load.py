"""Datasets by name or path; what is under a data root, and whether it is complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcoop.datasets.dataset import SPLITS, Dataset, half_of, split_spec, warn_once
from fastcoop.datasets.files import Tree, find_images
from fastcoop.datasets.names import save_names
from fastcoop.datasets.official import OFFICIAL, OfficialDataset, find_official, load_official, read_official
from fastcoop.datasets.own import classes_of, is_described, load_own
from fastcoop.errors import MissingFile, UserError, nearest

ClassNames = str | Path | Mapping[str, str]


COUNTED = ("classes", *SPLITS)


@dataclass(frozen=True)
class Found:
    """A line of the list: a dataset, its folder of images, and whether it is there."""

    name: str
    place: Path
    status: str


@dataclass(frozen=True)
class Check:
    """A comparison of a dataset on disk with Table 6."""

    name: str
    title: str  # in tables and figures
    images: Path  # the folder of its images
    # Numbers found and expected of `COUNTED`; the latter is None for the user's own datasets and for N/A in Table 6.
    counts: Mapping[str, tuple[int, int | None]]
    problems: tuple[str, ...] = ()  # a sentence each; empty if the dataset is complete
    missing: tuple[str, ...] = ()  # class folders and images, relative to ``images``
    advice: tuple[str, ...] = ()  # what to download and where to put it
    notes: tuple[str, ...] = ()  # of the user's own datasets


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
    """Return a dataset's place, and its row if it is an official one; only then it may not exist. A folder that
    `is_described` is always the user's own, whatever its name."""
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


def survey(data_root: str | Path) -> list[Found]:
    """List the official datasets and the user's own under ``data_root``, without reading them."""
    root = Path(data_root).expanduser()
    check_data_root(root)
    found = [Found(row.name, root / row.folder / row.images, _status(row, root)) for row in OFFICIAL.values()]
    return found + [Found(name, root / name, "your own") for name in own_datasets(root)]


def _status(row: OfficialDataset, root: Path) -> str:
    home = root / row.folder
    if not home.is_dir():
        return "not found"
    if not (home / row.images).is_dir():
        return f"no images: {row.images}/ is missing"
    if row.split_file is None:
        return "found"
    has_split = (home / row.split_file).is_file()
    return "found, official split" if has_split else f"found, without {row.split_file}"


def check_dataset(
    name: str | Path, data_root: str | Path | None = None, class_names: ClassNames | None = None
) -> Check:
    """Compare a dataset's counts with Table 6 and find what is missing; for the user's own, count its images."""
    home, row = locate(name, data_root)
    if row is None:
        own = load_dataset(name, data_root, class_names)
        sizes = [len(own.class_names), *(len(own.splits.get(key, ())) for key in SPLITS)]
        own_counts = {key: (size, None) for key, size in zip(COUNTED, sizes, strict=True)}
        return Check(own.name, own.title, own.root, own_counts, notes=own.notes)
    refuse_names(row, class_names)
    images = home / row.images
    try:
        names, items, split_file = read_official(row, home)
    except UserError as error:
        problem = str(error) if images.is_dir() else f"{images} is not there."
        advice = _advice(row, home, images_missing=not images.is_dir(), counts_differ=False)
        return Check(row.name, row.title, images, _counts(row, {}), (problem,), advice=advice)
    counts = _counts(row, {"classes": len(names)} | {key: len(part) for key, part in items.items()})
    problems = [
        f"{found:,} {key} where Table 6 has {expected:,}."
        for key, (found, expected) in counts.items()
        if expected not in (None, found)
    ]
    counts_differ = bool(problems)
    places = find_images(images, (path for part in items.values() for path, _, _ in part))
    missing = [path for path, place in places.items() if place is None]
    if missing:
        problems.append(f"{len(missing):,} images that the split names are not there.")
    folders = row.class_folders(home) if row.class_folders else []
    absent = [folder for folder in folders if not (images / folder).is_dir()]
    if absent:
        problems.append(f"{len(absent):,} class folders are not there.")
    if row.split_file and split_file is None:
        problems.append(f"No {row.split_file}: the split made here is not the official one.")
    images_missing = counts_differ or bool(missing or absent)
    advice = _advice(row, home, images_missing, counts_differ) if problems else ()
    return Check(row.name, row.title, images, counts, tuple(problems), (*absent, *missing), advice)


def _advice(row: OfficialDataset, home: Path, images_missing: bool, counts_differ: bool) -> tuple[str, ...]:
    """Return what to download: what is not there, and where images are missing all but a split file that is right."""
    return tuple(
        download.sentence(home.parent)
        for download in row.downloads
        if not (place := home.parent / download.makes).exists()
        or (images_missing and (counts_differ or place.name != row.split_file))
    )


def _counts(row: OfficialDataset, sizes: Mapping[str, int]) -> dict[str, tuple[int, int | None]]:
    return {key: (sizes.get(key, 0), expected) for key, expected in zip(COUNTED, row.counts, strict=True)}
