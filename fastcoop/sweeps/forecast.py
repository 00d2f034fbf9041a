"""``--dry-run``: what a sweep would do, and its expected time and memory.

Counts, operations and bytes come from the engine's plan. Times come from earlier runs in the results folder, or else
from about two seconds of measurement: a few small training steps per backbone and method, and one or two runs of each
method outside the engine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from fastcoop.backbones.precision import fresh_state
from fastcoop.grids.grid import read_grid
from fastcoop.grids.planning import LoadedGrid, load_grid, plan_runs, warn_of_unused_settings
from fastcoop.methods import METHODS, RunContext, RunSpec
from fastcoop.methods.schedule import ScheduleSettings, epochs_of, steps_per_epoch
from fastcoop.progress import counted, duration
from fastcoop.results.database import DATABASE
from fastcoop.results.read import load_batches, load_failures, load_runs
from fastcoop.results.records import Batch
from fastcoop.sweeps.batches import shape_of
from fastcoop.sweeps.caching import missing_crops
from fastcoop.sweeps.sweep import (
    Summary,
    count_runs,
    open_features,
    open_unchanged,
    plan_execution,
    results_folder,
    select_pending,
    tests_in,
)
from fastcoop.sweeps.workers import ExecutorConfig, check_limits

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.datasets import Dataset
    from fastcoop.engine import TrainingPlan

MAX_STEP_FLOPS = 3e10  # of a timed step: about a second of a core
MAX_RUN_SECONDS = 2.0  # of a second timed run of a method outside the engine
TIMED_CROPS = 8
MAX_STARTUP = 10.0  # seconds of importing the libraries, however old this process is


@dataclass(frozen=True)
class Part:
    """Batches of one method with one backbone: their number, runs, runs of the largest, and seconds on one worker (None
    if unknown)."""

    backbone: str
    method: str
    batches: int
    runs: int
    largest: int
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """What is left of a sweep.

    Attributes:
        parts: Its batches, by backbone and method.
        nodes: Distinct token prefixes that training computes, counted once per step and run.
        flops: Floating-point operations of training, forward and backward.
        crops: Images and views that are encoded first.
        workers, threads: Processes, and threads of each.
        seconds: Expected wall time of the command; None if the time of a part is unknown.
        memory: Expected bytes of all processes.
        measured: Seconds that the measurement took.
    """

    parts: tuple[Part, ...]
    nodes: float
    flops: float
    crops: int
    workers: int
    threads: int
    seconds: float | None
    memory: float
    measured: float

    def lines(self) -> Iterator[str]:
        """Yield the forecast as lines of text."""
        if self.crops:
            yield f"features of {self.crops:,} images and views are missing and are cached first"
        for part in self.parts:
            batches = f"{part.batches:,} batch{'es' * (part.batches > 1)} of up to {part.largest}"
            took = "time unknown" if part.seconds is None else f"{duration(part.seconds)} of a worker"
            yield f"{part.backbone}  {part.method}: {counted(part.runs, 'run')} in {batches}, {took}"
        if self.nodes:
            yield f"training computes {self.nodes:.3g} nodes, {self.flops:.3g} floating-point operations"
        took = "unknown time" if self.seconds is None else duration(self.seconds)
        workers = f"{self.workers} process{'es' * (self.workers > 1)} (threads of each: {self.threads})"
        yield f"expected: {took} and {self.memory / 1e9:.1f} GB, by {workers}"
        if self.seconds is None:
            yield "times of methods outside the engine are known once the features are cached"


@dataclass(frozen=True)
class DryRun:
    """What a sweep would do: the grid's runs, a forecast (None if all are done), and how many failed before."""

    summary: Summary
    forecast: Forecast | None
    failed: int = 0

    @property
    def left(self) -> int:
        """Runs that would be done."""
        return self.summary.runs - self.summary.done_before - self.failed

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        forecast = dataclasses.asdict(self.forecast) if self.forecast else None
        return self.summary.as_json() | {"would_run": self.left, "failed": self.failed, "forecast": forecast}


