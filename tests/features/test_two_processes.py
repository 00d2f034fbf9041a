"""Two real processes on one store: one works, the other says that it waits, and nothing is computed twice."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, encode, import_features, plan
from tests.features.small import contents

ROOT = Path(__file__).parents[2]
CROPS = 18 * 2 + 6 + 9  # of the dataset: 18 training images with one augmented view, 6 and 9 others
FIRST_PART = 8


def until(done: Callable[[], bool], process: subprocess.Popen[bytes], said: Path) -> None:
    """Wait for what the process does."""
    while not done():
        assert process.poll() is None, said.read_text()
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
    until(lambda: (tmp_path / "gate.started").exists(), first, first_said)
    second, second_said = start("second")
    until(lambda: b"waiting for it" in second_said.read_bytes(), second, second_said)
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
    monkeypatch.setattr(plan, "CROPS_PER_CHUNK", 8)
    monkeypatch.setattr(encode, "CPU_BATCH", 4)
    ask = {"shots": ["all"], "seeds": [1], "views": 1}
    assert contents(store) == contents(cache_features(backbone, dataset, tmp_path / "alone", **ask))
    assert sorted(path.name for path in store.parent.iterdir()) == ["animals.h5", "animals.h5.lock"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_at_random_moments_every_number_is_the_undisturbed_one_or_a_sentence_refuses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.features.race_trial", str(tmp_path), "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    finished, refused, killed = map(int, done.stdout.split())
    assert finished > 6
    assert finished + refused + killed >= 12


def test_imports_of_one_name_make_one_store_and_say_so(tmp_path: Path, backbone: Backbone) -> None:
    for number in range(2):
        features = np.random.default_rng(number).normal(size=(3000, 8)).astype(np.float32)
        np.savez(
            tmp_path / f"{number}.npz", features=features, labels=np.arange(3000) % 2, names=["cat", "dog"]
        )
    gate, said = threading.Barrier(2), []

    def bring(number: int) -> None:
        gate.wait()
        try:
            import_features({"test": tmp_path / f"{number}.npz"}, tmp_path / "cache", backbone, name="x")
            said.append(str(number))
        except UserError as error:
            said.append(str(error))

    threads = [threading.Thread(target=bring, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (one for one in said if one in ("0", "1"))
    (loser,) = (one for one in said if one != winner)
    path = tmp_path / "cache" / "tiny" / "x.h5"
    assert loser == f"{path} exists already; move it away or choose another name."
    with np.load(tmp_path / f"{winner}.npz") as file:
        assert np.array_equal(FeatureStore.open(path).split("test")[0], file["features"].astype(np.float16))
    assert sorted(one.name for one in path.parent.iterdir()) == ["x.h5", "x.h5.lock"]


def test_a_worker_reads_what_the_sweep_planned_with_or_refuses(tmp_path: Path) -> None:
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.datasets import load_dataset
    from fastcoop.grids.grid import read_grid
    from fastcoop.sweeps.loading import load_grid, open_features
    from fastcoop.sweeps.tasks import WorkerBank, WorkerSpec
    from tests.small_world import write_backbone, write_dataset

    dataset = load_dataset(write_dataset(tmp_path / "colours"))
    spec = str(write_backbone(tmp_path / "tiny"))
    grid = {
        "backbones": spec,
        "datasets": str(tmp_path / "colours"),
        "shots": 1,
        "seeds": 1,
        "methods": "linear_probe",
    }
    ask = {"seeds": [1], "views": 1, "cache_root": tmp_path / "cache"}
    backbone = backbone_from_spec(spec)
    path = cache_features(backbone, dataset, shots=[1], **ask)
    world = load_grid(read_grid(grid), None, "cpu")
    open_features(world, tmp_path / "cache")
    planned = world.data("tiny", "colours")
    supplies = pickle.loads(pickle.dumps(WorkerSpec.of(world, "cpu")))
    cache_features(backbone, dataset, shots=["all"], **ask)
    there = WorkerBank(supplies).data("tiny", "colours")
    drawn = planned.subset(1, 1)
    assert planned.store is not None
    assert there.store is not None
    assert there.store.digest == planned.store.digest
    assert all(map(np.array_equal, there.train(drawn), planned.train(drawn)))
    path.unlink()
    for picture in (tmp_path / "colours" / "test").rglob("*.png"):
        Image.new("RGB", (9, 9), "red").save(picture)
    cache_features(backbone, dataset, shots=["all"], **ask)
    with pytest.raises(UserError, match="Another process has written other features"):
        WorkerBank(supplies).data("tiny", "colours")
    assert np.array_equal(planned.test[0], planned.store.split("test")[0])
