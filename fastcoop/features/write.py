"""Writing a feature store: to a temporary file beside it, hashed, then renamed into place."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from fastcoop.features.image_files import FILE
from fastcoop.features.store_file import (
    FILE_FIELDS,
    FILES_SHA256,
    FORMAT,
    FORMAT_VERSION,
    META,
    META_SHA256,
    SplitRows,
    StoreMeta,
    content_sha256,
)
from fastcoop.files import PART, atomic_write

Block = tuple[np.ndarray, slice, np.ndarray]  # rows (k,) ascending, views, features (k, views, dim)


class SplitContent(NamedTuple):
    """One split to be written: its images, their paths, and blocks that together cover their features."""

    images: SplitRows
    paths: Sequence[str]
    blocks: Iterable[Block]


def write_store(path: Path, meta: StoreMeta, contents: Mapping[str, SplitContent]) -> None:
    """Write a store with ``meta`` (its ``sha256`` is filled in here) at ``path``, whole or not at all.

    The caller holds the store's lock: temporary files of killed processes are removed.

    Raises:
        OSError: The disk refuses; the file at ``path`` is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PART}"):
        left.unlink(missing_ok=True)
    try:
        with atomic_write(path) as temporary:
            _reserve(temporary, _most_bytes(meta, contents))
            with h5py.File(temporary, "w") as file:
                for split, content in contents.items():
                    _write_split(file.create_group(split), split, content, meta)
                meta = replace(meta, sha256={split: content_sha256(file[split]) for split in contents})
                text = json.dumps(asdict(meta))
                file.create_dataset(META, data=text, dtype=h5py.string_dtype())
                file.attrs[META_SHA256] = hashlib.sha256(text.encode()).hexdigest()
                file.attrs["format"] = FORMAT
                file.attrs["format_version"] = FORMAT_VERSION
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
    except RuntimeError as error:  # raised by h5py where the disk fills up in spite of the reservation
        raise OSError(f"HDF5 broke off: {str(error).splitlines()[0]}") from error


def _as_bytes(path: str) -> bytes:
    """A path as the disk has it, in UTF-8 or not."""
    return path.encode("utf-8", "surrogateescape")


def _most_bytes(meta: StoreMeta, contents: Mapping[str, SplitContent]) -> int:
    """Return more bytes than the file will take."""
    features = sum(len(one.paths) * meta.views_of(split) for split, one in contents.items()) * meta.dim
    tables = sum(112 + len(_as_bytes(path)) for one in contents.values() for path in one.paths)
    return features * np.dtype(meta.dtype).itemsize + tables + 2 * len(json.dumps(asdict(meta))) + (1 << 14)


def _reserve(path: Path, size: int) -> None:
    """Let a disk without ``size`` free bytes refuse now: HDF5 would break off in the middle and print errors."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot reserve
                raise


def _write_split(group: h5py.Group, split: str, content: SplitContent, meta: StoreMeta) -> None:
    images = content.images
    group["index"] = images.index.astype("<i8")
    group["labels"] = images.labels.astype("<i8")
    for field, column in zip(FILE.names or (), FILE_FIELDS, strict=True):
        group[column] = images.files[field]
    group.attrs[FILES_SHA256] = content_sha256(group, FILE_FIELDS)
    paths = [_as_bytes(path) for path in content.paths]
    group.create_dataset("paths", data=paths, dtype=h5py.string_dtype())
    shape = (len(images.index), meta.views_of(split), meta.dim)
    features = group.create_dataset("features", shape, np.dtype(meta.dtype).newbyteorder("<"))
    for rows, views, block in content.blocks:
        if len(rows):
            features[rows, views] = block
