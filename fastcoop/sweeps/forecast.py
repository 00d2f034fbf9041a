"""``--dry-run``: the expected time and memory of a sweep.

Counts, operations and bytes come from the engine's plan. Times come from earlier runs in the results folder. Where it
has none of a method, a few training steps per backbone, and two short runs of a method outside the engine, are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import psutil

from fastcoop.grids.planning import LoadedGrid
from fastcoop.methods import METHODS, RunContext, RunSpec
from fastcoop.methods.schedule import ScheduleSettings, epochs_of, steps_per_epoch
from fastcoop.progress import counted, duration
from fastcoop.results.database import DATABASE
from fastcoop.results.read import load_runs
from fastcoop.results.records import Batch
from fastcoop.sweeps.batches import shape_of
from fastcoop.sweeps.caching import missing_crops

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.engine import TrainingPlan
    from fastcoop.sweeps.grid_sweep import SweepPlan

MAX_STEP_FLOPS = 1e10  # of a timed training step: about a third of a second of a core
MAX_RUN_SECONDS = 1.0  # of the second timed run of a method outside the engine
TIMED_CROPS = 8
MAX_STARTUP_SECONDS = 10.0  # of importing the libraries, however much else this process has done


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
        memory_bytes: Expected memory of all processes.
    """

    parts: tuple[Part, ...]
    nodes: float
    flops: float
    crops: int
    workers: int
    threads: int
    seconds: float | None
    memory_bytes: int

    def lines(self) -> Iterator[str]:
        """Yield the forecast as lines of text."""
        if self.crops:
            yield f"features of {self.crops:,} images and views are missing and are cached first"
        for part in self.parts:
            took = "time unknown" if part.seconds is None else f"{duration(part.seconds)} for one worker"
            batches = f"{counted(part.batches, 'batch')} of up to {part.largest}"
            yield f"{part.backbone}  {part.method}: {counted(part.runs, 'run')} in {batches}, {took}"
        if self.nodes:
            yield f"training computes {self.nodes:.3g} nodes, {self.flops:.3g} floating-point operations"
        took = "unknown time" if self.seconds is None else duration(self.seconds)
        workers = f"{counted(self.workers, 'process')} (threads of each: {self.threads})"
        yield f"expected: {took} and {self.memory_bytes / 1e9:.1f} GB, by {workers}"
        if self.seconds is None:
            yield "times of methods outside the engine are known once the features are cached"


