"""Atomic writes, and locks between processes."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fastcoop.errors import UserError

PART = ".part"  # suffix of temporary files


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside ``path``, and rename it to ``path`` when the block ends.

    Its name is unique to the call, so several processes may write the same file at once. It is removed if the block
    raises.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def lock(path: Path, timeout_s: float = -1) -> Iterator[None]:
    """Hold a lock file, which is created if it is missing. The system releases the lock when the process dies.

    Args:
        path: The lock file, used for nothing else.
        timeout_s: Seconds to wait while another process or thread holds the lock; -1: no limit.

    Raises:
        TimeoutError: The lock was still held elsewhere after ``timeout_s``.
        UserError: The file system has no locks.
        OSError: The lock file cannot be created.
    """
    held = FileLock(path)
    try:
        held.acquire(timeout=timeout_s)
    except Timeout:
        raise TimeoutError(f"{path} is locked by another process.") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
        raise UserError(
            f"{path.parent} is on a file system without file locks; use a folder on another file system."
        ) from error
    try:
        yield
    finally:
        held.release()
