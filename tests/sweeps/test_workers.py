"""Worker processes: the same results as one process, whatever becomes of a worker."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from fastcoop.engine.fit import FREE_FRACTION
from fastcoop.errors import UserError
from fastcoop.grids import read_grid
from fastcoop.grids.planning import plan_runs
from fastcoop.methods import RunSpec
from fastcoop.methods.coop import CoOpSettings
from fastcoop.processes import ProcessPoolExecutor
from fastcoop.results import load_contexts, load_results
from fastcoop.results.records import Batch
from fastcoop.results.store import ResultsStore
from fastcoop.sweeps import Summary, cache_grid
from fastcoop.sweeps.batches import plan_batches
from fastcoop.sweeps.loading import load_grid, open_features
from fastcoop.sweeps.tasks import RunFinished, Task, WorkerBank, WorkerSpec, run_task
from fastcoop.sweeps.workers import (
    ExecutorConfig,
    ProcessExecutor,
    _Worker,
    available_cores,
    budget_of,
    choose_team,
    max_workers,
)
from tests.small_world import write_backbone

Sweep = Callable[..., Summary]


def workers_of_this_process() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:  # ended, or a zombie that joblib has yet to collect
        return False
    return any("loky" in word for word in words) and not any("resource_tracker" in word for word in words)


def same_results(one: Path, two: Path) -> None:
    """Equal to the bit, contexts, losses and all."""
    columns = ["key", "accuracy", "losses", "per_class"]
    a, b = (load_results(folder)[columns].sort_values("key", ignore_index=True) for folder in (one, two))
    assert a.equals(b), a.compare(b)
    for key in load_results(one).query("method == 'coop'").key:
        assert np.array_equal(load_contexts(one, key), load_contexts(two, key))


def test_two_workers_of_which_one_is_killed_do_what_one_process_does(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first result in, a worker is killed; its batch goes to a new one, and all else is as if nothing was.

    With room for one run at a time every batch is a single run, which is tried again as it was.
    """
    grid["methods"] = {"coop": grid["methods"]["coop"], "zero_shot": None}
    run(grid, results=tmp_path / "alone", memory_budget=1e-9)
    record, killed = ResultsStore.record, []

    def kill_first(store: ResultsStore, planned: Any, *rest: Any) -> None:
        record(store, planned, *rest)
        if not killed and planned.method == "coop":
            killed.extend(workers_of_this_process()[:1])
            os.kill(killed[0].pid, signal.SIGKILL)

    monkeypatch.setattr(ResultsStore, "record", kill_first)
    summary = run(grid, results=tmp_path / "both", memory_budget=1e-9, jobs=2)
    assert len(killed) == 1
    assert (summary.workers, summary.finished, summary.failed) == (2, 17, {})
    same_results(tmp_path / "alone", tmp_path / "both")
    psutil.wait_procs(workers_of_this_process(), timeout=30)
    assert workers_of_this_process() == []


def test_a_worker_reads_the_features_of_each_runs_own_backbone(world: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "other") / "open_clip_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    grid = {
        "backbones": [str(world / "tiny"), str(tmp_path / "other")], "datasets": "colours", "methods": "zero_shot",
    }  # fmt: skip
    list(cache_grid(grid, data_root=world / "data", cache=tmp_path / "cache"))
    loaded = load_grid(read_grid(grid), world / "data", "cpu")
    open_features(loaded, tmp_path / "cache")
    bank = WorkerBank(WorkerSpec.of(loaded, "cpu"))
    for run in plan_runs(loaded.runs()):
        bound = bank.bind(run.unbound())
        assert bound.model.digest == run.model.digest
        assert bound.data.store is not None
        assert bound.data.store.path == tmp_path / "cache" / run.backbone / "colours.h5"


RUN_IN_A_WORKER = """
import pickle, sys
from pathlib import Path
from fastcoop.sweeps.tasks import WorkerBank, run_task
spec, tasks = pickle.loads(Path(sys.argv[1]).read_bytes())
bank, events = WorkerBank(spec), []
for task in tasks:
    run_task(task, bank, events.append)
Path(sys.argv[2]).write_bytes(pickle.dumps(events))
assert "open_clip" not in sys.modules
"""


