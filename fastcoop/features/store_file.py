"""One file of features: opened and mapped once, verified before its features are used, refused with the reason."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import mmap
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import MissingFile, UserError
from fastcoop.features.image_files import FILE, unknown_files

if sys.platform != "win32":
    import fcntl

FORMAT = "fastcoop features"
FORMAT_VERSION = 2
META = "meta"
META_SHA256 = "meta_sha256"
FILES_SHA256 = "files_sha256"
HASHED = ("index", "labels", "features")
FILE_FIELDS = ("file_size", "file_mtime_ns", "file_sha256")
ROWS_AT_ONCE = 256  # where all of a file is read
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "pillow", "numpy", "h5py")  # that features depend on
IMPORTED = "imported"  # the recipe of features computed elsewhere

_verified: set[tuple[Any, ...]] = set()  # contents whose digest this process has computed


@dataclass(frozen=True)
class StoreMeta:
    """What a store's features were made from. Two stores of equal fields hold equal features, row by row."""

    backbone: str
    backbone_digest: str
    dataset: str
    dataset_digest: str
    dim: int  # feature size
    recipe: str  # "current" or "official-2021"; "imported" for features computed elsewhere
    view_seed: int  # seed of the augmentations
    views: int  # augmented views per training image, in addition to view 0
    dtype: str  # "float16" or "float32", in which features are stored
    class_names: tuple[str, ...]
    template: str
    expected: Mapping[str, int]  # images in each split; all of "val" and "test", part of "train", are stored
    skipped: Mapping[str, Sequence[int]]  # split -> indices left out because the image could not be read
    sha256: Mapping[str, str]  # split -> digest of its rows' indices, labels and features
    versions: Mapping[str, str]  # of the packages that made the features
    compute_dtype: str = "float32"  # the backbone's dtype when it computed them

    @classmethod
    def of(cls, backbone: Backbone, dataset: Dataset, **facts: Any) -> StoreMeta:
        """Describe features of ``dataset`` by ``backbone`` that are about to be written; ``facts``: other fields."""
        return cls(
            backbone=backbone.name,
            backbone_digest=backbone.digest,
            dataset=dataset.name,
            dataset_digest=dataset.digest,
            dim=backbone.embed_dim,
            class_names=dataset.class_names,
            template=dataset.template,
            expected={split: len(images) for split, images in dataset.splits.items()},
            sha256={},
            versions={name: metadata.version(name) for name in PACKAGES},
            **facts,
        )

    def views_of(self, split: str) -> int:
        """Return the features stored of each image: only training images have augmented views."""
        return 1 + self.views if split == "train" else 1


@dataclass(frozen=True, eq=False)
class SplitRows:
    """The stored images of one split, or some of them."""

    index: np.ndarray  # int64 (n,), ascending: which of the split's images are stored
    labels: np.ndarray  # int64 (n,)
    files: np.ndarray  # `FILE` records (n,) of the image files when they were encoded
    rows: np.ndarray | None = None  # int64 (n,), their rows in the file's features; None: all

    def take(self, chosen: np.ndarray) -> SplitRows:
        """Return the rows ``chosen``, ascending."""
        rows = chosen if self.rows is None else self.rows[chosen]
        return SplitRows(self.index[chosen], self.labels[chosen], self.files[chosen], rows)


@dataclass(frozen=True, eq=False)
class StoreVersion:
    """What a store held when it was opened; a process that opens it later compares."""

    sha256: Mapping[str, str]  # split -> digest of its contents
    index: Mapping[str, np.ndarray]  # split -> its stored images
    views: int  # augmented views per training image


