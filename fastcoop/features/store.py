"""The feature store: one HDF5 file per backbone and dataset, and how it is opened, refused and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, Split, load_dataset
from fastcoop.datasets.halves import half_of, rows_in_whole, split_spec
from fastcoop.errors import UserError

FORMAT = "fastcoop features"
FORMAT_VERSION = 1
META = "meta"
ROWS_AT_ONCE = 256  # where all of a file is gone through
IMPORTED = "imported"  # the recipe of features computed elsewhere


def store_path(cache_root: str | Path, backbone: Backbone, dataset: Dataset) -> Path:
    """Where the store of ``backbone`` and ``dataset`` lies: ``<cache_root>/<backbone>/<dataset>.h5``, or where
    the dataset itself came from. Half a dataset's classes lie in the store of all of them."""
    dataset = dataset.whole or dataset
    if dataset.store is not None:
        return dataset.store
    return Path(cache_root) / backbone.name / f"{dataset.name}.h5"


def find_dataset(spec: str | Path, data_root: str | Path | None = None) -> Dataset:
    """``load_dataset``, or the dataset behind a store where ``spec`` is the path of one (``*.h5``), itself or
    relative to ``data_root``: for features that were imported.

    Raises UserError as those do.
    """
    name, half = split_spec(str(spec))
    if half is not None:
        return half_of(find_dataset(name, data_root), half)
    if Path(spec).suffix != ".h5":
        return load_dataset(spec, data_root)
    under_root = Path(data_root or "").expanduser() / spec
    path = under_root if under_root.is_file() else Path(spec).expanduser()
    return FeatureStore.open(path).as_dataset()


@dataclass(frozen=True)
class Meta:
    """What a store's features came from. Two stores with equal fields hold equal features, row by row.

    Attributes:
        backbone, backbone_digest, dataset, dataset_digest: names and content digests.
        dim: feature size.
        recipe: "current" or "official-2021"; "imported" for features computed elsewhere.
        view_seed: of the augmentations.
        views: augmented views per training image, beside view 0.
        dtype: "float16" or "float32".
        class_names, template: of the dataset.
        expected: images in each split of the dataset; all of "val" and "test", part of "train", are stored.
        skipped: for each split the indices left out because the image could not be read.
        sha256: for each split, of its rows' indices, labels and features.
        versions: of the packages that made the features.
    """

    backbone: str
    backbone_digest: str
    dataset: str
    dataset_digest: str
    dim: int
    recipe: str
    view_seed: int
    views: int
    dtype: str
    class_names: tuple[str, ...]
    template: str
    expected: Mapping[str, int]
    skipped: Mapping[str, Sequence[int]]
    sha256: Mapping[str, str]
    versions: Mapping[str, str]


