"""A sweep: everything a grid asks for that is not done yet."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, store_path
from fastcoop.methods import METHODS, Outcome, RunContext
from fastcoop.progress import progress
from fastcoop.sweeps.about import write_about
from fastcoop.sweeps.caching import cache_world
from fastcoop.sweeps.grid import read_grid
from fastcoop.sweeps.plan import PlannedRun, World, load_world, plan_runs
from fastcoop.sweeps.results import DATABASE, load_contexts, tested_runs
from fastcoop.sweeps.store import ResultsStore, open_store

INTERRUPTED = 130  # the exit code that shells know for Ctrl-C


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
        seconds: wall time.
    """

    results: Path
    counts: tuple[Count, ...]
    finished: int = 0
    diverged: int = 0
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
        jobs: processes for what does not train together; -1 is one per core.

    Raises:
        UserError: the grid, or something it names, cannot be used. Nothing has been run then.
        SystemExit: 130, on Ctrl-C; what is done is kept.
    """
    start = time.monotonic()
    read = read_grid(grid, overrides, only)
    if results is None:
        if isinstance(grid, Mapping):
            raise UserError("A grid that is not a file needs a results folder; give one (results=...).")
        results = Path("results") / Path(grid).stem
    world = load_world(read, Path(data_root) if data_root is not None else None, device)
    folder = Path(results)
    known = _open_features(world, Path(cache))
    planned = plan_runs(world)  # finds what is wrong before any work
    if dry_run:
        return Summary(folder, _count(planned, _tested(folder)), seconds=time.monotonic() - start)

    with open_store(folder) as store:
        try:
            for _ in cache_world(world, Path(cache), retry_skipped=False):
                pass
            if _open_features(world, Path(cache)) != known:
                planned = plan_runs(world)
            write_about(folder, read, world.datasets.values())
            tested = store.done()
            counts = _count(planned, tested)
            context = RunContext(jobs, None if memory_budget is None else int(memory_budget * 1e9))
            finished, diverged = _run(_pending(planned, tested, folder), store, context)
        except KeyboardInterrupt:
            done = len(store.done())
            print(
                f"Stopped. {done} runs are done and kept in {folder}; the same command goes on from there.",
                file=sys.stderr,
            )
            raise SystemExit(INTERRUPTED) from None
    return Summary(folder, counts, finished, diverged, time.monotonic() - start)


def _open_features(world: World, cache: Path) -> list[str | None]:
    """Open all feature stores that are there; returns their digests, None for those that are not."""
    for backbone in world.backbones:
        for dataset in world.datasets.values():
            path = store_path(cache, backbone, dataset)
            store = FeatureStore.open(path, backbone, dataset) if path.exists() else None
            world.add_features(backbone, dataset, store)
    return [data.store.digest if data.store else None for data in world.data.values()]


def _tested(folder: Path) -> dict[str, set[str]]:
    if not (folder / DATABASE).is_file():
        return {}
    return tested_runs(folder)


def _count(planned: Sequence[PlannedRun], tested: Mapping[str, set[str]]) -> tuple[Count, ...]:
    tally: dict[tuple[str, str, str], list[int]] = {}
    for run in planned:
        count = tally.setdefault((run.backbone.name, run.job.data.name, run.method), [0, 0])
        count[0] += 1
        count[1] += tested.get(run.key, set()) >= set(run.tests)
    return tuple(Count(*names, *count) for names, count in tally.items())


def _pending(planned: Sequence[PlannedRun], tested: Mapping[str, set[str]], folder: Path) -> list[PlannedRun]:
    """Runs not done, and done ones that lack a test: these with the contexts they learned, if any."""
    pending = []
    for run in planned:
        if run.key not in tested:
            pending.append(run)
        elif not tested[run.key] >= set(run.tests):
            learned = load_contexts(folder, run.key) if run.method == "coop" else None
            pending.append(dataclasses.replace(run, job=dataclasses.replace(run.job, contexts=learned)))
    return pending


def _run(pending: Sequence[PlannedRun], store: ResultsStore, context: RunContext) -> tuple[int, int]:
    """Do the runs, those of one method over one backbone together; returns how many ended and diverged."""
    groups: dict[tuple[str, Backbone], list[PlannedRun]] = {}
    for run in pending:
        groups.setdefault((run.method, run.backbone), []).append(run)
    ended = diverged = 0
    for method in METHODS:
        for (name, backbone), runs in groups.items():
            if name != method:
                continue
            title = f"{backbone.name}: {len(runs)} {method} runs"
            with progress(title, len(runs)) as advance:

                def done(index: int, outcome: Outcome, runs: list[PlannedRun] = runs) -> None:
                    nonlocal ended, diverged
                    store.record(runs[index], outcome)
                    ended += 1
                    diverged += outcome.status == "diverged"

                together = dataclasses.replace(context, on_progress=advance)
                METHODS[method].run(backbone, [run.job for run in runs], done, together)
    return ended, diverged