@dataclass(frozen=True, eq=False)
class StoreFile:
    """A store's file as it was when it was opened: another file at its path changes nothing."""

    path: Path
    meta: StoreMeta
    splits: Mapping[str, SplitRows]  # all stored images
    features: Mapping[str, np.ndarray]  # split -> (n, views, dim), mapped from the file and not verified
    content: bytes | mmap.mmap
    identity: tuple[int, ...]  # device, inode, size and times

    @classmethod
    def open(cls, path: Path) -> StoreFile:
        """Map a file and read everything but its features and paths.

        Raises:
            MissingFile: There is no file.
            UserError: The file cannot be read, is damaged or of a newer format.
        """
        with reading(path), path.open("rb") as file:
            now = os.fstat(file.fileno())
            identity = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            with _read_lock(file):
                content = _map(file)
                with h5py.File(_seekable(content), "r") as store:
                    meta, version = _read_meta(path, store)
                    read = {
                        name: _read_split(store[name], name, meta, version, content) for name in meta.expected
                    }
        splits = {name: split for name, (split, _) in read.items()}
        return cls(path, meta, splits, {name: one for name, (_, one) in read.items()}, content, identity)

    @property
    def version(self) -> StoreVersion:
        """What the file holds, small enough to send to other processes."""
        index = {name: split.index for name, split in self.splits.items()}
        return StoreVersion(self.meta.sha256, index, self.meta.views)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.version)

    def as_version(self, version: StoreVersion) -> StoreFile:
        """Return this file, or the part of it that ``version`` held.

        Raises:
            UserError: Images that ``version`` held are not in this file, or have other features.
        """
        if self.meta.sha256 == version.sha256:
            return self
        meta = replace(self.meta, sha256=version.sha256, views=version.views)
        splits, features = {}, {}
        for name, index in version.index.items():
            here = self.splits.get(name)
            if here is None or not np.isin(index, here.index).all():
                raise self._replaced()
            rows = np.searchsorted(here.index, index)
            splits[name] = replace(here.take(rows), rows=None)
            features[name] = self.features[name][rows, : meta.views_of(name)]
            if _split_sha256(splits[name], features[name]) != version.sha256[name]:
                raise self._replaced()
        return replace(self, meta=meta, splits=splits, features=features)

    def _replaced(self) -> UserError:
        return UserError(
            f"Another process has written other features to {self.path} since this work was planned; run the same "
            "command again."
        )

    def problems(self, split: str) -> list[str]:
        """Return what is wrong with a split's contents, in sentences: its digest, and features that are no numbers."""
        features, found = self.features[split], []
        if _split_sha256(self.splits[split], features) != self.meta.sha256.get(split):
            found.append(f"The {split} features have changed since they were written: digests differ.")
        unusable = sum(
            unusable_rows(features[start : start + ROWS_AT_ONCE]).sum()
            for start in range(0, len(features), ROWS_AT_ONCE)
        )
        if unusable:
            found.append(f"The {split} features of {unusable} images are not finite, or all zeros.")
        return found

    def verified(self, split: str) -> np.ndarray:
        """Return a split's features (n, views, dim), after one pass that compares their digest, once per process.

        Raises:
            UserError: The contents are not those that were written.
        """
        known = (*self.identity, split, self.meta.sha256.get(split))
        if known not in _verified:
            if found := self.problems(split):
                raise damaged(self.path, " ".join(found))
            _verified.add(known)
        return self.features[split]

    def paths(self, split: str) -> np.ndarray:
        """Return the paths of a split's images, text (n,), as the file holds them."""
        with reading(self.path), h5py.File(_seekable(self.content), "r") as file:
            paths: np.ndarray = file[split]["paths"].asstr("utf-8", "surrogateescape")[:]
            if len(paths) != file[split]["index"].size:
                raise ValueError(f"it does not have one path for each of its {split} images")
        return paths


def _reopen(path: Path, version: StoreVersion) -> StoreFile:
    return StoreFile.open(path).as_version(version)


def content_sha256(split: Mapping[str, Any], fields: Sequence[str] = HASHED) -> str:
    """Return the sha256 hex of a split's indices, labels and features, or of other fields."""
    digest = hashlib.sha256()
    for field in fields:
        data = split[field]
        digest.update(f"{field} {data.shape} {data.dtype.str}\n".encode())
        for start in range(0, len(data), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(data[start : start + ROWS_AT_ONCE]).data)
    return digest.hexdigest()


def _split_sha256(split: SplitRows, features: np.ndarray) -> str:
    return content_sha256({"index": split.index, "labels": split.labels, "features": features})