class FeatureStore:
    """Raw image features of one dataset by one backbone. Open it with ``FeatureStore.open``."""

    def __init__(self, path: Path, meta: Meta, tables: Mapping[str, _Table], template: str):
        self.path = path
        self.meta = meta
        self.template = template
        self._tables = tables

    @classmethod
    def open(
        cls, path: str | Path, backbone: Backbone | None = None, dataset: Dataset | None = None
    ) -> FeatureStore:
        """Open a store, made by ``backbone`` from ``dataset`` where these are given.

        Only metadata is read; features stay on disk until asked for. The template is the dataset's own where
        one is given, since it plays no part in features.

        Raises:
            UserError: no such file, damaged, of a newer format, or made with other weights or another version
                of the dataset (both digests named).
        """
        path = Path(path)
        meta, tables = _read(path)
        if backbone is not None:
            _refuse_unless_equal(path, "weights", meta.backbone, meta.backbone_digest, backbone)
        if dataset is not None:
            _refuse_unless_equal(path, "images", meta.dataset, meta.dataset_digest, dataset.whole or dataset)
            if dataset.whole is not None:
                meta, tables = _half(meta, tables, dataset)
        return cls(path, meta, tables, meta.template if dataset is None else dataset.template)

    @property
    def dim(self) -> int:
        """Feature size."""
        return self.meta.dim

    @property
    def views(self) -> int:
        """Augmented views per training image, beside view 0."""
        return self.meta.views

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.meta.class_names

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits stored: "test", and mostly "train" and "val"."""
        return tuple(self._tables)

    @cached_property
    def digest(self) -> str:
        """sha256 hex that stands for these features in the keys of runs, with ``train_digest`` of those learned from.

        It covers what the features came from and the validation and test features themselves, not which training
        images are cached, nor in how many views: asking for more later leaves it as it is. Imported features are
        covered whole.
        """
        meta = self.meta
        facts = [meta.backbone_digest, meta.dataset_digest, meta.recipe, meta.view_seed, meta.dtype]
        whole = meta.recipe == IMPORTED
        hashed = {name: one for name, one in meta.sha256.items() if whole or name != "train"}
        return hashlib.sha256(json.dumps([*facts, hashed], sort_keys=True).encode()).hexdigest()

    def train_digest(self, indices: np.ndarray) -> str | None:
        """sha256 hex of training images' features, by their test-time crops; None where some are not cached yet.

        indices: (n,) into the dataset's training split. Which of them were skipped as unreadable is covered too.
        """
        try:
            rows = self._rows("train", indices)
        except UserError:
            return None
        table = self._table("train")
        digest = hashlib.sha256(table.index[rows].astype("<i8").tobytes())
        for start in range(0, len(rows), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(table.stored(rows[start : start + ROWS_AT_ONCE], 1)).data)
        return digest.hexdigest()

    def indices(self, split: str) -> np.ndarray:
        """int64 (n,), ascending: which of the split's images are stored."""
        return self._table(split).index

    def paths(self, split: str) -> tuple[str, ...]:
        """The stored images' paths, in the order of ``indices``."""
        rows = self._table(split).rows
        with damage_refused(self.path), h5py.File(self.path) as file:
            paths = file[split]["paths"].asstr("utf-8", "surrogateescape")[:]
        return tuple(paths if rows is None else paths[rows])

    def train(self, indices: Sequence[int] | np.ndarray, views: bool = True) -> Tensor:
        """Features of training images, float32 (n, 1 + views, dim); view 0 is the test-time crop.

        indices: (n,) into the dataset's training split. ``views=False`` gives view 0 alone, (n, 1, dim).
        Images that were skipped as unreadable are left out, here and in ``train_labels``.

        Raises UserError if an image is not in the store.
        """
        table = self._table("train")
        return table.read(self._rows("train", indices), None if views else 1)

    def train_labels(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Labels of training images, int64 (n,), in the order of ``train``."""
        return torch.from_numpy(self._table("train").labels[self._rows("train", indices)])

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """All of "val" or "test": float32 (n, dim) features of view 0 and int64 (n,) labels."""
        table = self._table(name)
        rows = self._rows(name, np.arange(self.meta.expected[name]))
        return table.read(rows, 1)[:, 0], torch.from_numpy(table.labels[rows])

    def raw(self, split: str, rows: slice) -> np.ndarray:
        """Features as stored, (rows, views, dim) in the store's dtype, of consecutive ``indices``."""
        table = self._table(split)
        return table.mapped()[rows if table.rows is None else table.rows[rows]]

    def as_dataset(self) -> Dataset:
        """The dataset behind the store, without its images: for features that were imported.

        Raises UserError if not every image of the dataset is stored.
        """
        if any(len(rows) for rows in self.meta.skipped.values()):
            raise UserError(
                f"{self.path} leaves out images that could not be read, so it cannot stand for its dataset; "
                f"name the dataset {self.meta.dataset} itself."
            )
        splits = {}
        for name in self.splits:
            rows = self._rows(name, np.arange(self.meta.expected[name]))
            paths = self.paths(name)
            splits[name] = Split(tuple(paths[row] for row in rows), self._table(name).labels[rows])
        return Dataset(
            name=self.meta.dataset,
            root=self.path.parent,
            class_names=self.class_names,
            template=self.template,
            splits=splits,
            digest=self.meta.dataset_digest,
            title=self.meta.dataset,
            fewshot_dir=self.path.parent / f"{self.meta.dataset}.fewshot",
            store=self.path,
        )

    def _table(self, split: str) -> _Table:
        if split not in self._tables:
            raise UserError(f"{self.path} holds no {split} images, only {' and '.join(self._tables)}.")
        return self._tables[split]

    def _rows(self, split: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        table = self._table(split)
        asked = np.asarray(indices, dtype=np.int64)
        asked = asked[~np.isin(asked, np.asarray(self.meta.skipped.get(split, ()), dtype=np.int64))]
        rows = np.searchsorted(table.index, asked)
        rows = np.minimum(rows, max(len(table.index) - 1, 0))
        missing = asked[table.index[rows] != asked] if len(table.index) else asked
        if len(missing):
            raise UserError(
                f"{self.path} lacks {len(missing)} of the {len(asked)} {split} images asked for, "
                "such as those of more shots or seeds; run `fastcoop cache-features` for them first."
            )
        return rows


@dataclass(frozen=True)
class _Table:
    """One split: ascending ``index`` (n,), ``labels`` (n,), and where its (n, views, dim) features lie."""

    path: Path
    index: np.ndarray
    labels: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None
    rows: np.ndarray | None = None  # of the file's, where the split is part of what lies there

    def mapped(self) -> np.ndarray:
        """All features. They are contiguous in the file, which is mapped, not parsed."""
        if self.offset is None:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def read(self, rows: np.ndarray, views: int | None = None) -> Tensor:
        """float32 (len(rows), views, dim): the first views, or all."""
        out = torch.empty(len(rows), *self.mapped()[:0, :views].shape[1:])
        for start in range(0, len(rows), ROWS_AT_ONCE):  # no second copy of everything in half precision
            part = slice(start, start + ROWS_AT_ONCE)
            out[part] = torch.from_numpy(self.stored(rows[part], views))
        return out

    def stored(self, rows: np.ndarray, views: int | None = None) -> np.ndarray:
        """(len(rows), views, dim) in the file's dtype: the first views, or all."""
        return self.mapped()[rows if self.rows is None else self.rows[rows], :views]


def _read(path: Path) -> tuple[Meta, dict[str, _Table]]:
    if not path.is_file():
        raise UserError(f"There is no feature store {path}; make it with `fastcoop cache-features`.")
    with damage_refused(path), h5py.File(path) as file:
        if file.attrs.get("format") != FORMAT:
            raise UserError(f"{path} is an HDF5 file but not a feature store of fastcoop.")
        version = int(file.attrs["format_version"])
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version} and this fastcoop reads up to {FORMAT_VERSION}; "
                "update fastcoop, or use another cache folder."
            )
        content: dict[str, Any] = json.loads(file[META].asstr()[()])
        content["class_names"] = tuple(content["class_names"])
        meta = Meta(**content)
        return meta, {split: _table(path, file, split, meta) for split in meta.expected}


