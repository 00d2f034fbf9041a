"""The datasets of the paper, and those of installed packages, in their official layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fastcoop.datasets import official_files
from fastcoop.datasets.config import check_name_and_template
from fastcoop.datasets.dataset import SPLITS, Dataset, Items, make_dataset, make_splits, warn_once
from fastcoop.datasets.files import FEWSHOT_FOLDER
from fastcoop.datasets.splits import find_items, names_by_label, read_items
from fastcoop.errors import MissingFile
from fastcoop.plugins import Registry


@dataclass(frozen=True)
class Download:
    """Something to download.

    Attributes:
        what: Its address, in words.
        makes: The path that it makes, relative to the data root.
        put_into: The folder to put it in, relative to the data root; None: the one that ``makes`` lies in.
        extract: Whether it is an archive.
    """

    what: str
    makes: str
    put_into: str | None = None
    extract: bool = True

    def sentence(self, root: Path) -> str:
        """Return what to do, for the data root ``root``."""
        makes = root / self.makes
        into = makes.parent if self.put_into is None else root / self.put_into
        if self.extract:
            return f"get {self.what} and extract it in {into}, which makes {makes}"
        return f"get {self.what} and put it in {into}, as {makes}"


@dataclass(frozen=True)
class OfficialDataset:
    """A dataset with a known layout: one of the paper's Table 6, or one that an installed package provides.

    Attributes:
        name: Its name in grid files and result tables.
        title: Its name in tables and figures.
        folder: Its folder under the data root.
        images: The folder of its images in ``folder``; split files are relative to it.
        template: The hand-written prompt, with one ``{}`` for the class name.
        counts: Classes, training, validation and test images; None where Table 6 has N/A.
        read: Reads the items by split from the dataset's own files, given ``folder``; paths are relative to ``images``.
        downloads: What to download, and where to put it.
        split_file: The official split file in ``folder``, if there is one.
        class_folders: Lists the folders that ``images`` should have, given ``folder``, where that is known.
        class_ids: Returns the WordNet IDs in label order, given ``folder`` and the items, where classes have them.
    """

    name: str
    title: str
    folder: str
    images: str
    template: str
    counts: tuple[int, int | None, int | None, int]
    read: Callable[[Path], Items]
    downloads: tuple[Download, ...]
    split_file: str | None = None
    class_folders: Callable[[Path], list[str]] | None = None
    class_ids: Callable[[Path, Items], tuple[str, ...]] | None = None

    def missing(self, home: Path) -> str:
        """Return a sentence on images that are not there: where they should be, and what to download."""
        todo = "; ".join(download.sentence(home.parent) for download in self.downloads)
        return f"{self.title} is not in {home / self.images}; {todo}."


def _paper_datasets() -> Iterator[OfficialDataset]:
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for name, row in rows.items():
        row["folder"], _, images = row.pop("images").partition("/")
        row["counts"], row["downloads"] = (
            tuple(row["counts"]),
            tuple(Download(**one) for one in row["downloads"]),
        )
        if (options := row.pop("random_split", None)) is not None:
            row["read"] = partial(official_files.random_split, images=images, **options)
        elif name.startswith("imagenet") and name != "imagenet":
            row["read"] = partial(official_files.imagenet_target, images=images)
        else:
            row["read"] = getattr(official_files, name)
        if name.startswith("imagenet"):
            row["class_ids"] = official_files.imagenet_ids
        if forms := row.get("class_folders"):
            row["class_folders"] = partial(official_files.class_folders, forms=forms)
        yield OfficialDataset(name, images=images, **row)


def _check(name: str, provided: Any) -> OfficialDataset:
    """Check a dataset of an installed package."""
    if not isinstance(provided, OfficialDataset):
        raise TypeError(f"expected a fastcoop.datasets.OfficialDataset, got {provided!r}")
    if provided.name != name:
        raise ValueError(f'its attribute name is "{provided.name}"')
    check_name_and_template(name, provided.template)
    return provided


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_PAPER = {row.name: row for row in _paper_datasets()}
_BY_ALIAS = {_plain(alias): row for row in _PAPER.values() for alias in (row.folder, row.title, row.name)}
OFFICIAL = Registry("fastcoop.datasets", "dataset", _PAPER, _check)


def find_official(name: str) -> OfficialDataset | None:
    """Return the official dataset of this name, if any.

    The paper's datasets also have their title or folder as a name, in any case, with or without separators.
    """
    if "/" in name or "\\" in name:
        return None
    return _BY_ALIAS.get(_plain(name)) or OFFICIAL.get(name)


def read_official(row: OfficialDataset, home: Path) -> tuple[list[str], Items, Path | None]:
    """Return class names, items by split, and the official split file if they come from it.

    ``home`` is the dataset's folder, usually ``<data root>/<row.folder>``. If it is missing, a UserError says what to
    download.
    """
    if not (home / row.images).is_dir():
        raise MissingFile(row.missing(home))
    split_file = home / row.split_file if row.split_file else None
    if split_file is not None and split_file.is_file():
        items = read_items(split_file, required=SPLITS)
    else:
        split_file, items = None, row.read(home)
    return names_by_label(items, split_file or home), items, split_file


def load_official(row: OfficialDataset, home: Path) -> Dataset:
    """Load an official dataset from ``home``, with a warning where the split is not the official one."""
    names, items, split_file = read_official(row, home)
    root = home / row.images
    items = find_items(items, root, split_file or home)
    if row.split_file and split_file is None:
        warn_once(
            f"{row.title}: {home / row.split_file} is missing, so the split was made from the dataset's own files and "
            f"is not the official one; numbers will not compare exactly. Get {row.downloads[-1].what}."
        )
    if len(names) != row.counts[0]:
        warn_once(f"{row.title}: {len(names)} of its {row.counts[0]} classes are in {root}.")
    ids = row.class_ids(home, items) if row.class_ids else ()
    return make_dataset(
        row.name, root, names, row.template, make_splits(items), title=row.title,
        fewshot_dir=home / FEWSHOT_FOLDER, class_ids=ids,
    )  # fmt: skip