def forecast(loaded: LoadedGrid, plan: SweepPlan, folder: Path) -> Forecast:
    """Return the expected time and memory of the runs that a sweep still has to do.

    Args:
        loaded: The grid with its backbones, datasets and opened feature stores.
        plan: The runs and their batches.
        folder: The results folder; times of runs recorded there are used where they fit.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from fastcoop.engine import plan_training

    startup = min(time.process_time(), MAX_STARTUP_SECONDS)
    runs = {key: (plan.runs if b.trains else plan.pending)[key] for b in plan.batches for key in b.keys}
    groups: dict[tuple[str, str], list[Batch]] = {}
    trainings: dict[str, TrainingPlan] = {}
    for batch in plan.batches:
        groups.setdefault((batch.backbone, batch.method), []).append(batch)
        if batch.trains:
            shapes = [shape for key in batch.keys if (shape := shape_of(runs[key]))]
            model = runs[batch.keys[0]].model
            trainings[batch.name] = plan_training(model, shapes, memory_budget=batch.budget)
    recorded, missing = _recorded_seconds(folder), missing_crops(loaded)
    parts, seconds = [], []
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(plan.team.threads)
        stack.enter_context(threadpool_limits(plan.team.threads))
        for names, group in groups.items():
            took = _batch_seconds(group, runs, trainings, recorded)
            sizes = [len(batch.keys) for batch in group]
            parts.append(Part(*names, len(group), sum(sizes), max(sizes), sum(took) if took else None))
            seconds += took or []
    wall = startup * (2 if plan.team.size > 1 else 1)  # workers load what this process has loaded
    wall += _crop_seconds(loaded, missing)
    wall += max(max(seconds, default=0.0), sum(seconds) / plan.team.size)
    costs = [cost for training in trainings.values() for cost in training.runs]
    largest = max((one.bytes_of(next(one.stages()).runs) for one in trainings.values()), default=0)
    processes = plan.team.size + (plan.team.size > 1)
    return Forecast(
        parts=tuple(parts),
        nodes=float(sum(cost.tree.nodes * cost.shape.steps for cost in costs)),
        flops=float(sum(cost.flops for cost in costs)),
        crops=sum(missing.values()),
        workers=plan.team.size,
        threads=plan.team.threads,
        seconds=wall if len(seconds) == len(plan.batches) else None,
        memory_bytes=processes * (psutil.Process().memory_info().rss + largest),
    )


def _recorded_seconds(folder: Path) -> dict[Any, float]:
    """Return the median seconds of the runs in a results folder, by what they do."""
    if not (folder / DATABASE).is_file():
        return {}
    groups = load_runs(folder).groupby(["backbone_digest", "method", "label", "dataset", "shots", "device"])
    return {facts: float(seconds) for facts, seconds in groups.seconds.median().items() if seconds > 0}


def _batch_seconds(
    batches: Sequence[Batch],
    runs: Mapping[str, RunSpec[Any]],
    trainings: Mapping[str, TrainingPlan],
    recorded: Mapping[Any, float],
) -> list[float] | None:
    """Return the expected seconds of the batches of one method and backbone; None if they are unknown."""
    mine = [[runs[key] for key in batch.keys] for batch in batches]
    every = [run for group in mine for run in group]
    model, method = every[0].model, METHODS[every[0].method]

    def known(run: RunSpec[Any]) -> float | None:
        facts = method.name, method.label(run.settings), run.dataset, run.shots, str(model.device)
        return recorded.get((model.digest, *facts))

    if all(known(run) for run in every):
        return [sum(known(run) or 0.0 for run in group) for group in mine]
    if batches[0].trains:
        plans = [trainings[batch.name] for batch in batches]
        setup, per_step, per_flop = _time_steps(max(plans, key=lambda plan: plan.flops), model)
        steps = [sum(stage.steps for stage in plan.stages()) for plan in plans]
        return [setup + n * per_step + plan.flops * per_flop for n, plan in zip(steps, plans, strict=True)]
    if any(data.store is None for run in every for data in (run.data, *run.targets)):
        return None
    seconds_of = _time_runs(every)
    return [sum(seconds_of(_size(run)) for run in group) for group in mine]


def _time_steps(plan: TrainingPlan, backbone: Backbone) -> tuple[float, float, float]:
    """Return the seconds before the first step of a training, of any step, and per floating-point operation.

    Two trainings are timed, on features of ones: a run of one class, and the plan's first runs, as many and with as
    many classes as ``MAX_STEP_FLOPS`` allows.
    """
    import torch

    from fastcoop.engine import FastSchedule, Run, plan_training, train
    from fastcoop.prompts import initial_contexts

    on_cpu, clock = backbone.device.type == "cpu", _clock(backbone)
    epochs = 5 if on_cpu else 25  # of one step each; on a GPU, later steps are recorded and replayed

    def timed(max_flops: float) -> tuple[float, float, float]:
        runs: list[Run] = []
        left = max_flops
        for cost in (plan.runs[index] for index in next(plan.stages()).runs):
            if runs and cost.step_flops > left:
                break
            names, layout, size = cost.shape.class_names, cost.shape.layout, cost.shape.batch_size
            names = names[: max(1, int(len(names) * min(1.0, left / cost.step_flops)))]
            schedule = FastSchedule() if cost.shape.is_fast else None
            contexts = initial_contexts(backbone, layout, len(names), 0)
            features, labels = torch.ones(size, 1, backbone.embed_dim), torch.zeros(size, dtype=torch.long)
            runs.append(Run(names, layout, contexts, features, labels, epochs, 0, size, schedule=schedule))
            left -= cost.step_flops
        flops = sum(cost.step_flops for cost in plan_training(backbone, [run.shape for run in runs]).runs)
        ends = [clock()]
        train(backbone, runs, on_step=lambda get_state: ends.append(clock()))
        first, *steps = (end - start for start, end in pairwise(ends))
        return first, median(steps), flops

    _, small, small_flops = timed(0.0)
    first, large, flops = timed(MAX_STEP_FLOPS if on_cpu else 1000 * MAX_STEP_FLOPS)
    per_flop = max(0.0, large - small) / max(flops - small_flops, 1.0)
    return max(0.0, first - large), max(0.0, small - per_flop * small_flops), per_flop


def _clock(backbone: Backbone) -> Callable[[], float]:
    """Return a clock: of this thread's work on a CPU, whatever else the machine does, or else of wall time."""
    return time.thread_time if backbone.device.type == "cpu" else time.perf_counter