@fresh_state()
def dry_run(
    grid: str | Path | Mapping[str, Any],
    *,
    data_root: str | Path | None = "data",
    cache: str | Path = "cache",
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    memory_budget: float | None = None,
    device: str = "cpu",
    jobs: int = -1,
    retry_failed: bool = False,
) -> DryRun:
    """Plan a sweep and forecast its time and memory. Arguments are those of `sweep`. Nothing is written.

    Raises:
        UserError: The grid, or something that it names, cannot be used.
    """
    start = time.monotonic()
    startup = min(max(0.0, time.time() - psutil.Process().create_time()), MAX_STARTUP)
    check_limits(jobs, memory_budget, device)
    folder = results_folder(grid, results)
    loaded = load_grid(
        read_grid(grid, overrides, only), Path(data_root) if data_root is not None else None, device
    )
    open_features(loaded, Path(cache), open_unchanged)
    planned = plan_runs(loaded)
    warn_of_unused_settings(planned)
    tested = tests_in(folder)
    summary = Summary(folder, count_runs(planned, tested))
    exists = (folder / DATABASE).is_file()
    failed: Any = load_failures(folder) if exists else []
    failures = dict(zip(failed.key, failed.error, strict=True)) if len(failed) else {}
    pending, skipped = select_pending(planned, tested, folder, {} if retry_failed else failures)
    if not pending:
        return DryRun(summary, None, len(skipped))
    by_key = {run.key: run for run in planned}
    recorded = load_batches(folder) if exists else []
    batches, config = plan_execution(by_key, pending, recorded, jobs, device, memory_budget)
    runs = {key: by_key[key] if batch.trains else pending[key] for batch in batches for key in batch.keys}
    startup += time.monotonic() - start
    found = _forecast(loaded, runs, batches, config, folder if exists else None, startup)
    return DryRun(summary, found, len(skipped))


def _forecast(
    loaded: LoadedGrid,
    runs: Mapping[str, RunSpec[Any]],
    batches: Sequence[Batch],
    config: ExecutorConfig,
    folder: Path | None,
    startup: float,
) -> Forecast:
    import torch
    from threadpoolctl import threadpool_limits

    start, threads = time.monotonic(), torch.get_num_threads()
    plans = {batch.name: _training_plan(batch, runs) for batch in batches if batch.trains}
    recorded = _recorded_seconds(folder) if folder else {}
    groups: dict[tuple[str, str], list[Batch]] = {}
    for batch in batches:
        groups.setdefault((batch.backbone, batch.method), []).append(batch)
    missing = missing_crops(loaded)
    seconds: dict[str, float | None] = {}
    torch.set_num_threads(config.threads)
    try:
        with threadpool_limits(config.threads):
            for group in groups.values():
                seconds |= _batch_seconds(group, runs, plans, recorded)
    finally:
        torch.set_num_threads(threads)
    wall = startup * (2 if config.size > 1 else 1)  # workers load what this process has loaded
    for (backbone, dataset), crops in missing.items():
        model, images = loaded.backbone(backbone), loaded.features[backbone, dataset].dataset
        wall += crops * _seconds_per_crop(model, images, loaded.grid.recipe)
    known = [took for took in seconds.values() if took is not None]
    wall += max(max(known, default=0.0), sum(known) / config.size)
    parts = []
    for names, group in groups.items():
        sizes = [len(batch.keys) for batch in group]
        took = [seconds[batch.name] for batch in group]
        total = None if None in took else sum(one or 0.0 for one in took)
        parts.append(Part(*names, len(group), sum(sizes), max(sizes), total))
    costs = [cost for plan in plans.values() for cost in plan.runs]
    training_bytes = max((plan.bytes_of(next(plan.stages()).runs) for plan in plans.values()), default=0)
    worker_bytes = psutil.Process().memory_info().rss + training_bytes
    return Forecast(
        parts=tuple(parts),
        nodes=float(sum(cost.tree.nodes * cost.shape.steps for cost in costs)),
        flops=sum(cost.flops for cost in costs),
        crops=sum(missing.values()),
        workers=config.size,
        threads=config.threads,
        seconds=wall if len(known) == len(batches) else None,
        memory=float(worker_bytes * (config.size + (config.size > 1))),
        measured=time.monotonic() - start,
    )


def _training_plan(batch: Batch, runs: Mapping[str, RunSpec[Any]]) -> TrainingPlan:
    from fastcoop.engine import plan_training

    shapes = [shape for key in batch.keys if (shape := shape_of(runs[key]))]
    return plan_training(runs[batch.keys[0]].model, shapes, memory_budget=batch.budget)


def _recorded_seconds(folder: Path) -> dict[Any, float]:
    """Return the median seconds of the runs in the results folder, by what they do."""
    groups = load_runs(folder).groupby(["backbone_digest", "method", "label", "dataset", "shots", "device"])
    return {facts: float(seconds) for facts, seconds in groups.seconds.median().items() if seconds > 0}


def _batch_seconds(
    batches: Sequence[Batch],
    runs: Mapping[str, RunSpec[Any]],
    plans: Mapping[str, TrainingPlan],
    recorded: Mapping[Any, float],
) -> dict[str, float | None]:
    """Return the expected seconds of the batches of one method and backbone, by batch name."""
    mine = [runs[key] for batch in batches for key in batch.keys]
    model, method = mine[0].model, METHODS[mine[0].method]
    known = {
        run.key: recorded.get(
            (model.digest, method.name, method.label(run.settings), run.dataset, run.shots, str(model.device))
        )
        for run in mine
    }
    if all(known.values()):
        return {batch.name: sum(known[key] or 0.0 for key in batch.keys) for batch in batches}
    cached = all(data.store is not None for run in mine for data in (run.data, *run.targets))
    if batches[0].trains:
        largest = max((plans[batch.name] for batch in batches), key=lambda plan: plan.flops)
        setup, per_flop = _time_step(largest, model)
        per_test = _time_test(mine[0]) if cached else 0.0
        return {b.name: setup + plans[b.name].flops * per_flop + per_test * len(b.keys) for b in batches}
    if not cached:
        return dict.fromkeys((batch.name for batch in batches), None)
    seconds_of = _time_runs(mine)
    return {batch.name: sum(seconds_of(_size(runs[key])) for key in batch.keys) for batch in batches}