def test_a_worker_loads_no_towers_for_methods_on_features(world: Path, tmp_path: Path) -> None:
    """It gets their text features, and runs have the results that they have with the backbone."""
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "views": 2, "shots": 1, "seeds": [1, 2],
        "methods": {
            "zero_shot": {"prompt": "a sketch of a {}."}, "task_res": {"epochs": 2}, "linear_probe": {"iterations": 5},
        },
    }  # fmt: skip
    list(cache_grid(grid, data_root=world / "data", cache=tmp_path / "cache"))
    loaded = load_grid(read_grid(grid), world / "data", "cpu")
    open_features(loaded, tmp_path / "cache")
    planned = plan_runs(loaded.runs())
    tasks = [
        Task(batch, tuple(run.unbound() for run in planned if run.key in batch.keys))
        for batch in plan_batches(planned, budget=1 << 30)
    ]
    given, results = tmp_path / "given", tmp_path / "results"
    given.write_bytes(pickle.dumps((WorkerSpec.of(loaded, "cpu", planned), tasks)))
    subprocess.run([sys.executable, "-c", RUN_IN_A_WORKER, str(given), str(results)], check=True)
    expected: list[Any] = []
    for task in tasks:
        run_task(task, loaded, expected.append)
    there, here = (
        {event.key: event.outcome for event in events if isinstance(event, RunFinished)}
        for events in (pickle.loads(results.read_bytes()), expected)
    )
    assert len(there) == 5
    for key, outcome in here.items():
        assert there[key].scores["colours"].accuracy == outcome.scores["colours"].accuracy
        for name, array in (outcome.weights or {}).items():
            assert np.array_equal(there[key].weights[name], array)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no signal masks")
def test_ctrl_c_does_not_reach_workers_while_they_start() -> None:
    pool = ProcessPoolExecutor(1)
    try:
        there = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    finally:
        pool.shutdown(kill_workers=True)
    assert signal.SIGINT in there
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


DIES_AT_START = """import os, sys
line = " ".join(sys.orig_argv)
if "loky" in line and "resource_tracker" not in line:
    os._exit(1)
"""


