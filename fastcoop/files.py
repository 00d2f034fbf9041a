"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # the ending of files that are being written


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file beside ``path``, which replaces ``path`` when the block ends.

    Its name is the process's and the call's own, so that several may write the same file at once. It is removed where
    the block raises.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
