"""The feature store: one HDF5 file per backbone and dataset, and how it is opened, refused and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, Split, load_dataset
from fastcoop.datasets.dataset import content_digest, warn_once
from fastcoop.datasets.halves import half_of, rows_in_whole, split_spec
from fastcoop.errors import UserError
from fastcoop.features.image_files import ImageFiles, find_changes
from fastcoop.features.store_file import (
    IMPORTED,
    ROWS_AT_ONCE,
    Meta,
    MissingStore,
    StoreFile,
    StoreVersion,
    damaged,
)


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


@dataclass(frozen=True, eq=False)
class Compared:
    """What comparing a store with its image files has found.

    Attributes:
        changed: for each split with any, the indices of images whose files hold other bytes than when they were
            encoded, in the whole dataset.
        renewed: whether files were found with another time and the same bytes.
    """

    changed: Mapping[str, np.ndarray]
    renewed: bool

    @property
    def count(self) -> int:
        """Images whose files have changed."""
        return sum(len(indices) for indices in self.changed.values())


class FeatureStore:
    """Raw image features of one dataset by one backbone. Open it with ``FeatureStore.open``."""

    def __init__(
        self, file: StoreFile, meta: Meta, tables: Mapping[str, _Table], template: str, compared: Compared
    ):
        self.path = file.path
        self.compared = compared
        self.meta = meta
        self._file = file
        self.template = template
        self._tables = tables

    @classmethod
    def open(
        cls,
        path: str | Path,
        backbone: Backbone | None = None,
        dataset: Dataset | None = None,
        version: StoreVersion | None = None,
        only_unchanged: bool = False,
    ) -> FeatureStore:
        """Open a store, made by ``backbone`` from ``dataset`` where these are given.

        Only metadata is read; features stay on disk until asked for, and their digest is computed then. The file is
        kept open: if another takes its place, what this store reads stays as it is.

        Args:
            path: of the store.
            backbone, dataset: what it must be made of; None for anything. The template is then the dataset's own,
                since it plays no part in features.
            version: what the store must hold, ``FeatureStore.version`` of one that was opened earlier.
            only_unchanged: leave out images of ``dataset`` whose files hold other bytes than when they were encoded.
                Without it files are not looked at; ``cache_features`` does that.

        Raises:
            UserError: no such file, damaged, of a newer format, made with other weights or another version of the
                dataset (both digests named), or without what ``version`` held.
        """
        path = Path(path)
        file = StoreFile.open(path)
        if version is not None:
            file = file.as_version(version)
        meta, tables = file.meta, {split: _Table.of(file, split) for split in file.splits}
        compared = Compared({}, False)
        if backbone is not None:
            _refuse_unless_equal(path, "weights", meta.backbone, meta.backbone_digest, backbone)
        if dataset is not None:
            whole = dataset.whole or dataset
            _refuse_unless_equal(path, "images", meta.dataset, meta.dataset_digest, whole)
            if only_unchanged and whole.store is None:
                meta, tables, compared = _unchanged(path, meta, tables, whole)
            if dataset.whole is not None:
                meta, tables = _half(meta, tables, dataset)
        return cls(file, meta, tables, meta.template if dataset is None else dataset.template, compared)

    @property
    def version(self) -> StoreVersion:
        """What the file holds, small enough to send to other processes."""
        return self._file.version

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

    def labels(self, split: str) -> np.ndarray:
        """int64 (n,): the stored images' labels, in the order of ``indices``."""
        table = self._table(split)
        table.features()  # verifies labels, too
        return table.labels

    def paths(self, split: str) -> tuple[str, ...]:
        """The stored images' paths, in the order of ``indices``."""
        rows = self._table(split).rows
        paths = self._file.paths(split)
        return tuple(paths if rows is None else paths[rows])

    def files(self, split: str) -> ImageFiles:
        """The stored images' files as they were when they were encoded, in the order of ``indices``."""
        return self._table(split).files

    def problems(self, split: str) -> list[str]:
        """What is wrong with the contents of a split, in sentences, from one pass over all of it."""
        return self._file.problems(split)

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
        return torch.from_numpy(self.labels("train")[self._rows("train", indices)])

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """All of "val" or "test": float32 (n, dim) features of view 0 and int64 (n,) labels."""
        table = self._table(name)
        rows = self._rows(name, np.arange(self.meta.expected[name]))
        return table.read(rows, 1)[:, 0], torch.from_numpy(table.labels[rows])

    def raw(self, split: str, rows: slice) -> np.ndarray:
        """Features as stored, (rows, views, dim) in the store's dtype, of consecutive ``indices``."""
        return self._table(split).stored(rows)

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
            splits[name] = Split(tuple(paths[row] for row in rows), self.labels(name)[rows])
        if content_digest(self.class_names, splits) != self.meta.dataset_digest:
            raise damaged(self.path, "its class names, paths and labels are not those that were written")
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


