"""A real Dask cluster on this machine: the planned batches, the results of one process, and workers that die."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastcoop.errors import UserError
from fastcoop.results.store import ResultsStore
from fastcoop.sweeps import Summary
from fastcoop.sweeps.live import Pace
from tests.sweeps.test_workers import same_results

distributed = pytest.importorskip("distributed", reason="Dask is not installed (fastcoop[cluster])")

Sweep = Callable[..., Summary]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=None,
        worker_dashboard_address=None, silence_logs=50,
    ) as cluster:  # fmt: skip
        yield cluster


def test_a_cluster_of_which_a_worker_is_killed_does_what_one_process_does(
    cluster: Any, run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid["methods"] = {"coop": grid["methods"]["coop"], "zero_shot": None, "linear_probe": {"iterations": 20}}
    grid["shots"] = 1
    run(grid, results=tmp_path / "alone", memory_budget=1e-9)
    record, killed = ResultsStore.record, []

    def kill_first(store: ResultsStore, planned: Any, *rest: Any) -> None:
        record(store, planned, *rest)
        if not killed and planned.method == "coop":
            with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
                processing = client.processing()
                busy = next((worker for worker, tasks in processing.items() if tasks), next(iter(processing)))
                killed.append(psutil.Process(client.run(os.getpid, workers=[busy])[busy]))
            killed[0].send_signal(signal.SIGKILL)

    monkeypatch.setattr(ResultsStore, "record", kill_first)
    address = cluster.scheduler_address
    summary = run(
        grid, results=tmp_path / "many", memory_budget=1e-9, backend="dask", jobs=-1, address=address
    )
    assert len(killed) == 1
    assert (summary.workers, summary.finished, summary.failed) == (2, 11, {})
    same_results(tmp_path / "alone", tmp_path / "many")


def test_features_travel_along_where_workers_do_not_see_them(
    cluster: Any, run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcoop.sweeps import cluster as cluster_module

    monkeypatch.setattr(cluster_module, "_sees", blind)
    address = cluster.scheduler_address
    with distributed.Client(address, set_as_default=False) as client:
        client.run(report_each_step)
    shares: list[float] = []
    progress = Pace.progress

    def watched(pace: Pace, *work: Any) -> None:
        progress(pace, *work)
        shares.extend(share for _, share in pace.running())

    monkeypatch.setattr(Pace, "progress", watched)
    grid |= {"methods": {"coop": {"context_length": 2, "epochs": 2}, "zero_shot": None}, "shots": 1}
    run(grid, results=tmp_path / "alone")
    summary = run(grid, results=tmp_path / "far", backend="dask", jobs=-1, address=address)
    assert (summary.finished, summary.failed) == (3, {})
    assert any(0 < share < 1 for share in shares), "progress arrives while a task runs"
    same_results(tmp_path / "alone", tmp_path / "far")
    with distributed.Client(address, set_as_default=False) as client:
        assert set(client.run(held).values()) == {0}, "backbones and features are freed with the sweep"


def test_what_a_worker_cannot_load_is_an_error_of_its_runs(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(payload: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastcoop.sweeps.cluster._bank", no_space)
    with distributed.LocalCluster(1, processes=False, dashboard_address=":0", silence_logs=50) as cluster:
        options = {"backend": "dask", "jobs": -1, "address": cluster.scheduler_address}
        summary = run(grid | {"methods": {"zero_shot": None}}, results=tmp_path, **options)
    assert summary.finished == 0
    assert ["No space left" in error for error in summary.failed.values()] == [True]


def report_each_step() -> None:
    from fastcoop.sweeps import tasks

    tasks.PROGRESS_EVERY = 0.0


def held() -> int:
    from fastcoop.sweeps import cluster as cluster_module

    return len(cluster_module._banks)


def blind(paths: list[str]) -> bool:
    return False


def test_a_cluster_that_is_not_there_is_one_sentence(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcoop.sweeps.cluster.CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="no Dask scheduler with workers"):
        run(grid, results=tmp_path, backend="dask", jobs=-1, address="tcp://127.0.0.1:9")
    with pytest.raises(UserError, match="needs the address"):
        run(grid, results=tmp_path, backend="dask", jobs=-1)
