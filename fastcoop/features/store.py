"""The feature store: one HDF5 file per backbone and dataset, and how it is opened, refused and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcoop import backbones
from fastcoop.datasets import Dataset, Split, load_dataset
from fastcoop.datasets.dataset import (
    check_name_and_template,
    content_digest,
    half_of,
    rows_in_whole,
    split_spec,
)
from fastcoop.datasets.load import ClassNames, own_specs
from fastcoop.errors import MissingFile, UserError, abbreviate
from fastcoop.features.image_files import find_changes
from fastcoop.features.store_file import (
    BEFORE,
    FEATURES,
    FLIP,
    IMPORTED,
    ROWS_AT_ONCE,
    TIP,
    StoredSplit,
    StoreFile,
    StoreMeta,
    StoreVersion,
    damaged,
)
from fastcoop.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fastcoop.backbones import Backbone

BEFORE_TESTED = (f"val/{BEFORE}", f"test/{BEFORE}")


def store_path(cache_root: str | Path, backbone: Backbone, dataset: Dataset) -> Path:
    """Return the store of ``backbone`` and ``dataset``: ``<cache_root>/<backbone>/<dataset>.h5``.

    Half of a dataset's classes share the whole dataset's store. A dataset of imported features is its own store.
    """
    dataset = dataset.whole or dataset
    if dataset.store is not None:
        return dataset.store
    return Path(cache_root) / backbone.name / f"{dataset.name}.h5"


def find_datasets(
    specs: Iterable[str | Path | Dataset], data_root: str | Path | None, class_names: ClassNames | None = None
) -> dict[str | Path | Dataset, Dataset]:
    """Load datasets as `find_dataset`; ``class_names`` are those of the only one that is the user's own, else a
    UserError."""
    specs = list(dict.fromkeys(specs))
    own = own_specs(specs, data_root) if class_names is not None else []
    if class_names is not None and len(own) != 1:
        raise UserError(
            f"Class names are for a single dataset of your own, got {abbreviate(own) or 'none'}; leave them out, or "
            "name a file under class_names in the dataset.yaml of each."
        )

    def names_for(spec: str | Path | Dataset) -> ClassNames | None:
        return class_names if not isinstance(spec, Dataset) and split_spec(str(spec))[0] in own else None

    return {spec: find_dataset(spec, data_root, names_for(spec)) for spec in specs}


def find_dataset(
    spec: str | Path | Dataset, data_root: str | Path | None = None, class_names: ClassNames | None = None
) -> Dataset:
    """Load a dataset as `load_dataset`, or from its imported features.

    Args:
        spec: What `load_dataset` takes; or the path of a store (``*.h5``), itself or relative to ``data_root``.
        data_root: Folder of datasets; the current one if None.
        class_names: As `load_dataset` takes them, for images.

    Raises:
        UserError: As `load_dataset` and `FeatureStore.open`.
    """
    name, half = ("", None) if isinstance(spec, Dataset) else split_spec(str(spec))
    if Path(name).suffix != ".h5":
        return load_dataset(spec, data_root, class_names)
    under_root = Path(data_root or "").expanduser() / name
    store = FeatureStore.open(under_root if under_root.is_file() else Path(name).expanduser())
    return store.as_dataset() if half is None else half_of(store.as_dataset(), half)


@dataclass(frozen=True, eq=False, repr=False)
class FeatureStore:
    """Raw image features of one dataset by one backbone. Open it with `FeatureStore.open`.

    Attributes:
        file: The file.
        meta: What the features were made from.
        changed: Split -> indices, in the whole dataset, of images left out because their files have changed.
        has_new_times: Whether image files with the same bytes have other times now than are stored.
    """

    file: StoreFile
    meta: StoreMeta
    _splits: Mapping[str, StoredSplit]
    changed: Mapping[str, np.ndarray] = field(default_factory=dict)
    has_new_times: bool = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        backbone: str | Path | Backbone | None = None,
        dataset: str | Path | Dataset | None = None,
        version: StoreVersion | None = None,
        only_unchanged: bool = False,
    ) -> FeatureStore:
        """Open a store, made by ``backbone`` from ``dataset`` where these are given.

        Only metadata is read; features stay on disk until they are used, and their digest is compared then. The file
        stays open: if another replaces it, this store reads the same features as before.

        Args:
            path: Path of the store.
            backbone: Backbone it must be made by, as `backbone_from_spec` takes it; None: any.
            dataset: Dataset it must be made of, as `find_dataset` takes it; None: any.
            version: What the store must hold: ``store.file.version`` of one opened earlier.
            only_unchanged: Leave out images of ``dataset`` whose files have changed since they were encoded. By
                default, files are not compared.

        Raises:
            MissingFile: There is no such file.
            UserError: The file is damaged, of a newer format, made with other weights or another version of the
                dataset (both digests are named), or lacks what ``version`` held.
        """
        file = StoreFile.open(Path(path))
        if version is not None:
            file = file.as_version(version)
        store = cls(file, file.meta, file.splits)
        if backbone is not None:
            if isinstance(backbone, str | Path):
                backbone = backbones.backbone_from_spec(backbone, device="cpu")
            _refuse_other(path, "weights", store.meta.backbone, store.meta.backbone_digest, backbone)
        if dataset is not None:
            dataset = find_dataset(dataset)
            whole, made_of = dataset.whole or dataset, store.meta.dataset_digest
            if whole.digest != made_of == content_digest(store.meta.class_names, whole.splits):
                names = zip(store.meta.class_names, whole.class_names, strict=False)
                changed = [f'"{old}" is now "{new}"' for old, new in names if old != new]
                raise UserError(
                    f"{path} was made with other class names: {abbreviate(changed, 2)}; give the names as before, or "
                    "use another cache folder."
                )
            _refuse_other(path, "images", store.meta.dataset, store.meta.dataset_digest, whole)
            if only_unchanged and whole.store is None:
                store = store._without_changed_images(whole)
            if dataset.whole is not None:
                store = store._half(dataset)
        return store

    @property
    def path(self) -> Path:
        """Path of the store."""
        return self.file.path

    @property
    def changed_images(self) -> int:
        """Number of images left out because their files have changed."""
        return sum(len(indices) for indices in self.changed.values())

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits stored: "test", and mostly "train" and "val"."""
        return tuple(self._splits)

    @cached_property
    def digest(self) -> str:
        """sha256 hex of these features in the keys of runs, in addition to the images' `train_digest`.

        It covers what the features were made from and the validation and test features, not which training images are
        cached, nor in how many views: caching more later leaves it unchanged. Imported features are covered whole.
        """
        meta = self.meta
        facts = [meta.backbone_digest, meta.dataset_digest, meta.recipe, meta.view_seed, meta.dtype]
        whole = meta.recipe == IMPORTED
        hashed = {name: one for name, one in meta.sha256.items() if whole or name != "train"}
        return hashlib.sha256(json.dumps([*facts, hashed], sort_keys=True).encode()).hexdigest()

    @property
    def before_digest(self) -> str | None:
        """sha256 hex of the validation and test features before the projection; None if they are not stored."""
        hashed = {name: one for name, one in self.meta.kinds_sha256.items() if name in BEFORE_TESTED}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest() if hashed else None

    def train_digest(self, indices: np.ndarray) -> str | None:
        """Return the sha256 hex of training images' features, by their test-time crops; None if some are not cached.

        It also covers which of the images were skipped as unreadable.

        Args:
            indices: (n,) into the dataset's training split.
        """
        try:
            rows = self._rows("train", indices)
        except UserError:
            return None
        digest = hashlib.sha256(self.indices("train")[rows].astype("<i8").tobytes())
        for start in range(0, len(rows), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(self.raw("train", rows[start : start + ROWS_AT_ONCE], 1)).data)
        return digest.hexdigest()

    def indices(self, split: str) -> np.ndarray:
        """Return int64 (n,), ascending: which of the split's images are stored."""
        return self._split(split).index

    def skipped(self, split: str) -> np.ndarray:
        """Return int64 (n,): which of the split's images were left out because they could not be read."""
        return np.asarray(self.meta.skipped.get(split, ()), np.int64)

    def labels(self, split: str) -> np.ndarray:
        """Return int64 (n,): the stored images' labels, in the order of `indices`."""
        self.raw(split, slice(0))  # verifies the contents
        return self._split(split).labels

    def paths(self, split: str) -> tuple[str, ...]:
        """Return the stored images' paths, in the order of `indices`."""
        rows, paths = self._split(split).rows, self.file.paths(split)
        return tuple(paths if rows is None else paths[rows])

    def files(self, split: str) -> np.ndarray:
        """Return `FILE` records (n,) of the stored images' files when they were encoded, in the order of `indices`."""
        return self._split(split).files

    def train(
        self, indices: Sequence[int] | np.ndarray, *, kind: str = "coop", as_stored: bool = False
    ) -> Tensor:
        """Return features of training images, (n, 1 + views, dim); view 0 is the test-time crop.

        Args:
            indices: (n,) into the dataset's training split. Those skipped as unreadable are left out.
            kind: Kind of the features: "coop", "tip", "flip" or "pre", as `cache_features` takes them. Imported
                features have one set of augmented views, which stands for any kind but "pre"; of it, runs that read
                "flip" take the first.
            as_stored: Whether to return them in the store's dtype, in place of float32.

        Raises:
            UserError: An image or the kind is not in the store.
        """
        rows, array = self._rows("train", indices), self._array(kind)
        found = self.raw("train", rows, None, array)
        if array in (TIP, FLIP):  # arrays without view 0
            found = np.concatenate([self.raw("train", rows, 1), found], 1)
        return _tensor(found if as_stored else found.astype(np.float32, copy=False))

    def train_labels(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Return labels of training images, int64 (n,), in the order of `train`."""
        return _tensor(self.labels("train")[self._rows("train", indices)])

    def split(self, name: str, kind: str = "coop") -> tuple[Tensor, Tensor]:
        """Return all of "val" or "test": float32 (n, dim) features of view 0 and int64 (n,) labels.

        Args:
            name: Name of the split.
            kind: Kind of the features, as `train` takes it. All but "pre" have the same view 0.
        """
        rows, array = self._rows(name), self._array(kind) if kind == BEFORE else FEATURES
        features = self.raw(name, rows, 1, array)[:, 0].astype(np.float32, copy=False)
        return _tensor(features), _tensor(self.labels(name)[rows])

    def raw(
        self, split: str, rows: slice | np.ndarray, views: int | None = None, array: str = FEATURES
    ) -> np.ndarray:
        """Return features as stored, (rows, views, dim) in the store's dtype: the first ``views``, or all.

        Args:
            split: "train", "val" or "test".
            rows: Positions in `indices`.
            views: Number of views.
            array: An array of ``meta.arrays(split)``.
        """
        inner = self._split(split).rows
        return self.file.verified(split, array)[rows if inner is None else inner[rows], :views]

    def _array(self, kind: str) -> str:
        """Return the array that holds a kind of training features."""
        imported = self.meta.recipe == IMPORTED
        if kind == "coop" or (imported and kind in (TIP, FLIP)):
            return FEATURES
        if kind in self.meta.kinds:
            return kind
        if imported:
            raise UserError(
                f"{self.path} holds imported features, without those before the image tower's projection; name a "
                "dataset of images."
            )
        raise UserError(
            f'{self.path} lacks features of the kind "{kind}"; add them with `fastcoop cache-features --kinds {kind}`.'
        )

    def as_dataset(self) -> Dataset:
        """Return the dataset of the store, without its images: for features that were imported.

        Raises:
            UserError: Not every image of the dataset is stored, or its name or prompt cannot be used.
        """
        for name, split in self._splits.items():
            if len(split.index) < (images := self.meta.expected[name]):
                raise UserError(
                    f"{self.path} has {len(split.index):,} of {images:,} {name} images, so it cannot stand for its "
                    f"dataset; name the dataset {self.meta.dataset} itself."
                )
        splits = {name: Split(self.paths(name), self.labels(name)) for name in self.splits}
        if content_digest(self.meta.class_names, splits) != self.meta.dataset_digest:
            raise damaged(self.path, "its class names, paths and labels are not those that were written")
        name, root = self.meta.dataset, self.path.parent
        check_name_and_template(name, self.meta.template, f"{self.path}: ")
        return Dataset(
            name=name, title=name, root=root, fewshot_dir=root / f"{name}.fewshot", store=self.path,
            class_names=self.meta.class_names, template=self.meta.template, splits=splits,
            digest=self.meta.dataset_digest,
        )  # fmt: skip

    def _without_changed_images(self, dataset: Dataset) -> FeatureStore:
        """Leave out images whose files have changed, and note the present times of files with the same bytes. The
        digests of splits that lack images differ from those of the file."""
        kept, changed, has_new_times = {}, {}, False
        sha256, kinds_sha256 = dict(self.meta.sha256), dict(self.meta.kinds_sha256)
        for name, split in self._splits.items():
            paths = [dataset.root / dataset.splits[name].paths[index] for index in split.index]
            differs, files = find_changes(paths, split.files, f"Reading image files of {dataset.name}")
            has_new_times |= not np.array_equal(files["mtime_ns"], split.files["mtime_ns"])
            kept[name] = replace(split, files=files)
            if differs.any():
                changed[name] = split.index[differs]
                kept[name] = kept[name].take(np.flatnonzero(~differs))
                for digests in (sha256, kinds_sha256):
                    for one in (one for one in digests if one.partition("/")[0] == name):
                        digests[one] += f" without {changed[name].tolist()}"
        meta = replace(self.meta, sha256=sha256, kinds_sha256=kinds_sha256)
        return replace(self, meta=meta, _splits=kept, changed=changed, has_new_times=has_new_times)

    def _half(self, half: Dataset) -> FeatureStore:
        """Return the images of half of the dataset's classes."""
        kept, expected, skipped = {}, {}, {}
        for name, split in ((name, split) for name, split in self._splits.items() if name in half.splits):
            rows, unread = rows_in_whole(half, name), self.skipped(name)
            taken = split.take(np.flatnonzero(np.isin(split.index, rows)))
            index = np.searchsorted(rows, taken.index)
            kept[name] = replace(taken, index=index, labels=half.splits[name].labels[index])
            expected[name] = len(rows)
            skipped[name] = np.searchsorted(rows, unread[np.isin(unread, rows)]).tolist()
        described = replace(
            self.meta, dataset=half.name, dataset_digest=half.digest, class_names=half.class_names,
            expected=expected, skipped=skipped,
        )  # fmt: skip
        return replace(self, meta=described, _splits=kept)

    def _split(self, name: str) -> StoredSplit:
        if name not in self._splits:
            raise UserError(f"{self.path} holds no {name} images, only {' and '.join(self._splits)}.")
        return self._splits[name]

    def _rows(self, split: str, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return the positions in `indices` of a split's images (None: all), without those skipped as unreadable."""
        index = self._split(split).index
        asked = np.asarray(np.arange(self.meta.expected[split]) if indices is None else indices, np.int64)
        asked = asked[~np.isin(asked, self.skipped(split))]
        missing = ~np.isin(asked, index)
        if missing.any():
            raise UserError(
                f"{self.path} lacks {missing.sum()} of the {len(asked)} {split} images asked for, "
                "for example of more shots or seeds; run `fastcoop cache-features` for them first."
            )
        return np.searchsorted(index, asked)


def open_if_there(
    path: Path, backbone: Backbone, dataset: Dataset, only_unchanged: bool = False
) -> FeatureStore | None:
    """Open a store as `FeatureStore.open`; return None if there is no file."""
    with suppress(MissingFile):
        return FeatureStore.open(path, backbone, dataset, only_unchanged=only_unchanged)
    return None


def open_current(path: Path, backbone: Backbone, dataset: Dataset) -> FeatureStore:
    """Open a store whose features have just been cached; a UserError says if an image file has changed meanwhile."""
    store = FeatureStore.open(path, backbone, dataset, only_unchanged=True)
    if store.changed_images:
        raise UserError(
            f"{counted(store.changed_images, 'image file')} of {dataset.name} changed while features were computed; "
            "run the same command again."
        )
    return store


def _tensor(array: np.ndarray) -> Tensor:
    import torch  # late: plans need none

    return torch.from_numpy(array)


def _refuse_other(path: str | Path, what: str, name: str, digest: str, asked: Backbone | Dataset) -> None:
    if digest != asked.digest:
        raise UserError(
            f"{path} was made from other {what}: it holds {name} ({digest[:12]}) and {asked.name} "
            f"({asked.digest[:12]}) was asked for; use another cache folder or move the file away."
        )
