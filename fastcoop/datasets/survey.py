"""What is under a data root, and whether it is complete: the results of the two `fastcoop datasets` commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastcoop.datasets.dataset import SPLITS
from fastcoop.datasets.files import find_images
from fastcoop.datasets.load import (
    ClassNames,
    check_data_root,
    load_dataset,
    locate,
    own_datasets,
    refuse_names,
)
from fastcoop.datasets.official import OFFICIAL, OfficialDataset, read_official
from fastcoop.errors import UserError

COUNTED = ("classes", *SPLITS)


@dataclass(frozen=True)
class Found:
    """A line of the list: a dataset, its folder of images, and whether it is there."""

    name: str
    place: Path
    status: str


@dataclass(frozen=True)
class Check:
    """A comparison of a dataset on disk with Table 6.

    ``counts`` has the numbers found and expected of `COUNTED`; the latter is None for the user's own datasets and where
    Table 6 has N/A.
    """

    name: str
    title: str  # in tables and figures
    images: Path  # the folder of its images
    counts: Mapping[str, tuple[int, int | None]]
    problems: tuple[str, ...] = ()  # a sentence each; empty if the dataset is complete
    missing: tuple[str, ...] = ()  # class folders and images, relative to ``images``
    advice: tuple[str, ...] = ()  # what to download and where to put it
    notes: tuple[str, ...] = ()  # of the user's own datasets


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