@contextmanager
def damage_refused(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes of its reading into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} should be a feature store but is damaged or cut short ({error}); "
            "move it away and run `fastcoop cache-features` again."
        ) from error


def _table(path: Path, file: h5py.File, split: str, meta: Meta) -> _Table:
    features, index, labels = file[split]["features"], file[split]["index"][:], file[split]["labels"][:]
    shape = (len(index), 1 + meta.views if split == "train" else 1, meta.dim)
    if (features.shape, features.dtype) != (shape, np.dtype(meta.dtype)):
        raise ValueError(
            f"its {split} features are {features.dtype} {features.shape}, not {meta.dtype} {shape}"
        )
    if (np.diff(index, prepend=-1) <= 0).any() or (index >= meta.expected[split]).any():
        raise ValueError(f"the numbers of its {split} images do not ascend within the split")
    if len(labels) != len(index) or ((labels < 0) | (labels >= len(meta.class_names))).any():
        raise ValueError(f"it does not have one label that names a class for each of its {split} images")
    offset = features.id.get_offset()
    if features.size and (offset is None or offset + features.nbytes > path.stat().st_size):
        raise ValueError(f"its {split} features do not lie in it in one piece")
    return _Table(path, index, labels, features.shape, features.dtype, offset)


def _refuse_unless_equal(path: Path, what: str, name: str, digest: str, asked: Backbone | Dataset) -> None:
    if digest != asked.digest:
        raise UserError(
            f"{path} was made from other {what}: it holds {name} ({digest[:12]}) and {asked.name} "
            f"({asked.digest[:12]}) was asked for; use another cache folder or move the file away."
        )


def _half(meta: Meta, tables: Mapping[str, _Table], half: Dataset) -> tuple[Meta, dict[str, _Table]]:
    """What a store of all classes holds of half of them."""
    kept, expected, skipped = {}, {}, {}
    for name in (name for name in tables if name in half.splits):
        rows = rows_in_whole(half, name)
        inside = np.flatnonzero(np.isin(tables[name].index, rows))
        index = np.searchsorted(rows, tables[name].index[inside])
        kept[name] = replace(tables[name], index=index, labels=half.splits[name].labels[index], rows=inside)
        expected[name] = len(rows)
        left_out = np.asarray(meta.skipped.get(name, ()), np.int64)
        skipped[name] = np.searchsorted(rows, left_out[np.isin(left_out, rows)]).tolist()
    described = replace(
        meta, dataset=half.name, dataset_digest=half.digest, class_names=half.class_names,
        expected=expected, skipped=skipped,
    )  # fmt: skip
    return described, kept