def test_a_worker_that_dies_while_it_starts_ends_its_runs_whatever_its_task_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contexts to test are larger than a pipe's buffer."""
    (tmp_path / "sitecustomize.py").write_text(DIES_AT_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    batch = Batch("coop", "none", ("a",), 1)
    large = RunSpec("coop", CoOpSettings(), "none", "d", contexts=np.zeros((1 << 20,), np.float32))
    workers = ProcessExecutor(WorkerSpec({}, {}, {}, {}, 0, "cpu"), ExecutorConfig(("cpu",), 1))
    events: list[Any] = []
    workers.run(deque([Task(batch, (large,))]), events.append, lambda: None)
    (event,) = events
    assert event.died
    assert "the worker process was ended" in event.error


@pytest.mark.parametrize(
    ("cores", "jobs", "cost", "batches", "expected"),
    [
        (2, -1, 100.0, 8, (2, 1)),  # two processes of a thread each
        (8, -1, 100.0, 4, (4, 2)),  # no more than there are batches
        (8, -1, 1.0, 8, (1, 8)),  # not worth a worker's start
        (8, 2, 1.0, 8, (2, 4)),  # as asked
        (1, -1, 100.0, 8, (1, 1)),
    ],
)
def test_the_number_of_workers_is_what_is_quickest(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    jobs: int,
    cost: float,
    batches: int,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr("fastcoop.sweeps.workers.available_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    team = choose_team(jobs, "cpu", [Batch("coop", "b", (str(n),), 1, 1, cost) for n in range(batches)])
    assert (team.size, team.threads) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_team(1, "cpu", []).threads == 1
    assert available_cores() >= 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"jobs": 0}, "number of jobs .* from 1 to 1024, got 0"),
        ({"jobs": -2}, "number of jobs"),
        ({"jobs": True}, "got True"),
        ({"jobs": 2.0}, "got 2.0"),
        ({"jobs": "2"}, "got '2'"),
        ({"jobs": 10**12}, "got 1000000000000"),
        ({"memory_budget": -1.0}, "memory budget in GB to be a finite number above 0, got -1.0"),
        ({"memory_budget": float("nan")}, "got nan"),
        ({"memory_budget": float("inf")}, "got inf"),
        ({"memory_budget": 0}, "got 0"),
        ({"memory_budget": 10**400}, "got 1"),
        ({"memory_budget": True}, "got True"),
        ({"memory_budget": "4"}, "got '4'"),
        ({"device": "cuda:77"}, 'device "cuda:77" cannot be used'),
        ({"device": "gpu"}, 'device "gpu" cannot be used'),
    ],
)
def test_limits_that_cannot_be(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, limits: dict[str, Any], message: str
) -> None:
    for work in (run, partial(run, dry_run=True)):
        with pytest.raises(UserError, match=message):
            work(grid, results=tmp_path / "results", **limits)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"backend": "spark"}, 'Expected the backend "local" or "dask"'),
        ({"address": "tcp://127.0.0.1:9"}, "give the backend dask with it"),
        ({"backend": "dask", "jobs": 2}, "number of jobs is the cluster's"),
        ({"backend": "dask", "jobs": -1}, "needs the address of a scheduler"),
    ],
)
def test_backends_that_cannot_be(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, choice: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(grid, results=tmp_path / "results", **choice)


def test_workers_share_the_memory() -> None:
    assert budget_of("cpu", 3.0, 3) == 1_000_000_000
    assert budget_of("cpu", None, 4) * 3 < budget_of("cpu", None, 1)


@pytest.mark.parametrize(
    ("gpus", "device", "workers", "sharing"),
    [
        (1, "cuda", 1, 1),
        (1, "cuda", 4, 4),
        (2, "cuda", 2, 1),
        (2, "cuda", 3, 2),
        (4, "cuda", 2, 1),
        (2, "cuda:0", 2, 2),
        (2, "cuda:1", 1, 1),
    ],
)
def test_workers_share_the_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, workers: int, sharing: int
) -> None:
    """GPU 1 has half as much free memory as the others, and every GPU the same batches."""
    free = {f"cuda:{number}": 10**10 for number in range(gpus)} | {"cuda:1": 5 * 10**9}
    monkeypatch.setattr("fastcoop.sweeps.workers.free_bytes", lambda device: free[str(device)])
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    team = choose_team(workers, device, [])
    assert team.size == workers
    used = {f"{name}:0" if name == "cuda" else name for name in team.devices}
    budget = budget_of(device, None, workers)
    assert budget == int(FREE_FRACTION * min(free[name] for name in used) / sharing)
    for name in used:
        assert sum(one.partition(":")[2] in ("", name[5:]) for one in team.devices) * budget <= free[name]
    assert max_workers(workers, device) == workers
    assert max_workers(-1, device) == choose_team(-1, device, [Batch("coop", "b", ("1",), 1, 1, 1e9)]).size
    assert budget_of(device, 3.0, workers) == int(3e9 / workers)


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        ("", "cuda:1", "1"),
        ("0, GPU-2b5f,MIG-9c1d", "cuda:1", "GPU-2b5f"),
        ("0,GPU-2b5f, MIG-9c1d", "cuda:2", "MIG-9c1d"),
        ("3", "cuda:0", "3"),
    ],
)
def test_a_worker_sees_the_gpu_that_is_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str, device: str, expected: str
) -> None:
    made: dict[str, Any] = {}

    class Executor:
        def __init__(self, workers: int, env: dict[str, str]):
            made.update(env)

        def submit(self, function: Any, connection: Any, supplies: WorkerSpec, *rest: Any) -> None:
            made["device"] = supplies.device

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("fastcoop.sweeps.workers.ProcessPoolExecutor", Executor)
    _Worker(WorkerSpec({}, {}, {}, {}, 0, device), device, 1)
    assert (made["CUDA_VISIBLE_DEVICES"], made["device"]) == (expected, "cuda")
