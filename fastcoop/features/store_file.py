"""The file of a feature store: written whole or not at all, mapped when it is opened, verified before it is used."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import h5py
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from fastcoop.checks import shortened
from fastcoop.datasets import Split
from fastcoop.errors import MissingFile, UserError
from fastcoop.features.image_files import FILE, unknown_files
from fastcoop.files import PART, atomic_write

if sys.platform != "win32":
    import fcntl

FORMAT = "fastcoop features"
FORMAT_VERSION = 3  # that is read; files without further kinds of features are written as version 2
HEAP = b"GCOL\1\0\0\0"  # the start of a heap of texts in HDF5
META = "meta"
META_SHA256 = "meta_sha256"
FILES_SHA256 = "files_sha256"
FEATURES, TIP, FLIP, BEFORE = "features", "tip", "flip", "pre"  # arrays of features
KINDS = ("coop", TIP, FLIP, BEFORE)  # of training features
DTYPES = ("float16", "float32")  # of stored features
HASHED = ("index", "labels", FEATURES)
FILE_FIELDS = ("file_size", "file_mtime_ns", "file_sha256")
ROWS_AT_ONCE = 256  # where all of a file is read
IMPORTED = "imported"  # the recipe of features computed elsewhere
PERMISSIONS = "change its permissions or use another cache folder"
OPEN_FILES = "close other programs or allow more open files (ulimit -n), and run the same command again"
ADVICE = {  # by number of an error of the system
    **dict.fromkeys((errno.EACCES, errno.EPERM), PERMISSIONS),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), OPEN_FILES),
}

View = (
    int | str
)  # 0: the test-time crop; n: augmentation n; "tip n": Tip-Adapter's augmentation n; "flip": mirrored
# An array's name, rows (k,) ascending, views, features (k, views, dim).
Block = tuple[str, np.ndarray, slice, np.ndarray]
# What a store held when it was opened, small enough to send to processes that open it later: its description, and the
# stored images of each split.
StoreVersion = tuple["StoreMeta", Mapping[str, np.ndarray]]

_verified: set[tuple[Any, ...]] = set()  # contents whose digest this process has computed


def views_by_array(split: str, views: int, kinds: Mapping[str, int]) -> dict[str, tuple[View, ...]]:
    """Return the arrays of features of a split, and the views of an image that each holds.

    Only training images have augmented views: ``views`` of them in "features", beside the test-time crop, and those of
    ``kinds`` in further arrays: "tip" (Tip-Adapter's augmentations), "flip" (the test-time crop, mirrored) and "pre"
    (features before the projection, of the test-time crop and Tip-Adapter's augmentations).
    """
    if split != "train":
        test_crop: tuple[View, ...] = (0,)
        return dict.fromkeys([FEATURES, *(kind for kind in kinds if kind == BEFORE)], test_crop)
    tips = {kind: tuple(f"tip {view}" for view in range(1, 1 + count)) for kind, count in kinds.items()}
    own: dict[str, tuple[View, ...]] = {FLIP: (FLIP,), BEFORE: (0, *tips.get(BEFORE, ()))}
    return {FEATURES: tuple(range(1 + views))} | {kind: own.get(kind, tips[kind]) for kind in kinds}


# Counts that a file states, and indices below them, bounded: larger ones would take all memory.
ViewCount = Annotated[int, Field(ge=0, le=1_000_000)]
ImageCount = Annotated[int, Field(ge=0, le=100_000_000)]


@dataclass(frozen=True)
class StoreMeta:
    """What a store's features were made from. Two stores of equal fields hold equal features, row by row."""

    backbone: str
    backbone_digest: str
    dataset: str
    dataset_digest: str
    dim: int  # feature size
    recipe: str  # name of the image transforms; "imported" for features computed elsewhere
    view_seed: int  # seed of the augmentations
    views: ViewCount  # augmented views per training image, in addition to view 0
    dtype: str  # "float16" or "float32", in which features are stored
    class_names: tuple[str, ...]
    template: str
    # Images in each split; all of "val" and "test", part of "train", are stored.
    expected: Mapping[str, ImageCount]
    # Split -> indices left out because the image could not be read.
    skipped: Mapping[str, Sequence[ImageCount]]
    sha256: Mapping[str, str]  # split -> digest of its rows' indices, labels and features
    versions: Mapping[str, str]  # of the packages that made the features
    compute_dtype: str = "float32"  # the backbone's dtype when it computed them
    precision: str = "float32"  # of the products of a float32 backbone: "float32", "tf32" or "bfloat16"
    precision_difference: float | None = None  # largest measured from float32, relative to a feature's length
    # Further kinds of features, and their augmented views.
    kinds: Mapping[str, ViewCount] = field(default_factory=dict)
    before_dim: int = 0  # size of features before the projection, if they are stored
    # "split/kind" -> digest of its rows' indices and features.
    kinds_sha256: Mapping[str, str] = field(default_factory=dict)

    def arrays(self, split: str) -> dict[str, tuple[View, ...]]:
        """Return a split's arrays of features, and the views of an image that each holds."""
        return views_by_array(split, self.views, self.kinds)

    def shape(self, split: str, array: str, images: int) -> tuple[int, int, int]:
        """Return the shape of an array of the features of ``images``: (images, views, dim)."""
        dim = self.before_dim if array == BEFORE else self.dim
        return images, len(self.arrays(split)[array]), dim

    def digest_of(self, split: str, array: str = FEATURES) -> str | None:
        """Return the digest of an array."""
        return self.sha256.get(split) if array == FEATURES else self.kinds_sha256.get(f"{split}/{array}")

    def as_json(self) -> str:
        """Return the text that a file holds. Without further kinds it is that of version 2."""
        facts = asdict(self)
        return json.dumps(facts if self.kinds else {name: facts[name] for name in list(facts)[:-3]})


_META = TypeAdapter(StoreMeta)


@dataclass(frozen=True, eq=False)
class StoredSplit:
    """The stored images of one split, or some of them."""

    index: np.ndarray  # int64 (n,), ascending: which of the split's images are stored
    labels: np.ndarray  # int64 (n,)
    files: np.ndarray  # `FILE` records (n,) of the image files when they were encoded
    # (rows, views, dim) each, of all images in the file; mapped, not verified.
    arrays: Mapping[str, np.ndarray]
    rows: np.ndarray | None = None  # int64 (n,), rows of these images in ``arrays``; None: all

    def take(self, chosen: np.ndarray) -> StoredSplit:
        """Return the images at the positions ``chosen``, ascending."""
        rows = chosen if self.rows is None else self.rows[chosen]
        return StoredSplit(self.index[chosen], self.labels[chosen], self.files[chosen], self.arrays, rows)

    def sha256(self, array: str) -> str:
        """Return the digest of an array, of images that are all in the file."""
        return array_sha256({"index": self.index, "labels": self.labels, **self.arrays}, array)


@dataclass(frozen=True, eq=False)
class StoreFile:
    """A store's file as it was when it was opened: another file at its path changes nothing."""

    path: Path
    meta: StoreMeta
    splits: Mapping[str, StoredSplit]  # all stored images
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
            _refuse_while_written(file)
            # On Windows a mapped file cannot be replaced, so its bytes are read.
            on_windows = sys.platform == "win32"
            content = file.read() if on_windows else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with h5py.File(_seekable(content), "r") as store:
                _check_heaps(store, content)
                meta = _read_meta(path, store)
                splits = {one: _read_split(store[one], one, meta, content) for one in meta.expected}
        return cls(path, meta, splits, content, identity)

    @property
    def version(self) -> StoreVersion:
        """What the file holds."""
        return self.meta, {name: split.index for name, split in self.splits.items()}

    def as_version(self, version: StoreVersion) -> StoreFile:
        """Return this file, or the part of it that ``version`` held; a UserError says if it has other features now."""
        meta, stored = version
        kinds = meta.kinds_sha256.items() <= self.meta.kinds_sha256.items()
        if self.meta.sha256 == meta.sha256 and kinds:
            return self
        splits = {}
        for name, index in stored.items():
            here, arrays, is_held = self.splits.get(name), meta.arrays(name), False
            if here is not None and np.isin(index, here.index).all() and here.arrays.keys() >= arrays.keys():
                rows = np.searchsorted(here.index, index)
                kept = {array: here.arrays[array][rows, : len(views)] for array, views in arrays.items()}
                splits[name] = split = replace(here.take(rows), arrays=kept, rows=None)
                is_held = all(split.sha256(array) == meta.digest_of(name, array) for array in arrays)
            if not is_held:
                raise UserError(
                    f"Another process has written other features to {self.path} since this work was planned; run the "
                    "same command again."
                )
        return replace(self, meta=meta, splits=splits)

    def problems(self, split: str, array: str = FEATURES) -> list[str]:
        """Return what is wrong with an array of a split, in sentences: its digest, and features that are no numbers."""
        features, found = self.splits[split].arrays[array], []
        what = split if array == FEATURES else f"{split} ({array})"
        if self.splits[split].sha256(array) != self.meta.digest_of(split, array):
            found.append(f"The {what} features have changed since they were written: digests differ.")
        starts = range(0, len(features), ROWS_AT_ONCE)
        if unusable := sum(unusable_rows(features[start : start + ROWS_AT_ONCE]).sum() for start in starts):
            found.append(f"The {what} features of {unusable} images are not finite, or all zeros.")
        return found

    def verified(self, split: str, array: str = FEATURES) -> np.ndarray:
        """Return an array (n, views, dim) of a split, after one pass that compares its digest, once per process."""
        known = (*self.identity, split, array, self.meta.digest_of(split, array))
        if known not in _verified:
            if found := self.problems(split, array):
                raise damaged(self.path, " ".join(found))
            _verified.add(known)
        return self.splits[split].arrays[array]

    def paths(self, split: str) -> np.ndarray:
        """Return the paths of a split's images, text (n,), as the file holds them."""
        with reading(self.path), h5py.File(_seekable(self.content), "r") as file:
            paths: np.ndarray = file[split]["paths"].asstr("utf-8", "surrogateescape")[:]
            if len(paths) != file[split]["index"].size:
                raise ValueError(f"it does not have one path for each of its {split} images")
        return paths


class SplitContent(NamedTuple):
    """What is to be stored of one split."""

    rows: np.ndarray  # int64 (n,), ascending: which of the split's images
    files: np.ndarray  # `FILE` records (n,)
    blocks: Iterable[Block]  # together all the features


def write_store(
    path: Path, meta: StoreMeta, images: Mapping[str, Split], contents: Mapping[str, SplitContent]
) -> None:
    """Write a store of the dataset's ``images`` by split, with ``meta`` (``sha256`` is filled in), whole or not at all.

    The caller holds the store's lock: temporary files of killed processes are removed. Where the disk refuses, an
    OSError is raised and the file at ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PART}"):
        left.unlink(missing_ok=True)
    paths = {  # as the disk has them, in UTF-8 or not
        split: [images[split].paths[row].encode("utf-8", "surrogateescape") for row in content.rows]
        for split, content in contents.items()
    }
    most_bytes = 2 * len(json.dumps(asdict(meta))) + (1 << 14)
    for split, names in paths.items():
        for array in meta.arrays(split):
            most_bytes += math.prod(meta.shape(split, array, len(names))) * np.dtype(meta.dtype).itemsize
        most_bytes += sum(112 + len(name) for name in names)
    try:
        with atomic_write(path) as temporary:
            _reserve(temporary, most_bytes)
            with h5py.File(temporary, "w") as file:
                for split, content in contents.items():
                    group = file.create_group(split)
                    group["index"] = content.rows.astype("<i8")
                    group["labels"] = images[split].labels[content.rows].astype("<i8")
                    for column, name in zip(FILE_FIELDS, FILE.names or (), strict=True):
                        group[column] = content.files[name]
                    group.attrs[FILES_SHA256] = content_sha256(group, FILE_FIELDS)
                    group.create_dataset("paths", data=paths[split], dtype=h5py.string_dtype())
                    for array in meta.arrays(split):
                        shape = meta.shape(split, array, len(content.rows))
                        group.create_dataset(array, shape, np.dtype(meta.dtype).newbyteorder("<"))
                    for array, rows, views, block in content.blocks:
                        if block.size:
                            group[array][rows, views] = block
                sha256 = {split: array_sha256(file[split]) for split in contents}
                further = (
                    (split, kind) for split in contents for kind in meta.arrays(split) if kind != FEATURES
                )
                kinds_sha256 = {f"{split}/{kind}": array_sha256(file[split], kind) for split, kind in further}
                text = replace(meta, sha256=sha256, kinds_sha256=kinds_sha256).as_json()
                file.create_dataset(META, data=text, dtype=h5py.string_dtype())
                file.attrs[META_SHA256] = hashlib.sha256(text.encode()).hexdigest()
                file.attrs["format"] = FORMAT
                file.attrs["format_version"] = FORMAT_VERSION if meta.kinds else 2
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
    except RuntimeError as error:  # raised by h5py where the disk fills up in spite of the reservation
        raise OSError(f"HDF5 broke off: {str(error).splitlines()[0]}") from error


def _reserve(path: Path, size: int) -> None:
    """Let a disk without ``size`` free bytes refuse now: HDF5 would break off in the middle and print errors."""
    if hasattr(os, "posix_fallocate"):
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot reserve
                    raise


def content_sha256(split: Mapping[str, Any], fields: Sequence[str] = HASHED) -> str:
    """Return the sha256 hex of a split's indices, labels and features, or of other fields."""
    digest = hashlib.sha256()
    for name in fields:
        data = split[name]
        digest.update(f"{name} {data.shape} {data.dtype.str}\n".encode())
        for start in range(0, len(data), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(data[start : start + ROWS_AT_ONCE]).data)
    return digest.hexdigest()


def array_sha256(split: Mapping[str, Any], array: str = FEATURES) -> str:
    """Return the digest of an array of a split."""
    return content_sha256(split, HASHED if array == FEATURES else ("index", array))


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
    except Exception as error:  # damaged files may raise any exception
        if isinstance(error, OSError) and path.is_dir():
            raise UserError(
                f"Expected a feature store at {path}, got a folder; move it away or use another cache folder."
            ) from error
        number = error.errno if isinstance(error, OSError) else None
        if number is not None:  # HDF5's errors for contents have none
            advice = ADVICE.get(number, "check the disk and run the same command again")
            raise UserError(f"{path} cannot be read ({os.strerror(number)}); {advice}.") from error
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> UserError:
    """Return the error for a store whose contents are not those that were written."""
    return UserError(
        f"{path} should be a feature store but is damaged or cut short ({reason}); move it away and make it again with "
        "`fastcoop cache-features`, or with `fastcoop features import` where its features were imported."
    )


def _refuse_while_written(file: BinaryIO) -> None:
    """Raise BlockingIOError while a program has the file open for writing, which HDF5's own lock shows."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)  # at once: the mapping keeps the file open, and its lock
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks


def _seekable(content: bytes | mmap.mmap) -> Any:
    return io.BytesIO(content) if isinstance(content, bytes) else content


def _check_heaps(file: h5py.File, content: bytes | mmap.mmap) -> None:
    """Raise ValueError for a damaged heap of texts: HDF5, up to 2.0, never returns from one with an object of size 0.

    Heaps lie anywhere but in arrays of numbers. Each is a header of 16 bytes and objects: a number, 0 for the free
    space at the end, their size, and their bytes, in multiples of 8.
    """
    arrays: list[tuple[int, int]] = []

    def add(_: str, one: h5py.Dataset | h5py.Group) -> None:
        if isinstance(one, h5py.Dataset) and one.dtype.kind in "iuf":
            start = one.id.get_offset() or 0
            arrays.append((start, start + one.nbytes if start else 0))

    file.visititems(add)
    position = 0
    for start, after in (*sorted(arrays), (len(content), len(content))):
        while (heap := content.find(HEAP, position, start)) >= 0:
            end = min(heap + int.from_bytes(content[heap + 8 : heap + 16], "little"), len(content))
            position = heap + 16
            while position + 16 <= end:
                size = int.from_bytes(content[position + 8 : position + 16], "little")
                is_free = content[position : position + 2] == b"\0\0"
                step = size if is_free else 16 + size + -size % 8
                if not 0 < step <= end - position:
                    raise ValueError("its texts have been overwritten")
                position += step
        position = max(position, after)


def _read_meta(path: Path, file: h5py.File) -> StoreMeta:
    if file.attrs.get("format") != FORMAT:
        raise UserError(f"{path} is an HDF5 file but not a feature store of fastcoop.")
    version = int(file.attrs["format_version"])
    if version not in (2, FORMAT_VERSION):
        raise UserError(
            f"{path} has format version {version} and this fastcoop reads 2 to {FORMAT_VERSION}; "
            "update fastcoop, or use another cache folder."
        )
    text = file[META].asstr()[()]
    if hashlib.sha256(text.encode()).hexdigest() != file.attrs[META_SHA256]:
        raise ValueError("its description has changed since it was written")
    try:
        return _META.validate_python(json.loads(text))
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise ValueError(
            f"of its description, {place} is {shortened(wrong['input'])}: {wrong['msg']}"
        ) from None


def _read_split(group: h5py.Group, name: str, meta: StoreMeta, content: bytes | mmap.mmap) -> StoredSplit:
    """Check a split's tables, and return them with its features mapped."""
    index, labels = group["index"][:], group["labels"][:]
    if (np.diff(index, prepend=-1) <= 0).any() or (index >= meta.expected[name]).any():
        raise ValueError(f"the numbers of its {name} images do not ascend within the split")
    if len(labels) != len(index) or ((labels < 0) | (labels >= len(meta.class_names))).any():
        raise ValueError(f"it does not have one label that names a class for each of its {name} images")
    if content_sha256(group, FILE_FIELDS) != group.attrs[FILES_SHA256]:
        raise ValueError(f"its records of {name} image files have changed since they were written")
    files = unknown_files(len(index))
    for column, one in zip(FILE_FIELDS, FILE.names or (), strict=True):
        files[one] = group[column][:]
    arrays = {}
    for array in meta.arrays(name):
        features, shape = group[array], meta.shape(name, array, len(index))
        if (features.shape, features.dtype) != (shape, np.dtype(meta.dtype)):
            raise ValueError(
                f"its {name} {array} are {features.dtype} {features.shape}, not {meta.dtype} {shape}"
            )
        arrays[array] = np.zeros(shape, features.dtype)
        if features.size:
            offset = features.id.get_offset()
            if offset is None or offset + features.nbytes > len(content):
                raise ValueError(f"its {name} {array} do not lie in it in one piece")
            arrays[array] = np.frombuffer(content, features.dtype, features.size, offset).reshape(shape)
    return StoredSplit(index, labels, files, arrays)
