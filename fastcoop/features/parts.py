"""Finished parts on disk: immutable files, each renamed into place once it is whole."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcoop.features.image_files import ImageFiles
from fastcoop.features.plan import Part

FILE_FIELDS = ("size", "mtime_ns", "sha256")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A computed part.

    Attributes:
        features: (rows, views, dim) in the store's dtype; rows of unreadable images are zero.
        files: of the rows' images when they were read.
        failures: position in the part -> why that image could not be read.
    """

    features: np.ndarray
    files: ImageFiles
    failures: dict[int, str]


def parts_folder(store: Path) -> Path:
    """Where the parts of a store that is being made are kept, beside it."""
    return store.with_name(store.name + ".parts")


def write_part(store: Path, part: Part, encoded: Encoded) -> None:
    """Write a part, whole or not at all."""
    target = parts_folder(store) / f"{part.key}.npz"
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    whole = io.BytesIO()  # on a full disk zipfile, writing to it, would complain beside our own message
    np.savez(
        whole,
        features=encoded.features,
        **{field: getattr(encoded.files, field) for field in FILE_FIELDS},
        failed=np.array(list(encoded.failures), np.int64),
        reasons=np.array(list(encoded.failures.values()), np.str_),
    )
    try:
        with temporary.open("wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_part(store: Path, part: Part) -> Encoded | None:
    """A part written earlier; None if there is none, or it did not survive a crash of the machine."""
    try:
        with np.load(parts_folder(store) / f"{part.key}.npz") as content:
            failures = dict(zip(content["failed"].tolist(), content["reasons"].tolist(), strict=True))
            features, files = content["features"], ImageFiles(*(content[field] for field in FILE_FIELDS))
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return (
        Encoded(features, files, failures)
        if features.shape[:2] == (len(part.rows), len(part.views))
        else None
    )


def discard_parts(store: Path) -> None:
    """Remove every part: the store holds them now, or nobody asks for them any more."""
    shutil.rmtree(parts_folder(store), ignore_errors=True)