def open_if_there(
    path: Path, backbone: Backbone, dataset: Dataset, only_unchanged: bool = False
) -> FeatureStore | None:
    """``FeatureStore.open``; None if there is no file.

    Raises UserError as that does.
    """
    try:
        return FeatureStore.open(path, backbone, dataset, only_unchanged=only_unchanged)
    except MissingStore:
        return None


@dataclass(frozen=True, eq=False)
class _Table:
    """One split of a file, or some of its rows.

    Attributes:
        index, labels: int64 (n,), of the images, ``index`` ascending.
        rows: int64 (n,), of the file's; None for all.
        files: what the n image files were when they were encoded.
    """

    file: StoreFile
    split: str
    index: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None
    files: ImageFiles

    @classmethod
    def of(cls, file: StoreFile, split: str) -> _Table:
        """All of a split."""
        stored = file.splits[split]
        return cls(file, split, stored.index, stored.labels, None, stored.files)

    def features(self) -> np.ndarray:
        """All features of the file's split, (n, views, dim) in its dtype. Raises UserError for a damaged file."""
        self.file.verify(self.split)
        return self.file.splits[self.split].features

    def take(self, rows: np.ndarray) -> _Table:
        """Some rows, ascending."""
        inner = rows if self.rows is None else self.rows[rows]
        return replace(
            self, index=self.index[rows], labels=self.labels[rows], rows=inner, files=self.files.take(rows)
        )

    def read(self, rows: np.ndarray, views: int | None = None) -> Tensor:
        """float32 (len(rows), views, dim): the first views, or all."""
        out = torch.empty(len(rows), *self.features()[:0, :views].shape[1:], dtype=torch.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):  # no second copy of everything in half precision
            part = slice(start, start + ROWS_AT_ONCE)
            out[part] = torch.from_numpy(self.stored(rows[part], views))
        return out

    def stored(self, rows: np.ndarray | slice, views: int | None = None) -> np.ndarray:
        """(len(rows), views, dim) in the file's dtype: the first views, or all."""
        return self.features()[rows if self.rows is None else self.rows[rows], :views]


def _refuse_unless_equal(path: Path, what: str, name: str, digest: str, asked: Backbone | Dataset) -> None:
    if digest != asked.digest:
        raise UserError(
            f"{path} was made from other {what}: it holds {name} ({digest[:12]}) and {asked.name} "
            f"({asked.digest[:12]}) was asked for; use another cache folder or move the file away."
        )


def _unchanged(
    path: Path, meta: Meta, tables: Mapping[str, _Table], dataset: Dataset
) -> tuple[Meta, dict[str, _Table], Compared]:
    """What a store holds without images whose files have changed; times of files are today's where the bytes are equal.

    The digests of splits that lack images are other ones.
    """
    kept, sha256, changed, renewed = {}, dict(meta.sha256), {}, False
    for name, table in tables.items():
        paths = [dataset.root / dataset.splits[name].paths[index] for index in table.index]
        differs, files = find_changes(paths, table.files, f"Reading image files of {dataset.name}")
        renewed |= not np.array_equal(files.mtime_ns, table.files.mtime_ns)
        kept[name] = replace(table, files=files)
        if differs.any():
            changed[name] = table.index[differs]
            kept[name] = kept[name].take(np.flatnonzero(~differs))
            sha256[name] += f" without {changed[name].tolist()}"
    unknown = sum(int((~table.files.known).sum()) for table in kept.values())
    if unknown:
        warn_once(
            f"{path} does not record the image files of {unknown} images, since an older fastcoop wrote it: whether "
            "they have changed cannot be known. Delete it to encode them again."
        )
    return replace(meta, sha256=sha256), kept, Compared(changed, renewed)


def _half(meta: Meta, tables: Mapping[str, _Table], half: Dataset) -> tuple[Meta, dict[str, _Table]]:
    """What a store of all classes holds of half of them."""
    kept, expected, skipped = {}, {}, {}
    for name in (name for name in tables if name in half.splits):
        rows = rows_in_whole(half, name)
        table = tables[name].take(np.flatnonzero(np.isin(tables[name].index, rows)))
        index = np.searchsorted(rows, table.index)
        kept[name] = replace(table, index=index, labels=half.splits[name].labels[index])
        expected[name] = len(rows)
        left_out = np.asarray(meta.skipped.get(name, ()), np.int64)
        skipped[name] = np.searchsorted(rows, left_out[np.isin(left_out, rows)]).tolist()
    described = replace(
        meta, dataset=half.name, dataset_digest=half.digest, class_names=half.class_names,
        expected=expected, skipped=skipped,
    )  # fmt: skip
    return described, kept
