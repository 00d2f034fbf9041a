"""A sweep: everything a grid asks for that is not done yet."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, open_current, open_if_there, store_path
from fastcoop.grids.grid import read_grid
from fastcoop.grids.plan import (
    LoadedGrid,
    load_grid,
    plan_runs,
    warn_of_idle_settings,
)
from fastcoop.methods import METHODS, Data, RunSpec
from fastcoop.results.collapsed import find_collapsed
from fastcoop.results.database import DATABASE
from fastcoop.results.metadata import add_datasets, write_grid
from fastcoop.results.parameters import load_parameters
from fastcoop.results.read import load_results, load_score_inputs
from fastcoop.results.records import ScoreInputs
from fastcoop.results.store import open_store
from fastcoop.sweeps.caching import cache_world
from fastcoop.sweeps.memory import PeakMemory
from fastcoop.sweeps.records import complete_records, dataset_record, missing_tests, training_images_changed
from fastcoop.sweeps.schedule import Schedule, form_batches
from fastcoop.sweeps.work import Supplies
from fastcoop.sweeps.workers import (
    Executor,
    ProcessExecutor,
    SerialExecutor,
    budget_of,
    check_backend,
    check_limits,
    choose_team,
    max_workers,
)

Backend = Literal["local", "dask"]

log = logging.getLogger("fastcoop")


@dataclass(frozen=True)
class Count:
    """Runs of one method on one dataset by one backbone: how many the grid has, how many are done."""

    backbone: str
    dataset: str
    method: str
    runs: int
    done: int


@dataclass(frozen=True)
class Summary:
    """What a sweep did, or would do.

    Attributes:
        results: the results folder.
        counts: what the grid has and what of it was done before, by backbone, dataset and method.
        finished: runs that this sweep did.
        diverged: how many of those lost their way (a loss that is not finite, or far above its start).
        failed: errors of runs that failed, by key: in this sweep, or before and not tried again.
        collapsed: runs of the grid whose accuracy is far below their sister seeds', in words.
        engine_share: of the time of all workers, that spent in training steps of the engine.
        workers: processes that did the work.
        peak_memory: the largest sum of resident sizes, in bytes, of this process and its workers on this machine.
        seconds: wall time.
    """

    results: Path
    counts: tuple[Count, ...]
    finished: int = 0
    diverged: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)
    collapsed: tuple[str, ...] = ()
    engine_share: float = 0.0
    workers: int = 1
    peak_memory: int = 0
    seconds: float = 0.0

    @property
    def runs(self) -> int:
        return sum(count.runs for count in self.counts)

    @property
    def done_before(self) -> int:
        return sum(count.done for count in self.counts)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        plain = dataclasses.asdict(self) | {"results": str(self.results)}
        return plain | {"runs": self.runs, "done_before": self.done_before}


@fresh_state()
def sweep(
    grid: str | Path | Mapping[str, Any],
    *,
    data_root: str | Path | None = "data",
    cache: str | Path = "cache",
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    dry_run: bool = False,
    memory_budget: float | None = None,
    device: str = "cpu",
    jobs: int = -1,
    retry_failed: bool = False,
    skip_unreadable: bool = False,
    backend: Backend = "local",
    address: str | None = None,
) -> Summary:
    """Do the runs of a grid that are not done, caching the features that they need first.

    Args:
        grid: a YAML file, or a mapping of what one would hold.
        data_root: where datasets named in the grid lie.
        cache: where feature stores lie.
        results: the results folder; by default ``results/<name of the grid file>``.
        overrides: ``key=value`` each, in place of what the grid says.
        only: methods to run; none is all.
        dry_run: only count.
        memory_budget: GB that training may take at once.
        device: of the towers.
        jobs: processes to work with; -1 is as many as are quickest, 1 this process alone.
        retry_failed: try runs again that failed before.
        skip_unreadable: leave images out that cannot be decoded, and say which, instead of raising.
        backend: "local", or "dask" for the workers of a Dask cluster, whose scheduler is at ``address``.

    Raises:
        UserError: the grid, or something it names, cannot be used. Nothing has been run then.
        KeyboardInterrupt: on Ctrl-C, after all worker processes have ended. Runs that were done are kept, and the same
            call goes on from there.
    """
    start = time.monotonic()
    check_limits(jobs, memory_budget, device)
    check_backend(backend, address, jobs)
    read = read_grid(grid, overrides, only)
    folder = results_folder(grid, results)
    world = load_grid(read, Path(data_root) if data_root is not None else None, device)
    known = _open_features(world, Path(cache), open_unchanged if dry_run else open_if_there)
    planned = plan_runs(world)  # finds what is wrong before any work
    warn_of_idle_settings(planned)
    if dry_run:
        return Summary(folder, _count(planned, _tested(folder)), seconds=time.monotonic() - start)

    with open_store(folder) as store:
        for _ in cache_world(world, Path(cache), skip_unreadable=skip_unreadable, retry_skipped=False):
            pass
        if _open_features(world, Path(cache), open_current) != known:
            planned = plan_runs(world)
        write_grid(folder, read.source, data_root, cache)
        add_datasets(folder, map(dataset_record, world.datasets.values()))
        complete_records(store, planned)
        tested, failures = store.finished(), store.failures()
        counts = _count(planned, tested)
        by_key = {run.key: run for run in planned}
        pending = {run.key: run for run in _pending(planned, tested, folder)}
        skipped = {key: failures[key] for key in pending if key in failures and not retry_failed}
        for key in skipped:
            del pending[key]

        sharers = 1 if backend == "dask" else max_workers(jobs, device)
        budget = budget_of(device, memory_budget, sharers)
        recorded = store.batches()
        batches = form_batches(by_key, pending, recorded, threads=1, budget=budget)
        executor: Executor
        if backend == "dask" and batches:
            from fastcoop.sweeps.cluster import ClusterExecutor

            executor = ClusterExecutor(Supplies.of(world, device), address, folder)
        else:
            team = choose_team(jobs, device, batches)
            names = {batch.name for batch in recorded}
            batches = [b if b.name in names else replace(b, threads=team.threads) for b in batches]
            executor = (
                SerialExecutor(world) if team.size == 1 else ProcessExecutor(Supplies.of(world, device), team)
            )
        log.debug(
            "%d runs left, in %d batches, for %d process(es) with %.1f GB for the training of each.",
            len(pending), len(batches), executor.size, budget / 1e9,
        )  # fmt: skip
        schedule = Schedule(store, by_key, pending, batches, executor.keeps_checkpoints)
        with PeakMemory() as memory:
            schedule.work(executor)
    tally = schedule.tally
    return Summary(
        folder, counts, tally.finished, tally.diverged, skipped | tally.failed, _collapsed(folder, by_key),
        tally.engine_seconds / max(tally.worker_seconds, 1e-9), executor.size, memory.peak,
        time.monotonic() - start,
    )  # fmt: skip


def _collapsed(folder: Path, planned: Mapping[str, RunSpec[Any]]) -> tuple[str, ...]:
    frame = load_results(folder)
    frame = find_collapsed(frame[frame.key.isin(planned.keys())])
    return tuple(
        f"{row.label} on {row.dataset}, {row.shots} shot{'s' * (str(row.shots) != '1')}, seed {row.seed}:"
        f" {row.accuracy:.1f}%"
        for row in frame.itertuples()
    )


def results_folder(grid: str | Path | Mapping[str, Any], results: str | Path | None) -> Path:
    """Where a grid's results go: ``results``, or ``results/<name of the grid file>``.

    Raises UserError for a grid that is not a file, where no folder is given.
    """
    if results is not None:
        return Path(results)
    if isinstance(grid, Mapping):
        raise UserError("A grid that is not a file needs a results folder; give one (results=...).")
    return Path("results") / Path(grid).stem


def open_unchanged(path: Path, backbone: Backbone, dataset: Dataset) -> FeatureStore | None:
    """Open a store, if it is there, without images whose files have changed, and warn of those."""
    store = open_if_there(path, backbone, dataset, only_unchanged=True)
    if store is not None and store.compared.count:
        log.warning(
            f"{store.compared.count} image file(s) of {dataset.name} have changed since they were encoded; they would "
            "be encoded again."
        )
    return store


def _open_features(
    world: LoadedGrid,
    cache: Path,
    open_one: Callable[[Path, Backbone, Dataset], FeatureStore | None] = open_if_there,
) -> list[Mapping[str, str] | None]:
    """Open all feature stores that are there; returns the digests of their splits, None for those that are not."""
    for backbone in world.backbones:
        for dataset in world.datasets.values():
            world.add_features(
                backbone, dataset, open_one(store_path(cache, backbone, dataset), backbone, dataset)
            )
    return [data.store.meta.sha256 if data.store else None for data in world.features.values()]


def _tested(folder: Path) -> dict[str, dict[str, ScoreInputs]]:
    if not (folder / DATABASE).is_file():
        return {}
    return load_score_inputs(folder)


def _count(
    planned: Sequence[RunSpec[Any]], tested: Mapping[str, Mapping[str, ScoreInputs]]
) -> tuple[Count, ...]:
    tally: dict[tuple[str, str, str], list[int]] = {}
    for run in planned:
        count = tally.setdefault((run.backbone, run.dataset, run.method), [0, 0])
        count[0] += 1
        count[1] += run.key in tested and not missing_tests(run, tested[run.key])
    return tuple(Count(*names, *count) for names, count in tally.items())


def _pending(
    planned: Sequence[RunSpec[Any]], tested: Mapping[str, Mapping[str, ScoreInputs]], folder: Path
) -> list[RunSpec[Any]]:
    """Runs not done, and done ones that lack a test, or whose test was of something that has changed: these with what
    they learned, where it is kept."""
    pending = []
    for run in planned:
        if run.key not in tested:
            pending.append(run)
        elif targets := missing_tests(run, tested[run.key]):
            pending.append(_left(run, targets, tested[run.key], folder))
    return pending


def _left(
    run: RunSpec[Any], targets: tuple[Data, ...], tested: Mapping[str, ScoreInputs], folder: Path
) -> RunSpec[Any]:
    """Of a run that is done the tests it lacks; all of it again where nothing that it learned is kept, or where the
    images that it learned from have changed."""
    if not METHODS[run.method].learns:
        return replace(run.with_targets(targets), weights={})
    if training_images_changed(run, tested):
        return run
    learned = load_parameters(folder, run.key)
    if learned is None:
        return run
    return replace(run.with_targets(targets), contexts=learned.contexts, weights=learned.weights)
