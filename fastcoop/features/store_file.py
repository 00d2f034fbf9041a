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
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from fastcoop.errors import MissingFile, UserError
from fastcoop.features.image_files import ImageFiles

if sys.platform != "win32":
    import fcntl

FORMAT = "fastcoop features"
FORMAT_VERSION = 2
META = "meta"
META_SHA256 = "meta_sha256"
FILES_SHA256 = "files_sha256"
HASHED = ("index", "labels", "features")
FILE_FIELDS = ("file_size", "file_mtime_ns", "file_sha256")
ROWS_AT_ONCE = 256  # where all of a file is gone through
IMPORTED = "imported"  # the recipe of features computed elsewhere

_verified: set[tuple[Any, ...]] = set()  # contents whose digest this process has computed


class MissingStore(MissingFile):
    """There is no file at the path."""


@dataclass(frozen=True)
class Meta:
    """What a store's features came from. Two stores with equal fields hold equal features, row by row.

    Attributes:
        backbone, backbone_digest, dataset, dataset_digest: names and content digests.
        dim: feature size.
        recipe: "current" or "official-2021"; "imported" for features computed elsewhere.
        view_seed: of the augmentations.
        views: augmented views per training image, beside view 0.
        dtype: "float16" or "float32", in which features are stored.
        class_names, template: of the dataset.
        expected: images in each split of the dataset; all of "val" and "test", part of "train", are stored.
        skipped: for each split the indices left out because the image could not be read.
        sha256: for each split, of its rows' indices, labels and features.
        versions: of the packages that made the features.
        compute_dtype: the backbone's dtype when it computed them.
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
    compute_dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class StoredSplit:
    """One split of a file.

    Attributes:
        index: int64 (n,), ascending: which of the split's images are stored.
        labels: int64 (n,).
        features: (n, views, dim) in the store's dtype, mapped from the file.
        files: the n image files as they were when they were encoded.
    """

    index: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    files: ImageFiles


@dataclass(frozen=True, eq=False)
class StoreVersion:
    """What a store held when it was opened; a process that opens it later compares.

    Attributes:
        sha256: of each split's contents.
        index: of each split's stored images.
        views: of each training image, beside view 0.
    """

    sha256: Mapping[str, str]
    index: Mapping[str, np.ndarray]
    views: int


class StoreFile:
    """A store's file as it was when it was opened: another file at its path changes nothing."""

    def __init__(
        self,
        path: Path,
        meta: Meta,
        splits: Mapping[str, StoredSplit],
        content: bytes | mmap.mmap,
        identity: tuple[int, ...],
    ):
        self.path = path
        self.meta = meta
        self.splits = splits
        self._content = content
        self._identity = identity
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> StoreFile:
        """Map a file and read all but its features and paths.

        Raises UserError for no file (``MissingStore``), one that cannot be read, is damaged or of a newer format.
        """
        with reading(path), path.open("rb") as file:
            now = os.fstat(file.fileno())
            identity = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            with _read_lock(file):
                content = _mapped(file)
                with h5py.File(_seekable(content), "r") as store:
                    meta, splits = _parse(path, store, content)
        return cls(path, meta, splits, content, identity)

    @property
    def version(self) -> StoreVersion:
        """What the file holds, small enough to send to other processes."""
        index = {name: split.index for name, split in self.splits.items()}
        return StoreVersion(self.meta.sha256, index, self.meta.views)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.version)

    def as_version(self, version: StoreVersion) -> StoreFile:
        """This file, or what ``version`` held if this one holds more.

        Raises UserError if images that ``version`` held are not here, or have other features.
        """
        if self.meta.sha256 == version.sha256:
            return self
        splits = {}
        for name, index in version.index.items():
            here = self.splits.get(name)
            if here is None or not np.isin(index, here.index).all():
                raise self._replaced()
            rows = np.searchsorted(here.index, index)
            views = 1 + version.views if name == "train" else 1
            splits[name] = StoredSplit(
                index, here.labels[rows], here.features[rows, :views], here.files.take(rows)
            )
            if content_sha256(vars(splits[name])) != version.sha256[name]:
                raise self._replaced()
        meta = replace(self.meta, sha256=version.sha256, views=version.views)
        return StoreFile(self.path, meta, splits, self._content, self._identity)

    def _replaced(self) -> UserError:
        return UserError(
            f"Another process has written other features to {self.path} since this work was planned; run the same "
            "command again."
        )

    def problems(self, split: str) -> list[str]:
        """What is wrong with a split's contents, in sentences: one digest, and no feature that is none."""
        stored, found = self.splits[split], []
        if content_sha256(vars(stored)) != self.meta.sha256.get(split):
            found.append(f"The {split} features have changed since they were written: digests differ.")
        unusable = sum(
            unusable_rows(stored.features[start : start + ROWS_AT_ONCE]).sum()
            for start in range(0, len(stored.index), ROWS_AT_ONCE)
        )
        if unusable:
            found.append(f"The {split} features of {unusable} images are not finite, or all zeros.")
        return found

    def verify(self, split: str) -> None:
        """Refuse a split whose contents are not those that were written. Costs one pass, once per process and file.

        Raises UserError.
        """
        if split in self._verified:
            return
        known = (*self._identity, split, self.meta.sha256.get(split))
        if known not in _verified:
            if found := self.problems(split):
                raise damaged(self.path, " ".join(found))
            _verified.add(known)
        self._verified.add(split)

    def paths(self, split: str) -> np.ndarray:
        """The paths of a split's images, text (n,), as the file holds them."""
        with reading(self.path), h5py.File(_seekable(self._content), "r") as file:
            paths: np.ndarray = file[split]["paths"].asstr("utf-8", "surrogateescape")[:]
            if len(paths) != file[split]["index"].size:
                raise ValueError(f"it does not have one path for each of its {split} images")
        return paths


