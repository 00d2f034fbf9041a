"""Records of image files as they were encoded, and which files have changed since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastcoop.progress import progress

# A record of one image file: bytes, nanoseconds since 1970 of the last change, and the digest of the bytes.
FILE = np.dtype([("size", "<i8"), ("mtime_ns", "<i8"), ("sha256", "u1", 32)])
UNKNOWN = -1  # size and time where no record was kept, as of imported features


def unknown_files(count: int) -> np.ndarray:
    """Return `FILE` records (count,) that state nothing."""
    records = np.zeros(count, FILE)
    records["size"] = records["mtime_ns"] = UNKNOWN
    return records


def read_file(path: Path) -> tuple[bytes, np.ndarray]:
    """Return a file's bytes and its `FILE` record, of no dimensions. The time is read before the bytes: if the file
    changes in between, it has a later time than its record, and the next comparison hashes it."""
    mtime_ns = path.stat().st_mtime_ns
    content = path.read_bytes()
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    return content, np.array((len(content), mtime_ns, digest), FILE)


def files_digest(records: np.ndarray) -> str | None:
    """Return the sha256 hex over the digests of files, None if some are not known. It is the same on every machine."""
    known = (records["size"] != UNKNOWN).all()
    return hashlib.sha256(records["sha256"].tobytes()).hexdigest() if known else None


def find_changes(
    paths: Sequence[Path], recorded: np.ndarray, title: str, *, hash_all: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compare n files with their `FILE` records: size and time first, bytes where the times differ or ``hash_all``.

    Where a file has another size and the old time, as in a copy with the times of the original, times tell nothing: the
    bytes of all are compared. Files without a record and missing files count as unchanged. Returns bool (n,), which
    files hold other bytes; and the records (n,), with the present time where only that differed. ``title`` is that of
    the progress bar.
    """
    changed, records = np.zeros(len(paths), bool), recorded.copy()
    doubtful, alike, has_kept_time = list[int](), list[int](), False
    for row in np.flatnonzero(recorded["size"] != UNKNOWN).tolist():
        try:
            now = os.stat(paths[row])
        except OSError:
            continue
        is_same_time = now.st_mtime_ns == recorded["mtime_ns"][row]
        if now.st_size != recorded["size"][row]:
            changed[row] = True
            has_kept_time |= is_same_time
        else:
            (alike if is_same_time else doubtful).append(row)
    if hash_all or has_kept_time:
        doubtful += alike
    if doubtful:
        with progress(title, len(doubtful)) as advance, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            found = pool.map(_read_record, [paths[row] for row in doubtful])
            for row, record in zip(doubtful, found, strict=True):
                advance()
                if record is not None:
                    changed[row] = (record["sha256"] != recorded["sha256"][row]).any()
                    records["mtime_ns"][row] = record["mtime_ns"]
    return changed, records


def _read_record(path: Path) -> np.ndarray | None:
    try:
        return read_file(path)[1]
    except OSError:
        return None