def unusable_rows(features: np.ndarray) -> np.ndarray:
    """Return, for features (n, views, dim), bool (n,): which have a view that is not finite or all zeros."""
    return ~(np.isfinite(features).all(axis=2) & features.any(axis=2)).all(axis=1)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a store into a UserError that names the reason."""
    try:
        yield
    except (UserError, UnicodeEncodeError):  # the latter of a path that the locale cannot write
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(
            f"There is no feature store {path}; make it with `fastcoop cache-features`."
        ) from error
    except BlockingIOError as error:
        raise UserError(
            f"{path} is open for writing in another program; close that program and run the same command again."
        ) from error
    except OSError as error:
        if path.is_dir():
            raise UserError(
                f"Expected a feature store at {path}, got a folder; move it away or use another cache folder."
            ) from error
        if error.errno is None:  # raised by HDF5 for the contents
            raise damaged(path, error) from error
        raise UserError(
            f"{path} cannot be read ({os.strerror(error.errno)}); {_advice(error.errno)}."
        ) from error
    except Exception as error:  # damaged files may raise any exception
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> UserError:
    """Return the error for a store whose contents are not those that were written."""
    return UserError(
        f"{path} should be a feature store but is damaged or cut short ({reason}); move it away and make it again with "
        "`fastcoop cache-features`, or with `fastcoop features import` where its features were imported."
    )


def _advice(code: int) -> str:
    if code in (errno.EACCES, errno.EPERM):
        return "change its permissions or use another cache folder"
    if code in (errno.EMFILE, errno.ENFILE):
        return "close other programs or allow more open files (ulimit -n), and run the same command again"
    return "check the disk and run the same command again"


@contextmanager
def _read_lock(file: BinaryIO) -> Iterator[None]:
    """Hold HDF5's own lock for readers, which excludes programs that write to the file.

    Raises:
        BlockingIOError: Such a program holds the file.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # the mapping keeps the file open, and the lock with it


def _map(file: BinaryIO) -> bytes | mmap.mmap:
    """Map the file. On Windows a mapped file cannot be replaced, so its bytes are read."""
    if sys.platform == "win32":
        return file.read()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _seekable(content: bytes | mmap.mmap) -> Any:
    return io.BytesIO(content) if isinstance(content, bytes) else content


def _read_meta(path: Path, file: h5py.File) -> tuple[StoreMeta, int]:
    if file.attrs.get("format") != FORMAT:
        raise UserError(f"{path} is an HDF5 file but not a feature store of fastcoop.")
    version = int(file.attrs["format_version"])
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version} and this fastcoop reads up to {FORMAT_VERSION}; "
            "update fastcoop, or use another cache folder."
        )
    text = file[META].asstr()[()]
    if version > 1 and hashlib.sha256(text.encode()).hexdigest() != file.attrs[META_SHA256]:
        raise ValueError("its description has changed since it was written")
    fields: dict[str, Any] = json.loads(text)
    fields["class_names"] = tuple(fields["class_names"])
    return StoreMeta(**fields), version


def _read_split(
    group: h5py.Group, name: str, meta: StoreMeta, version: int, content: bytes | mmap.mmap
) -> tuple[SplitRows, np.ndarray]:
    """Check a split's tables, and return them and its features, mapped."""
    features, index, labels = group["features"], group["index"][:], group["labels"][:]
    shape = (len(index), meta.views_of(name), meta.dim)
    if (features.shape, features.dtype) != (shape, np.dtype(meta.dtype)):
        raise ValueError(
            f"its {name} features are {features.dtype} {features.shape}, not {meta.dtype} {shape}"
        )
    if (np.diff(index, prepend=-1) <= 0).any() or (index >= meta.expected[name]).any():
        raise ValueError(f"the numbers of its {name} images do not ascend within the split")
    if len(labels) != len(index) or ((labels < 0) | (labels >= len(meta.class_names))).any():
        raise ValueError(f"it does not have one label that names a class for each of its {name} images")
    files = unknown_files(len(index))
    if version > 1:
        if content_sha256(group, FILE_FIELDS) != group.attrs[FILES_SHA256]:
            raise ValueError(f"its records of {name} image files have changed since they were written")
        for field, column in zip(FILE.names or (), FILE_FIELDS, strict=True):
            files[field] = group[column][:]
    split = SplitRows(index, labels, files)
    if not features.size:
        return split, np.zeros(shape, features.dtype)
    offset = features.id.get_offset()
    if offset is None or offset + features.nbytes > len(content):
        raise ValueError(f"its {name} features do not lie in it in one piece")
    flat = np.frombuffer(content, features.dtype, features.size, offset)
    return split, flat.reshape(shape)