def _reopen(path: Path, version: StoreVersion) -> StoreFile:
    return StoreFile.open(path).as_version(version)


def content_sha256(split: Mapping[str, Any], fields: Sequence[str] = HASHED) -> str:
    """sha256 hex over a split's indices, labels and features, or other fields, in arrays or an HDF5 group."""
    digest = hashlib.sha256()
    for field in fields:
        data = split[field]
        digest.update(f"{field} {data.shape} {data.dtype.str}\n".encode())
        for start in range(0, len(data), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(data[start : start + ROWS_AT_ONCE]).data)
    return digest.hexdigest()


def unusable_rows(features: np.ndarray) -> np.ndarray:
    """bool (n,): which of features (n, views, dim) have a view that is not finite or all zeros."""
    return ~(np.isfinite(features).all(axis=2) & features.any(axis=2)).all(axis=1)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a store is read into a UserError that says what it is."""
    try:
        yield
    except (UserError, UnicodeEncodeError):  # the latter of a path that the locale cannot write
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingStore(
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
        if error.errno is None:  # HDF5's own complaint about the contents
            raise damaged(path, error) from error
        raise UserError(
            f"{path} cannot be read ({os.strerror(error.errno)}); {_advice(error.errno)}."
        ) from error
    except Exception as error:  # damaged files may raise any exception
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> UserError:
    """The error for a store whose contents are not those that were written."""
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
    """Hold HDF5's own lock for readers, which no program that writes to the file lets go.

    Raises BlockingIOError.
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


def _mapped(file: BinaryIO) -> bytes | mmap.mmap:
    """The file's bytes. On Windows a mapped file cannot be replaced, so that they are read there."""
    if sys.platform == "win32":
        return file.read()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _seekable(content: bytes | mmap.mmap) -> Any:
    return io.BytesIO(content) if isinstance(content, bytes) else content


def _parse(path: Path, file: h5py.File, content: bytes | mmap.mmap) -> tuple[Meta, dict[str, StoredSplit]]:
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
    meta = Meta(**fields)
    return meta, {name: _parse_split(file[name], name, meta, version, content) for name in meta.expected}


def _parse_split(
    group: h5py.Group, name: str, meta: Meta, version: int, content: bytes | mmap.mmap
) -> StoredSplit:
    features, index, labels = group["features"], group["index"][:], group["labels"][:]
    shape = (len(index), 1 + meta.views if name == "train" else 1, meta.dim)
    if (features.shape, features.dtype) != (shape, np.dtype(meta.dtype)):
        raise ValueError(
            f"its {name} features are {features.dtype} {features.shape}, not {meta.dtype} {shape}"
        )
    if (np.diff(index, prepend=-1) <= 0).any() or (index >= meta.expected[name]).any():
        raise ValueError(f"the numbers of its {name} images do not ascend within the split")
    if len(labels) != len(index) or ((labels < 0) | (labels >= len(meta.class_names))).any():
        raise ValueError(f"it does not have one label that names a class for each of its {name} images")
    files = ImageFiles.unknown(len(index))
    if version > 1:
        if content_sha256(group, FILE_FIELDS) != group.attrs[FILES_SHA256]:
            raise ValueError(f"its records of {name} image files have changed since they were written")
        files = ImageFiles(*(group[field][:] for field in FILE_FIELDS))
    if not features.size:
        return StoredSplit(index, labels, np.zeros(shape, features.dtype), files)
    offset = features.id.get_offset()
    if offset is None or offset + features.nbytes > len(content):
        raise ValueError(f"its {name} features do not lie in it in one piece")
    flat = np.frombuffer(content, features.dtype, features.size, offset)
    return StoredSplit(index, labels, flat.reshape(shape), files)