def _time_runs(runs: Sequence[RunSpec[Any]]) -> Callable[[float], float]:
    """Time the smallest run, and a larger one of about ``MAX_RUN_SECONDS`` or mean size; return seconds by size."""
    sizes = sorted(runs, key=_size)
    if isinstance(sizes[0].settings, ScheduleSettings) and not sizes[0].has_learned:
        short = [sizes[0].settings.model_copy(update={"epochs": epochs}) for epochs in (1, 2, 4, 8, 16)]
        sizes = [replace(sizes[0], settings=settings) for settings in short]
    average = mean(map(_size, sizes))
    small, size, seconds = sizes[0], _size(sizes[0]), _time(sizes[0])
    limit = min(average, size * MAX_RUN_SECONDS / seconds)
    large = max((run for run in sizes if _size(run) <= limit), key=_size, default=small)
    if _size(large) == size:
        return lambda other: seconds * other / size
    slope = max(0.0, _time(large) - seconds) / (_size(large) - size)
    return lambda other: seconds + slope * (other - size)


def _time(run: RunSpec[Any]) -> float:
    """Return the seconds of a run outside the engine, once its method is imported and its features are read."""
    method, context, clock = METHODS[run.method], RunContext(), _clock(run.model)
    method.run(run.model, [], lambda index, outcome: None, context)
    read = [data.test for data in run.tests], run.subset and run.data.train(run.subset)
    start = clock()
    method.run(run.model, [run], lambda index, outcome: None, context)
    del read
    return clock() - start


def _size(run: RunSpec[Any]) -> float:
    """Return what the time of a run outside the engine grows with: steps, or images and classes."""
    if run.has_learned or run.subset is None:
        return 1.0
    if isinstance(run.settings, ScheduleSettings):
        return float(epochs_of(run) * steps_per_epoch(run))
    return float(len(run.subset.train) * len(run.data.class_names))


def _crop_seconds(loaded: LoadedGrid, missing: Mapping[tuple[str, str], int]) -> float:
    """Return the seconds of encoding the missing crops, by the time of a few test images per backbone."""
    from fastcoop.features.encode import Chunk, Encoding, decode, start_encoding

    total = 0.0
    for backbone, names in {names[0]: names for names in missing}.items():
        model, images = loaded.backbone(backbone), loaded.data(*names).dataset
        rows = tuple(range(min(TIMED_CROPS, len(images.splits["test"]))))
        chunk = Chunk("test", rows, range(1))
        encoding = Encoding(model, images, loaded.grid.recipe, dtype="float32", batch_size=TIMED_CROPS)
        crops = [decode(encoding, chunk, row) for row in rows]  # others are read meanwhile
        start = time.perf_counter()
        start_encoding(encoding, chunk, crops)()
        crops_missing = sum(number for (name, _), number in missing.items() if name == backbone)
        total += crops_missing * (time.perf_counter() - start) / len(rows)
    return total