def _time_step(plan: TrainingPlan, backbone: Backbone) -> tuple[float, float]:
    """Time steps of some runs of a plan on random features; return the seconds before the first step, and seconds per
    floating-point operation."""
    import torch

    from fastcoop.engine import Run, train
    from fastcoop.prompts import initial_contexts

    chosen: list[Run] = []
    flops = 0.0
    for cost in (plan.runs[index] for index in next(plan.stages()).runs):
        if not chosen or flops + cost.tree.flops <= MAX_STEP_FLOPS:
            names, layout, size = cost.shape.class_names, cost.shape.layout, cost.shape.batch_size
            contexts = initial_contexts(backbone, layout, len(names), 0)
            features, labels = torch.ones(size, 1, backbone.embed_dim), torch.zeros(size, dtype=torch.long)
            chosen.append(Run(names, layout, contexts, features, labels, epochs=4, seed=0, batch_size=size))
            flops += cost.tree.flops
    ends: list[float] = []
    train(backbone, [replace(chosen[0], epochs=1)])  # what each process does once
    start = time.perf_counter()
    train(backbone, chosen, on_step=lambda get_state: ends.append(time.perf_counter()))
    step = median(end - begin for begin, end in pairwise(ends))
    return max(0.0, ends[0] - start - step), step / flops


def _time_test(run: RunSpec[Any]) -> float:
    """Return the seconds of testing a trained run."""
    from fastcoop.prompts import initial_contexts

    layout = METHODS[run.method].layout(run.settings, run.model)
    assert layout is not None
    contexts = initial_contexts(run.model, layout, len(run.data.class_names), run.seed)
    return _time(replace(run, contexts=contexts.detach().float().cpu().numpy()).with_targets(run.tests))


def _time(run: RunSpec[Any]) -> float:
    """Return the seconds of a run outside the engine, once its method is imported and its features are read."""
    method, context = METHODS[run.method], RunContext()
    method.run(run.model, [], lambda index, outcome: None, context)
    read = [data.test for data in run.tests], run.subset and run.data.train(run.subset)
    start = time.perf_counter()
    method.run(run.model, [run], lambda index, outcome: None, context)
    del read
    return time.perf_counter() - start


def _time_runs(runs: Sequence[RunSpec[Any]]) -> Callable[[float], float]:
    """Time the smallest run and, unless that takes long, one of median size; return seconds by size, a line."""
    ordered = sorted(runs, key=_size)
    small, middle = ordered[0], ordered[len(ordered) // 2]
    if isinstance(small.settings, ScheduleSettings) and not small.has_learned:
        settings = [small.settings.model_copy(update={"epochs": epochs}) for epochs in (1, 3)]
        small, middle = (replace(small, settings=short) for short in settings)
    first, first_size, slope = _time(small), _size(small), 0.0
    if _size(middle) > first_size:
        if first * _size(middle) / first_size > MAX_RUN_SECONDS:
            return lambda size: first * size / first_size
        slope = max(0.0, (_time(middle) - first) / (_size(middle) - first_size))
    return lambda size: first + slope * (size - first_size)


def _size(run: RunSpec[Any]) -> float:
    """Return what the time of a run outside the engine grows with: steps, or images and classes."""
    if run.has_learned or run.subset is None:
        return 1.0
    images = len(run.subset.train)
    if isinstance(run.settings, ScheduleSettings):
        return float(epochs_of(run) * steps_per_epoch(run))
    return float(images * len(run.data.class_names))


def _seconds_per_crop(backbone: Backbone, dataset: Dataset, recipe: str) -> float:
    """Return the seconds of encoding an image, from a few test images; reading goes on beside it."""
    from fastcoop.features.encode import Chunk, Encoding, decode, encode

    rows = tuple(range(min(TIMED_CROPS, len(dataset.splits["test"]))))
    chunk = Chunk("test", rows, range(1))
    encoding = Encoding(backbone, dataset, recipe, dtype="float32", batch_size=TIMED_CROPS)
    images = [decode(encoding, chunk, row) for row in rows]
    start = time.perf_counter()
    encode(encoding, chunk, images)
    return (time.perf_counter() - start) / len(rows)
