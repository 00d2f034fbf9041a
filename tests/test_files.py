"""Atomic writes and locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcoop.errors import UserError
from fastcoop.files import atomic_write, lock
from tests.advice import follows

HOLD = """
import sys
from pathlib import Path
from fastcoop.files import lock
from tests.advice import follows
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers_of_one_file_use_different_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last to end"
    with pytest.raises(FileNotFoundError), atomic_write(path) as part:
        part.with_name("nothing").rename(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_lock_is_held_by_one_process_and_released_when_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match="is locked by another process"), lock(path, timeout_s=0):
            pass
        other.kill()
    with lock(path, timeout_s=0), pytest.raises(TimeoutError), lock(path, timeout_s=0):
        pass
    with lock(path, timeout_s=0):
        pass


@follows(
    "use a folder on another file system",
)
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, None])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError if code is None else OSError(code, os.strerror(code))

    monkeypatch.setattr("fastcoop.files.FileLock.acquire", refuse)
    with (
        pytest.raises(UserError, match="without file locks; use a folder on another"),
        lock(tmp_path / "lock"),
    ):
        pass


def test_a_lock_that_cannot_be_made_raises_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), lock(tmp_path / "file" / "lock", timeout_s=0):
        pass
