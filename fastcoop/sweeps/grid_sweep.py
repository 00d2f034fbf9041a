"""A sweep: what of a grid is left to do, and a call that does or forecasts it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastcoop.backbones.devices import resolve_device
from fastcoop.datasets.load import ClassNames
from fastcoop.errors import UserError
from fastcoop.features.store import open_current, open_if_there
from fastcoop.grids.grid import read_grid
from fastcoop.grids.planning import log_notes, plan_runs
from fastcoop.methods import METHODS, Data, RunSpec
from fastcoop.methods.late import fresh_state
from fastcoop.progress import counted
from fastcoop.results.database import DATABASE, reading
from fastcoop.results.metadata import add_datasets, refuse_foreign_grid, write_grid
from fastcoop.results.parameters import load_parameters
from fastcoop.results.read import load_results
from fastcoop.results.records import Batch, ScoreInputs
from fastcoop.results.store import ResultsStore, open_store
from fastcoop.results.tables import find_collapsed
from fastcoop.sweeps.batches import form_batches
from fastcoop.sweeps.caching import cache_loaded
from fastcoop.sweeps.known import record_backbones, record_paces, recorded_backbone
from fastcoop.sweeps.loading import load_grid, open_features, open_unchanged
from fastcoop.sweeps.loop import RunLoop
from fastcoop.sweeps.records import (
    Tests,
    describe_datasets,
    missing_tests,
    training_images_changed,
)
from fastcoop.sweeps.tasks import WorkerSpec
from fastcoop.sweeps.workers import (
    Executor,
    ExecutorConfig,
    ProcessExecutor,
    SerialExecutor,
    budget_of,
    check_options,
    choose_team,
    max_workers,
)

if TYPE_CHECKING:
    from fastcoop.sweeps.forecast import Forecast

Backend = Literal["local", "dask"]

log = logging.getLogger("fastcoop")


@dataclass(frozen=True)
class Count:
    """Numbers of runs of one method on one dataset with one backbone: in the grid, and done before."""

    backbone: str
    dataset: str
    method: str
    runs: int
    done: int


@dataclass(frozen=True)
class Summary:
    """What a sweep did, or would do.

    Attributes:
        results: The results folder.
        counts: Runs in the grid, and how many were done before, by backbone, dataset and method.
        finished: Runs that this sweep did.
        diverged: How many of those diverged: their loss became infinite, NaN or far larger than at the start.
        failed: Errors of failed runs, by key: of this sweep, or of an earlier one and not tried again.
        collapsed: Runs whose accuracy is far below that of their other seeds, as text.
        engine_share: Share of all workers' time that was spent in training steps of the engine.
        workers: Processes that ran tasks.
        peak_memory_bytes: Largest sum of the resident sizes of this process and its workers on this machine.
        seconds: Wall time.
        forecast: Of a dry run: expected time and memory of the runs that are left. None if none are.
    """

    results: Path
    counts: tuple[Count, ...]
    finished: int = 0
    diverged: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)
    collapsed: tuple[str, ...] = ()
    engine_share: float = 0.0
    workers: int = 1
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    forecast: Forecast | None = None

    @property
    def runs(self) -> int:
        """Runs in the grid."""
        return sum(count.runs for count in self.counts)

    @property
    def done_before(self) -> int:
        """Runs that were done before."""
        return sum(count.done for count in self.counts)

    @property
    def left(self) -> int:
        """Runs that are neither done nor failed."""
        return self.runs - self.done_before - self.finished - len(self.failed)

    def as_json(self) -> dict[str, Any]:
        """Return all attributes as JSON types."""
        plain = dataclasses.asdict(self) | {"results": str(self.results)}
        return plain | {"runs": self.runs, "done_before": self.done_before, "left": self.left}


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """The runs of a grid, and how those that are left are run.

    Attributes:
        runs: All runs of the grid, by key.
        counts: Their numbers.
        pending: The runs to do, by key: without what is done already (see `select_pending`).
        skipped: Errors of failed runs that are not tried again, by key.
        batches: Batches of all pending runs, in the order to start them.
        team: The processes of this machine that run them.
    """

    runs: Mapping[str, RunSpec[Any]]
    counts: tuple[Count, ...]
    pending: dict[str, RunSpec[Any]]
    skipped: Mapping[str, str]
    batches: list[Batch]
    team: ExecutorConfig


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
    device: str = "auto",
    jobs: int = -1,
    retry_failed: bool = False,
    skip_unreadable: bool = False,
    backend: Backend = "local",
    address: str | None = None,
    class_names: ClassNames | None = None,
) -> Summary:
    """Run everything of a grid that is not done yet. Missing features are cached first.

    Args:
        grid: A YAML file, or a mapping with its content.
        data_root: Folder of the datasets that the grid names.
        cache: Folder of the feature stores.
        results: The results folder; by default ``results/<name of the grid file>``.
        overrides: ``key=value`` each, in place of the grid's values.
        only: Names of methods to run; empty: all.
        dry_run: Only count the runs, and forecast their time and memory on this machine. Nothing is written.
        memory_budget: Memory for training, in GB; by default a share of the free memory.
        device: Device of the backbones: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:<index>". Each worker of
            a Dask cluster finds "auto" on its own machine.
        jobs: Worker processes (1: run in this process). -1: one per GPU; on a CPU, the number that is fastest. The
            processes of one GPU, or of the CPU, divide its memory among them.
        retry_failed: Also try runs that failed before.
        skip_unreadable: Leave out images that cannot be decoded, with a warning, in place of raising.
        backend: "local" for this machine, or "dask" for the workers of a Dask cluster.
        address: Of the Dask cluster's scheduler.
        class_names: Names to show for the classes of the grid's only dataset that is the user's own, as `load_dataset`
            takes them. They are part of its runs' keys.

    Returns:
        What was done, or would be done.

    Raises:
        UserError: The grid, or something that it names, cannot be used. Nothing has been run then.
        KeyboardInterrupt: On Ctrl-C, after all worker processes have ended. Finished runs are kept, and the same call
            resumes.
    """
    from fastcoop.sweeps.forecast import forecast

    start = time.monotonic()
    if dry_run:
        backend, address = "local", None  # a forecast is of this machine
    check_options(jobs, memory_budget, backend, address)
    workers_device, device = device, resolve_device(device)
    folder, cache = _results_folder(grid, results), Path(cache)
    loaded = load_grid(
        read_grid(grid, overrides, only),
        data_root,
        device,
        class_names,
        partial(recorded_backbone, cache, device=device) if dry_run else None,
    )
    digests = open_features(loaded, cache, open_unchanged if dry_run else open_if_there)
    planned = plan_runs(loaded.runs())  # raises for what is wrong in the grid before any work
    log_notes(planned)

    def make_plan(store: ResultsStore | None) -> SweepPlan:
        recorded = store.batches() if store else []
        failures = store.failures() if store and not retry_failed else {}
        counts, pending, skipped = select_pending(
            planned, store.finished() if store else {}, folder, failures
        )
        by_key = {run.key: run for run in planned}
        workers = 1 if backend == "dask" else max_workers(jobs, device)
        budget = budget_of(device, memory_budget, workers)
        gpu_workers = workers if backend == "local" and device.startswith("cuda") else None
        batches = form_batches(by_key, pending, recorded, budget=budget, gpu_workers=gpu_workers)
        team = ExecutorConfig((device,), 1) if backend == "dask" else choose_team(jobs, device, batches)
        known = {batch.name for batch in recorded}
        batches = [b if b.name in known else replace(b, threads=team.threads) for b in batches]
        return SweepPlan(by_key, counts, pending, skipped, batches, team)

    if dry_run:
        with reading(folder) if (folder / DATABASE).is_file() else nullcontext() as db:
            plan = make_plan(ResultsStore(folder, db) if db else None)
        found = forecast(loaded, plan, cache) if plan.pending else None
        seconds = time.monotonic() - start
        return Summary(folder, plan.counts, failed=plan.skipped, seconds=seconds, forecast=found)

    refuse_foreign_grid(folder)
    with fresh_state(), open_store(folder) as store:
        for _ in cache_loaded(loaded, cache, skip_unreadable=skip_unreadable, retry_skipped=False):
            pass
        if open_features(loaded, cache, open_current) != digests:
            planned = plan_runs(loaded.runs())
        names_file = class_names if isinstance(class_names, str | Path) else None
        write_grid(folder, loaded.grid.source, data_root, cache, names_file)
        add_datasets(folder, describe_datasets(loaded.datasets.values()))
        plan = make_plan(store)
        executor: Executor = SerialExecutor(loaded)
        if backend == "dask" and plan.batches:
            from fastcoop.sweeps.cluster import ClusterExecutor

            executor = ClusterExecutor(WorkerSpec.of(loaded, workers_device), address, folder)
        elif plan.team.size > 1:
            executor = ProcessExecutor(WorkerSpec.of(loaded, device, plan.pending.values()), plan.team)
        log.debug(
            "%d runs in %d batches for %d process(es).", len(plan.pending), len(plan.batches), executor.size
        )
        loop = RunLoop(store, plan.runs, plan.pending, plan.batches, executor)
        record_backbones(cache, loaded.named)
        loop.run()
    if backend == "local":
        # Tests of runs that have learned take far less time than learning.
        tests = {(run.method, run.backbone) for run in plan.pending.values() if run.has_learned}
        paces = {kind: pace for kind, pace in loop.pace.rates().items() if kind[2] or kind[:2] not in tests}
        record_paces(cache, str(loaded.backbones[0].device), plan.team.threads, paces)
    return Summary(
        folder, plan.counts, loop.live.finished, loop.live.diverged, {**plan.skipped, **loop.failed},
        _collapsed(folder, plan.runs), loop.engine_share, executor.size, loop.peak_memory_bytes,
        time.monotonic() - start,
    )  # fmt: skip


def _results_folder(grid: str | Path | Mapping[str, Any], results: str | Path | None) -> Path:
    if results is not None:
        return Path(results)
    if isinstance(grid, Mapping):
        raise UserError("A grid that is not a file needs a results folder; give one (results=...).")
    return Path("results") / Path(grid).stem


def select_pending(
    planned: Sequence[RunSpec[Any]], tested: Tests, folder: Path, failures: Mapping[str, str]
) -> tuple[tuple[Count, ...], dict[str, RunSpec[Any]], dict[str, str]]:
    """Return the numbers of runs, the runs to do by key, and the errors of those that ``failures`` leaves out.

    Runs that are done but lack a test, or whose test was of something that has changed, are returned with what they
    learned, where it is kept.
    """
    counts: dict[tuple[str, str, str], list[int]] = {}
    pending, skipped = {}, {}
    for run in planned:
        left = run if run.key not in tested else _untested_part(run, tested[run.key], folder)
        count = counts.setdefault((run.backbone, run.dataset, run.method), [0, 0])
        count[0] += 1
        count[1] += left is None
        if left is not None and run.key in failures:
            skipped[run.key] = failures[run.key]
        elif left is not None:
            pending[run.key] = left
    return tuple(Count(*names, *count) for names, count in counts.items()), pending, skipped


def _untested_part(run: RunSpec[Any], tested: Mapping[str, ScoreInputs], folder: Path) -> RunSpec[Any] | None:
    """Return what is left to do of a finished run, or None: its missing tests, or all of it if nothing that it learned
    is kept or its training images have changed."""
    targets: tuple[Data, ...] = missing_tests(run, tested)
    if not targets:
        return None
    if not METHODS[run.method].learns:
        return replace(run.with_targets(targets), weights={})
    learned = None if training_images_changed(run, tested) else load_parameters(folder, run.key)
    if learned is None:
        return run
    return replace(run.with_targets(targets), contexts=learned.contexts, weights=learned.weights or {})


def _collapsed(folder: Path, planned: Mapping[str, RunSpec[Any]]) -> tuple[str, ...]:
    frame = load_results(folder)
    frame = find_collapsed(frame[frame.key.isin(planned.keys())])
    return tuple(
        f"{row.label} on {row.dataset}, {counted(str(row.shots), 'shot')}, seed {row.seed}: {row.accuracy:.1f}%"
        for row in frame.itertuples()
    )
