"""What image files were when they were encoded, and which of them hold other bytes today."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcoop.progress import progress

UNKNOWN = -1  # size and time of files that an older version of fastcoop read


class FileRecord(NamedTuple):
    """One image file as it was read: bytes, nanoseconds since 1970, and the digest of its bytes."""

    size: int
    mtime_ns: int
    sha256: bytes


NO_RECORD = FileRecord(UNKNOWN, UNKNOWN, bytes(32))


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Records of n image files.

    Attributes:
        size: int64 (n,), bytes; ``UNKNOWN`` where nothing was recorded.
        mtime_ns: int64 (n,), time of the last change, in nanoseconds since 1970.
        sha256: uint8 (n, 32), of the files' bytes.
    """

    size: np.ndarray
    mtime_ns: np.ndarray
    sha256: np.ndarray

    @classmethod
    def of(cls, records: Sequence[FileRecord]) -> ImageFiles:
        """Stack records."""
        return cls(
            np.array([record.size for record in records], np.int64),
            np.array([record.mtime_ns for record in records], np.int64),
            np.frombuffer(b"".join(record.sha256 for record in records), np.uint8).reshape(-1, 32),
        )

    @classmethod
    def unknown(cls, count: int) -> ImageFiles:
        """Records of files of which nothing is known."""
        return cls.of([NO_RECORD] * count)

    def __len__(self) -> int:
        return len(self.size)

    @property
    def known(self) -> np.ndarray:
        """bool (n,): where something was recorded."""
        return self.size != UNKNOWN

    def record(self, row: int) -> FileRecord:
        """One file's record."""
        return FileRecord(int(self.size[row]), int(self.mtime_ns[row]), self.sha256[row].tobytes())

    def by_index(self, index: np.ndarray) -> dict[int, FileRecord]:
        """The records, by the images' indices (n,)."""
        return {image: self.record(row) for row, image in enumerate(index.tolist())}

    def take(self, rows: np.ndarray) -> ImageFiles:
        """The records of some rows."""
        return ImageFiles(self.size[rows], self.mtime_ns[rows], self.sha256[rows])


def read_file(path: Path) -> tuple[bytes, FileRecord]:
    """A file's bytes and record.

    The time is taken before the bytes are: a file that changes while it is read has another time afterwards, and is
    hashed when the record is next compared.

    Raises OSError.
    """
    mtime_ns = path.stat().st_mtime_ns
    content = path.read_bytes()
    return content, FileRecord(len(content), mtime_ns, hashlib.sha256(content).digest())


def find_changes(
    paths: Sequence[Path], recorded: ImageFiles, title: str, *, hash_all: bool = False
) -> tuple[np.ndarray, ImageFiles]:
    """Compare files with their records: size and time first, bytes where these differ.

    Files without a record, and those that are not there, count as unchanged.

    Args:
        paths: of the n files.
        title: of the progress bar.
        hash_all: compare the bytes of files whose size and time are unchanged, too.

    Returns:
        bool (n,), which files hold other bytes; and the records, with today's time where only that differed.
    """
    changed = np.zeros(len(paths), bool)
    mtime_ns = recorded.mtime_ns.copy()
    doubtful = []
    for row in np.flatnonzero(recorded.known).tolist():
        try:
            now = os.stat(paths[row])
        except OSError:
            continue
        if now.st_size != recorded.size[row]:
            changed[row] = True
        elif hash_all or now.st_mtime_ns != recorded.mtime_ns[row]:
            doubtful.append(row)
    if doubtful:
        with progress(title, len(doubtful)) as advance, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            records = pool.map(_read_record, [paths[row] for row in doubtful])
            for row, record in zip(doubtful, records, strict=True):
                advance()
                if record is not None:
                    changed[row] = record.sha256 != recorded.sha256[row].tobytes()
                    mtime_ns[row] = record.mtime_ns
    return changed, ImageFiles(recorded.size, mtime_ns, recorded.sha256)


def _read_record(path: Path) -> FileRecord | None:
    try:
        return read_file(path)[1]
    except OSError:
        return None
