"""What a sweep will take, before it is begun: its batches, nodes and operations, its time and memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from fastcoop.grids.plan import LoadedGrid
from fastcoop.methods import METHODS, Data, RunSpec
from fastcoop.methods.base import Training
from fastcoop.methods.data import KEPT_BYTES
from fastcoop.methods.schedule import ScheduleSettings
from fastcoop.progress import duration
from fastcoop.results.records import Batch
from fastcoop.sweeps import measure
from fastcoop.sweeps.batches import training_of
from fastcoop.sweeps.schedule import form_batches
from fastcoop.sweeps.shapes import Shapes, course
from fastcoop.sweeps.workers import ExecutorConfig, budget_of, choose_team, max_workers

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone

TREES = 5  # of a backbone, the ones with the most work, whose steps are timed
JOBS = 3  # of a method, of different sizes, that are timed
PATIENCE = 8.0  # seconds that the jobs of a method may take of the measurement


@dataclass(frozen=True)
class Part:
    """Batches of one method over one backbone.

    Attributes:
        batches, runs: how many.
        largest: runs of the largest batch.
        seconds: of one worker, for all of them; None where nothing was measured.
    """

    backbone: str
    method: str
    batches: int
    runs: int
    largest: int
    seconds: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What is left of a sweep.

    Attributes:
        parts: its batches, by backbone and method.
        nodes: distinct token prefixes that training computes, each once per step and run.
        flops: floating-point operations of those, forward and backward.
        crops: images and views that are encoded first.
        workers, threads: processes, and threads of each.
        seconds: wall time of the whole command; None where nothing was measured.
        memory: bytes of all processes at their largest.
        measured: seconds that the measurement took.
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

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """The same for people."""
        if self.crops:
            yield f"features of {self.crops:,} images and views are missing and cached first"
        for part in self.parts:
            many = "batch" if part.batches == 1 else "batches"
            took = "" if part.seconds is None else f", {duration(part.seconds)} of a worker"
            yield (
                f"{part.backbone}  {part.method}: {part.runs:,} runs in {part.batches:,} {many} of up to "
                f"{part.largest}{took}"
            )
        if self.nodes:
            yield f"training computes {self.nodes:.3g} nodes, {self.flops:.3g} floating-point operations"
        if self.seconds is not None:
            many = "process" if self.workers == 1 else "processes"
            threads = "a thread" if self.threads == 1 else f"{self.threads} threads"
            yield (
                f"expected: {duration(self.seconds)} and {self.memory / 1e9:.1f} GB, by {self.workers} {many} of "
                f"{threads} (measured for {duration(self.measured)} on this machine, otherwise idle)"
            )


def forecast(
    world: LoadedGrid,
    planned: Mapping[str, RunSpec],
    pending: Mapping[str, RunSpec],
    recorded: Sequence[Batch] = (),
    *,
    device: str = "cpu",
    jobs: int = -1,
    memory_budget: float | None = None,
    missing: Mapping[tuple[str, str], int] | None = None,
    startup: float = 0.0,
) -> Forecast:
    """Plan the batches of ``pending`` as a sweep does, and time the beginnings of some.

    Args:
        planned: all of the grid's runs by key; ``pending`` those to be done.
        recorded: batches of an earlier sweep into the same folder.
        device, jobs, memory_budget: as ``sweep`` takes them.
        missing: crops to be encoded first, by names of backbone and dataset.
        startup: seconds that it took to come here, which a sweep and each of its workers take too.
    """
    began = time.perf_counter()
    resident = psutil.Process().memory_info().rss
    budget = budget_of(device, memory_budget, max_workers(jobs, device))
    batches = form_batches(planned, pending, recorded, threads=1, budget=budget)
    team = choose_team(jobs, device, batches)
    names = {batch.name for batch in recorded}
    batches = [b if b.name in names else replace(b, threads=team.threads) for b in batches]
    seconds: dict[str, float] = {}
    nodes = flops = 0.0
    worker = float(resident)
    missing = missing or {}
    encoding = 0.0
    for backbone in world.backbones:
        mine = [batch for batch in batches if batch.backbone == backbone.name]
        data = {
            dataset.name: measure.with_features(
                world.data(backbone.name, dataset.name),
                backbone.embed_dim,
                missing.get((backbone.name, dataset.name), 0),
            )
            for dataset in world.datasets.values()
        }
        for dataset in world.datasets.values():
            if crops := missing.get((backbone.name, dataset.name)):
                encoding += crops * measure.time_encoding(backbone, dataset, world.grid.recipe)
        ledger = _Ledger(backbone, planned, pending, data)
        with measure.as_one_of(team.size, team.threads):
            seconds |= ledger.plain([batch for batch in mine if not batch.trains])
            seconds |= ledger.training([batch for batch in mine if batch.trains])
        nodes, flops = nodes + ledger.nodes, flops + ledger.flops
        worker = max(worker, ledger.resident + _features(mine, planned))
    measured = time.perf_counter() - began
    wall = startup + encoding + _makespan([seconds[batch.name] for batch in batches], team)
    if team.size > 1:
        wall += startup  # a worker loads what this process has loaded
    memory = worker if team.size == 1 else resident + team.size * worker
    parts = _parts(batches, seconds)
    return Forecast(
        parts, nodes, flops, sum(missing.values()), team.size, team.threads, wall, memory, measured
    )


class _Ledger:
    """Times the work over one backbone, and adds it up."""

    def __init__(
        self,
        backbone: Backbone,
        planned: Mapping[str, RunSpec],
        pending: Mapping[str, RunSpec],
        data: Mapping[str, Data],
    ):
        self.backbone, self.planned, self.pending, self.data = backbone, planned, pending, data
        self.nodes = self.flops = 0.0
        self.resident = psutil.Process().memory_info().rss
        self._shapes = Shapes(backbone)

    def ready(self, run: RunSpec) -> RunSpec:
        """Return the run on features that are there."""
        targets = tuple(self.data[name] for name in run.target_names)
        return replace(run, inputs=run.loaded._replace(data=self.data[run.dataset], targets=targets))

    def plain(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Seconds of batches that do not train in the engine, by name."""
        seconds = {}
        for method in dict.fromkeys(batch.method for batch in batches):
            mine = [batch for batch in batches if batch.method == method]
            sizes = {key: _size(method, self.pending[key]) for batch in mine for key in batch.keys}
            took = self._curve(method, sizes)
            for batch in mine:
                seconds[batch.name] = sum(took(sizes[key]) for key in batch.keys)
            self.resident = max(self.resident, psutil.Process().memory_info().rss)
        return seconds

    def _curve(self, method: str, sizes: Mapping[str, float]) -> _Curve:
        """Seconds of a run of a method by its size, from a few jobs, the smallest first."""
        ordered = sorted(sizes, key=lambda key: sizes[key])
        places = sorted({round(n * (len(ordered) - 1) / (JOBS - 1)) for n in range(JOBS)})
        points: list[tuple[float, float]] = []
        last = spent = 0.0
        for place in places:
            key = ordered[place]
            if points and (
                sizes[key] == points[-1][0] or spent + last * sizes[key] / points[-1][0] > PATIENCE
            ):
                continue
            start = time.perf_counter()
            points.append(self._timed(method, self.ready(self.pending[key]), sizes[key]))
            last = time.perf_counter() - start
            spent += last
        return _Curve(points)

    def _timed(self, method: str, run: RunSpec, size: float) -> tuple[float, float]:
        if not isinstance(run.settings, ScheduleSettings) or run.has_learned:
            return size, measure.time_run(method, run, self.backbone)
        # Two short schedules tell what a step takes, and what all the rest does.
        per_epoch = size / _epochs(run)
        took = [
            measure.time_run(
                method,
                replace(run, settings=run.settings.model_copy(update={"epochs": epochs})),
                self.backbone,
            )
            for epochs in (1, 1, 3)
        ]
        step = max(0.0, (took[2] - took[1]) / (2 * per_epoch))
        return size, max(took[1] - step * per_epoch, 0.0) + step * size

    def training(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Seconds of batches that train in the engine, by name."""
        if not batches:
            return {}
        wanted = {key: training_of(self.planned[key]) for batch in batches for key in batch.keys}
        asked = {key: one for key, one in wanted.items() if one is not None}
        work: dict[Any, float] = {}
        for _key, one in asked.items():
            shape = self._shapes.of(one)
            self.nodes += shape.nodes * one.steps
            self.flops += shape.flops * one.steps
            work[shape.key] = work.get(shape.key, 0.0) + shape.flops * one.steps
        speeds, setup, ending = self._speeds(batches, asked, work)
        seconds = {}
        for batch in batches:
            steps = [(self._shapes.of(asked[key]), asked[key].steps) for key in batch.keys]
            trained = sum(n * speeds(rows) for n, rows in course(steps, batch.budget or 0, self._shapes.room))
            seconds[batch.name] = setup + trained + ending * len(batch.keys)
        return seconds

    def _speeds(
        self, batches: Sequence[Batch], asked: Mapping[str, Training], work: Mapping[Any, float]
    ) -> tuple[Any, float, float]:
        """(seconds of a step by the shapes in it, seconds before a batch's first step, and after a run's last)."""
        import torch

        from fastcoop.methods.coop import engine_run

        known: dict[Any, tuple[float, float]] = {}  # seconds per step, and per row of it
        setups, endings, grown = [], [], 0
        for tree in sorted(work, key=lambda tree: -work[tree])[:TREES]:
            batch = next(b for b in batches if any(self._shapes.of(asked[k]).key == tree for k in b.keys))
            keys = [key for key in batch.keys if self._shapes.of(asked[key]).key == tree]
            shape = self._shapes.of(asked[keys[0]])
            costs = [float(shape.rows * asked[key].steps) for key in keys]
            runs = [self.ready(self.planned[key]) for key in keys]
            found = measure.time_training(batch.method, runs, costs, self.backbone, batch.budget or 0)
            rows, step = found.step
            fixed, slope = 0.0, step / rows
            if rows > shape.rows:
                alone = measure.time_training(
                    batch.method, runs[:1], costs[:1], self.backbone, batch.budget or 0, enough=0.2
                )
                one_row, one_step = alone.step
                slope = max((step - one_step) / (rows - one_row), 0.0)
                fixed = max(step - slope * rows, 0.0)
            known[tree] = fixed, slope
            setups.append(found.setup)
            grown = max(grown, found.resident)
            run = runs[0]
            contexts = engine_run(run, self.backbone).contexts.detach().to(torch.float32).numpy()
            endings.append(measure.time_ending(batch.method, run, contexts, self.backbone))
        self.resident = max(self.resident, grown)

        def of_step(rows: Mapping[Any, int]) -> float:
            """Seconds of a step of ``rows`` by shape."""
            fixed = max(known[self._nearest(shape, known)][0] for shape in rows)
            return fixed + sum(n * known[self._nearest(shape, known)][1] for shape, n in rows.items())

        return of_step, float(np.mean(setups)), float(np.mean(endings))

    def _nearest(self, shape: Any, known: Mapping[Any, Any]) -> Any:
        """The timed tree that is most like one."""
        if shape.key in known:
            return shape.key
        return min(known, key=lambda tree: abs(math.log(self._shapes.known[tree].per_row / shape.per_row)))


class _Curve:
    """Seconds by size, between and beyond points by straight lines of their logarithms."""

    def __init__(self, points: Sequence[tuple[float, float]]):
        self.points = [(math.log(max(size, 1e-9)), math.log(max(took, 1e-6))) for size, took in points]

    def __call__(self, size: float) -> float:
        at = math.log(max(size, 1e-9))
        if len(self.points) == 1:
            (one,) = self.points
            return math.exp(one[1] + at - one[0])
        after = next((n for n, point in enumerate(self.points) if point[0] >= at and n), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[after - 1], self.points[after]
        return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))


def _size(method: str, run: RunSpec) -> float:
    """What a run's time grows with."""
    classes = len(run.data.class_names)
    if not METHODS[method].learns or run.has_learned:
        return float(classes)
    assert run.subset is not None
    if isinstance(run.settings, ScheduleSettings):
        return float(_epochs(run) * max(1, len(run.subset.train) // run.settings.batch_size))
    return float(len(run.subset.train) * classes)


def _epochs(run: RunSpec) -> int:
    from fastcoop.methods.schedule import epochs_of

    return epochs_of(run)


def _makespan(seconds: Sequence[float], team: ExecutorConfig) -> float:
    """Seconds until all is done, each worker taking the next batch when it is free."""
    free = [0.0] * team.size
    for took in seconds:
        worker = free.index(min(free))
        free[worker] += took
    return max(free)


def _features(batches: Sequence[Batch], runs: Mapping[str, RunSpec]) -> float:
    """Bytes of features that a worker may come to hold: its datasets' test images, and training images up to what is
    kept of them."""
    test: dict[str, float] = {}
    train: dict[Any, float] = {}
    for batch in batches:
        for key in batch.keys:
            run = runs[key]
            dim = run.model.embed_dim
            for data in (run.data, *run.targets):
                test[data.name] = 2 * 4 * dim * len(data.dataset.splits["test"])
            if run.subset is not None:
                size = 4 * dim * len(run.subset.train) * (1 + run.data.views)
                train[run.dataset, run.shots, run.seed] = size
    return sum(test.values()) + min(sum(train.values()), KEPT_BYTES)


def _parts(batches: Sequence[Batch], seconds: Mapping[str, float]) -> tuple[Part, ...]:
    groups: dict[tuple[str, str], list[Batch]] = {}
    for batch in batches:
        groups.setdefault((batch.backbone, batch.method), []).append(batch)
    return tuple(
        Part(
            backbone,
            method,
            len(group),
            sum(len(batch.keys) for batch in group),
            max(len(batch.keys) for batch in group),
            sum(seconds[batch.name] for batch in group),
        )
        for (backbone, method), group in groups.items()
    )
