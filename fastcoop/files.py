"""Files: read with errors as sentences, pickles read without running code, atomic writes, locks between processes."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastcoop.errors import UserError

PART = ".part"  # suffix of temporary files


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Raise a UserError where ``path``, which should be ``kind``, cannot be read or is not UTF-8 text."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error}); check that you may read it, and the disk"
        raise UserError(f"{path} {problem}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, or get {kind} again.") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file; a UserError names the file and the line of a mistake."""
    with reading(path, "a JSON file"):
        text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, problem = f"{path} line {error.lineno}", error.msg
    except (RecursionError, ValueError):
        place, problem = str(path), "it is nested too deeply, or has a number of thousands of digits"
    raise UserError(f"{place} is not valid JSON: {problem}; download or write the file again.")


class StandIn:
    """Replaces what a pickle names: keeps the arguments of its call and its state, accepts items, does nothing."""

    name = ""
    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = object.__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # A new class for each, so that a pickle's changes of a class do not outlive the reading.
        return type("StandIn", (StandIn,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # of torch: ("storage", stand-in of its class, number, device, elements)


def unpickle(content: bytes) -> Any:
    """Return what is pickled, without importing or running anything: all that it names is a `StandIn`."""
    return _Unpickler(io.BytesIO(content)).load()


def shipped_grids() -> dict[str, Path]:
    """Return the grid files that come with fastcoop, in the package or beside it in a checkout, by name."""
    package = Path(__file__).parent
    folders = package.parent / "experiments", package / "experiments"
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def shipped_grid(name: str | Path) -> Path | None:
    """Return one of them, named "fig3", "fig3.yaml" or "experiments/fig3.yaml"; None where there is none."""
    asked = Path(name)
    is_name = asked.parent.name in ("", "experiments") and asked.suffix in ("", ".yaml")
    return shipped_grids().get(asked.stem) if is_name else None


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


def refuse_foreign(path: Path, is_own: Callable[[Path], bool]) -> None:
    """Raise UserError if a command, which chose the name ``path``, would replace a file that it did not write.

    Args:
        path: Where a command is about to write.
        is_own: Whether a file is one that this command writes, by its content. It may raise any exception.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with suppress(Exception):  # other files may raise any
        if is_own(path):
            return
    raise UserError(
        f"{path} is already there and is not known as this command's own; choose another place, or move it away."
    )


def begins_with(path: Path, start: str) -> bool:
    """Return whether a text file begins with ``start``."""
    with path.open("rb") as file:
        return file.read(len(start.encode())) == start.encode()


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
