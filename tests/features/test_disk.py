"""Disks that refuse: full, read-only, in the way. A clear error, and no good data lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, encode, plan, store_file
from tests.advice import follows
from tests.features.small import contents

resource = pytest.importorskip("resource", reason="limits on a process are a matter of Unix")

ROOT = Path(__file__).parents[2]


def failing_at(call: int, original: Callable[..., Any], code: int = errno.ENOSPC) -> Callable[..., Any]:
    """``original``, but for its ``call``-th call, which finds the disk full."""
    calls = [0]

    def function(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    return function


@follows(
    "cannot be written ({}); free space or choose another place",
)
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (encode.np, "savez", 1),
        (encode.np, "savez", 2),
        (os, "fsync", 2),  # of a part
        (os, "posix_fallocate", 1),
        (h5py.Group, "create_dataset", 2),
        (h5py.Dataset, "__setitem__", 2),
        (store_file, "content_sha256", 7),  # the first of the file that is written
        (os, "replace", 2),
    ],
)
def test_wherever_the_disk_fills_up_nothing_is_lost_and_the_rerun_ends_the_same(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, call: int,
) -> None:  # fmt: skip
    if not hasattr(module, name):
        pytest.skip(f"this system has no {name}")
    monkeypatch.setattr(plan, "CROPS_PER_CHUNK", 16)
    few, more = ({"shots": shots, "seeds": [1], "views": 1} for shots in ([1], ["all"]))
    cache_features(backbone, dataset, tmp_path / "whole", **few)
    expected = contents(cache_features(backbone, dataset, tmp_path / "whole", **more))
    path = cache_features(backbone, dataset, tmp_path / "full", **few)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing_at(call, getattr(module, name)))
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)") as caught:
            cache_features(backbone, dataset, tmp_path / "full", **more)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("**/*.part"))
    assert contents(cache_features(backbone, dataset, tmp_path / "full", **more)) == expected


def test_hdf5_that_breaks_off_is_a_clear_error(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(*_: Any) -> None:
        raise RuntimeError("Can't decrement id ref count (file write failed: time = now\n, errno = 28)")

    monkeypatch.setattr(store_file, "content_sha256", breaks_off)
    with pytest.raises(UserError, match=r"cannot be written \(HDF5 broke off: Can't decrement id ref count"):
        cache_features(backbone, dataset, tmp_path, shots=[1], seeds=[1], views=1)


def test_the_room_that_is_reserved_is_more_than_the_file_takes(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = []
    monkeypatch.setattr(store_file, "_reserve", lambda path, size: reserved.append(size))
    for views in (0, 7):
        ask = {"shots": ["all"], "seeds": [1], "views": views, "dtype": "float32"}
        path = cache_features(backbone, dataset, tmp_path / str(views), **ask)
        assert path.stat().st_size <= reserved[-1] < path.stat().st_size + (1 << 15)


def test_a_store_that_holds_all_that_is_asked_for_may_lie_where_nothing_can_be_written(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {"shots": [1], "seeds": [1], "views": 1}
    path = cache_features(backbone, dataset, tmp_path, **ask)
    path.with_name(path.name + ".lock").unlink()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("fastcoop.files.FileLock", refuse)
    assert cache_features(backbone, dataset, tmp_path, **ask) == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        cache_features(backbone, dataset, tmp_path, **ask | {"views": 2})


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of few kilobytes in a namespace of its own; see full_disk_trial."""
    possible = sys.platform == "linux" and shutil.which("unshare") and shutil.which("mount")
    allowed = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not possible or subprocess.run(allowed, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", sys.executable, "-m", "tests.features.full_disk_trial", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    refused, finished = map(int, done.stdout.split())
    assert refused >= 3
    assert finished >= 1


def test_a_limit_on_file_size_is_a_clear_error_and_loses_nothing(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    path = cache_features(backbone, dataset, tmp_path, shots=[1], seeds=[1], views=1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (500, len(before) - 1):  # not even a part fits; the parts fit and the store does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                cache_features(backbone, dataset, tmp_path, shots=["all"], seeds=[1], views=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert not list(path.parent.glob("**/*.part"))
    cache_features(backbone, dataset, tmp_path, shots=["all"], seeds=[1], views=1)
    assert len(FeatureStore.open(path, backbone, dataset).indices("train")) == 18


def test_a_folder_that_cannot_be_written_is_a_clear_error(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        cache_features(backbone, dataset, tmp_path / "file", shots=[1], seeds=[1])
    (tmp_path / "locked").mkdir(mode=0o500)
    if not os.access(tmp_path / "locked", os.W_OK):
        with pytest.raises(UserError, match="cannot be written"):
            cache_features(backbone, dataset, tmp_path / "locked", shots=[1], seeds=[1])
