"""The advice of sweeps, evaluate and interpret, followed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fastcoop.backbones import backbone_from_spec
from fastcoop.errors import UserError
from fastcoop.results import load_results
from fastcoop.results.store import ResultsStore, open_store
from fastcoop.sweeps import evaluate, interpret, sweep
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "data" / "colours")
    write_dataset(root / "data" / "shifted", ("grey", "green"), train=0, val=0, seed=1)
    write_backbone(root / "tiny")
    return root


@pytest.fixture
def grid(world: Path) -> dict[str, Any]:
    methods = {"zero_shot": None, "coop": {"context_length": 2, "epochs": 1}}
    return {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 0, "methods": methods,
    }  # fmt: skip


@pytest.fixture
def run(world: Path, grid: dict[str, Any], tmp_path: Path) -> Call:
    def call(**given: Any) -> Any:
        options = {
            "data_root": world / "data",
            "cache": world / "cache",
            "results": tmp_path / "results",
        } | given
        return sweep(options.pop("grid", grid), **options)

    return call


@pytest.fixture
def test_on(world: Path, tmp_path: Path) -> Call:
    def call(*targets: str, **given: Any) -> list[bool]:
        options = {
            "backbones": [str(world / "tiny")],
            "data_root": world / "data",
            "cache": world / "cache",
        } | given
        return [one.new for one in evaluate(tmp_path / "results", targets, **options)]

    return call


def refused(part: str, call: Call, *arguments: Any, **given: Any) -> None:
    with pytest.raises(UserError) as refusal:
        call(*arguments, **given)
    assert part in str(refusal.value)


@follows("A grid that is not a file needs a results folder; give one (results=...)")
def test_a_results_folder_for_a_mapping(run: Call) -> None:
    refused("give one (results=...)", run, results=None)
    assert run().finished == 2


@follows(
    "There is nothing to test on; name at least one dataset",
    "holds no runs yet; run `fastcoop sweep` into it",
)
def test_something_to_test_and_to_test_on(run: Call, test_on: Call, tmp_path: Path) -> None:
    with open_store(tmp_path / "results"):
        pass
    refused("run `fastcoop sweep` into it first", test_on, "shifted")
    run()
    refused("name at least one dataset", test_on)
    assert test_on("shifted") == [True, True]


@follows("keeps nothing that could be tested; name the targets in its grid and sweep it again")
def test_targets_in_the_grid_of_a_run_that_keeps_nothing(
    run: Call, test_on: Call, grid: dict[str, Any], tmp_path: Path
) -> None:
    run(only=["coop"])
    shutil.rmtree(tmp_path / "results" / "contexts")
    refused("name the targets in its grid and sweep it again", test_on, "shifted")
    assert run(only=["coop"], grid=grid | {"targets": {"colours": "shifted"}}).finished == 1
    assert set(load_results(tmp_path / "results").dataset) == {"colours", "shifted"}


@follows("is not found by its name; give it with --backbone", "give the right one with --backbone")
def test_the_backbone_of_the_runs(
    run: Call, test_on: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.chdir(tmp_path)
    refused("is not found by its name; give it with --backbone", test_on, "shifted", backbones=())
    weights = write_backbone(tmp_path / "tiny") / "open_clip_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    refused("give the right one with --backbone", test_on, "shifted", backbones=())
    assert test_on("shifted") == [True, True]


@follows("cannot be written ({}); free space or choose another place")
def test_space_for_what_is_written(
    run: Call, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run()
    backbone = backbone_from_spec(str(world / "tiny"))
    with monkeypatch.context() as full:
        full.setattr("fastcoop.files.os.replace", no_space)
        refused("free space", interpret, tmp_path / "results", backbone)
    assert len(interpret(tmp_path / "results", backbone)) == 1


@follows(
    'The backend "dask" needs Dask; install fastcoop[cluster]',
    "needs the address of a scheduler; give --address tcp://HOST:8786",
    "An address is that of a cluster's scheduler; give the backend dask with it",
    "The number of jobs is the cluster's with the backend dask; leave it out",
    "start `dask scheduler` and `dask worker`",
)
@pytest.mark.slow
def test_a_cluster_from_nothing(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("fastcoop.sweeps.cluster.CONNECT_TIMEOUT_S", 0.1)
    address = str(tmp_path / "scheduler.json")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "distributed", None)
        refused("install fastcoop[cluster]", run, backend="dask", address=address)
    assert any("distributed" in line and "cluster" in line for line in requires("fastcoop") or ())
    refused("give --address", run, backend="dask")
    refused("give the backend dask with it", run, address=address)
    refused("leave it out", run, backend="dask", address=address, jobs=2)
    refused("start `dask scheduler` and `dask worker`", run, backend="dask", address=address)
    monkeypatch.undo()
    dask = [sys.executable, "-m", "dask"]
    options = ["--scheduler-file", address, "--no-dashboard"]
    commands = [[*dask, "scheduler", *options, "--port", "0"], [*dask, "worker", *options, "--nworkers", "1"]]
    started = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    try:
        while not Path(address).is_file():
            assert started[0].poll() is None
        assert run(backend="dask", address=address).finished == 2
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


@follows("start its scheduler and workers, and run the same command again")
def test_a_cluster_that_ends(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("fastcoop.sweeps.cluster.CONNECT_TIMEOUT_S", 1)
    record, options = ResultsStore.record, {"processes": False, "dashboard_address": ":0", "silence_logs": 50}
    with distributed.LocalCluster(1, **options) as cluster, monkeypatch.context() as ending:

        def end(*arguments: Any) -> None:
            record(*arguments)
            cluster.close()

        ending.setattr(ResultsStore, "record", end)
        refused("run the same command again", run, backend="dask", address=cluster.scheduler_address)
    with distributed.LocalCluster(1, **options) as cluster:
        assert run(backend="dask", address=cluster.scheduler_address).finished == 1
