"""Two real processes on one store: one works, the other says that it waits, and nothing is computed twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.features import cache_features, plan
from tests.features.small import contents

ROOT = Path(__file__).parents[2]
CROPS = 18 * 2 + 6 + 9  # of the dataset: 18 training images with one augmented view, 6 and 9 others
FIRST_PART = 8


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def encoded(said: Path) -> int:
    """What the process printed last."""
    return int(said.read_text().splitlines()[-1])


@pytest.fixture
def start(dataset: Dataset, tmp_path: Path):
    """Start a process on the store: what it prints goes to a file."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        said = tmp_path / f"{name}.txt"
        arguments = [str(dataset.root), str(tmp_path / "cache"), str(tmp_path / "gate")]
        command = [sys.executable, "-m", "tests.features.two_processes_trial", *arguments]
        with said.open("wb") as file:
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
        return running[-1], said

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("killed", [False, True])
def test_one_works_and_the_other_waits_and_goes_on(
    start, backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    first, first_said = start("first")
    until(lambda: (tmp_path / "gate.started").exists(), "the first to work")
    second, second_said = start("second")
    until(lambda: b"waiting for it" in second_said.read_bytes(), "the second to say that it waits")
    store = tmp_path / "cache" / "tiny" / "animals.h5"
    assert not store.exists()
    if killed:
        first.kill()  # the system frees the lock of a process that dies
        first.wait()
    (tmp_path / "gate").touch()
    assert second.wait(300) == 0
    if not killed:
        assert first.wait(300) == 0
        assert encoded(first_said) == CROPS
    assert f"Another process is working on {store}; waiting for it." in second_said.read_text()
    assert encoded(second_said) == (CROPS - FIRST_PART if killed else 0)
    monkeypatch.setattr(plan, "CROPS_PER_PART", 8)
    ask = {"shots": ["all"], "seeds": [1], "views": 1, "batch_size": 4}
    assert contents(store) == contents(cache_features(backbone, dataset, tmp_path / "alone", **ask))
    assert sorted(path.name for path in store.parent.iterdir()) == ["animals.h5", "animals.h5.lock"]
