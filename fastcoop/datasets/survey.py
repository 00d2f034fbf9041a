"""What lies under a data root, and whether it is all there: the two `fastcoop datasets` commands as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastcoop.datasets.dataset import Dataset
from fastcoop.datasets.files import find_images
from fastcoop.datasets.load import check_data_root, load_dataset, locate, own_datasets
from fastcoop.datasets.official import OFFICIAL, Official, read_official
from fastcoop.errors import UserError


@dataclass(frozen=True)
class Found:
    """A line of the list: a dataset and what of it is under the data root."""

    name: str
    title: str
    place: Path
    present: bool
    status: str


@dataclass(frozen=True)
class Check:
    """How a dataset on disk compares with Table 6.

    Attributes:
        counts: "classes", "train", "val", "test" -> (found, expected); expected is None where nothing is
            known (the user's own) or Table 6 says N/A.
        problems: what is wrong, a sentence each; empty if all is there.
        missing: class folders and images that should be there and are not, relative to ``images``.
        advice: what to download and where to put it.
        notes: of the user's own, what may not be as it was meant: see ``Dataset.notes``.
    """

    name: str
    title: str
    images: Path
    counts: Mapping[str, tuple[int, int | None]]
    problems: tuple[str, ...]
    missing: tuple[str, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...] = ()


def survey(data_root: str | Path) -> list[Found]:
    """The fifteen datasets and the user's own, by what is under ``data_root``; nothing is read yet.

    Raises:
        UserError: ``data_root`` is not a folder.
    """
    root = Path(data_root).expanduser()
    check_data_root(root)
    found = [_official_line(row, root) for row in OFFICIAL]
    found += [Found(name, name, root / name, True, "your own") for name in own_datasets(root)]
    return found


def _official_line(row: Official, root: Path) -> Found:
    home = root / row.folder
    if not home.is_dir():
        status = "not found"
    elif not (home / row.images).is_dir():
        status = f"no images: {row.images}/ is missing"
    elif row.split_file is None:
        status = "found"
    elif (home / row.split_file).is_file():
        status = "found, official split"
    else:
        status = f"found, without {row.split_file}"
    return Found(row.name, row.title, home / row.images, status.startswith("found"), status)


def check_dataset(name: str, data_root: str | Path | None = None) -> Check:
    """Compare a dataset's counts with Table 6, and find what is missing; for the user's own, count it.

    Raises:
        UserError: there is no such dataset, or the user's own cannot be loaded.
    """
    home, row = locate(name, data_root)
    if row is None:
        return _check_own(load_dataset(name, data_root))
    images = home / row.images

    def advice(everything: bool, counts_differ: bool = False) -> tuple[str, ...]:
        """What to get: all where images are missing, but for an official split file with the right counts; else
        what is not there yet."""
        places = [(download, home.parent / download.makes) for download in row.downloads]
        return tuple(
            download.sentence(home.parent)
            for download, place in places
            if not place.exists() or (everything and (counts_differ or place.name != row.split_file))
        )

    def incomplete(problem: str) -> Check:
        todo = advice(everything=not images.is_dir())
        return Check(row.name, row.title, images, _counts(row, None), (problem,), (), todo)

    if not images.is_dir():
        return incomplete(f"{images} is not there.")
    try:
        names, items, split_file = read_official(row, home)
    except UserError as error:
        return incomplete(str(error))
    sizes = {"classes": len(names), **{key: len(items.get(key, ())) for key in ("train", "val", "test")}}
    counts = _counts(row, sizes)
    problems = [
        f"{found:,} {key} where Table 6 has {expected:,}."
        for key, (found, expected) in counts.items()
        if expected is not None and found != expected
    ]
    found = find_images(images, (path for part in items.values() for path, _, _ in part))
    missing = [path for path, place in found.items() if place is None]
    wrong = bool(problems)
    if missing:
        problems.append(f"{len(missing):,} images that the split names are not there.")
    folders = row.class_folders(home) if row.class_folders else []
    absent = [folder for folder in folders if not (images / folder).is_dir()]
    if absent:
        problems.append(f"{len(absent):,} class folders are not there.")
    if row.split_file and split_file is None:
        problems.append(f"No {row.split_file}: the split made here is not the official one.")
    return Check(
        name=row.name,
        title=row.title,
        images=images,
        counts=counts,
        problems=tuple(problems),
        missing=(*absent, *missing),
        advice=advice(wrong or bool(missing or absent), counts_differ=wrong) if problems else (),
    )


def _counts(row: Official, sizes: Mapping[str, int] | None) -> dict[str, tuple[int, int | None]]:
    keys = ("classes", "train", "val", "test")
    return {
        key: (sizes[key] if sizes else 0, expected) for key, expected in zip(keys, row.counts, strict=True)
    }


def _check_own(dataset: Dataset) -> Check:
    counts: dict[str, tuple[int, int | None]] = {"classes": (len(dataset.class_names), None)}
    counts |= {key: (len(dataset.splits.get(key, ())), None) for key in ("train", "val", "test")}
    return Check(dataset.name, dataset.title, dataset.root, counts, (), (), (), dataset.notes)
