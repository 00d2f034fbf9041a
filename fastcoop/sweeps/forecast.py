"""``--dry-run``: the expected time and memory of a sweep.

Counts, operations and bytes come from the engine's plan. The time of a method's runs with a backbone comes from
the grid's runs in the results folder, or else a few training steps, or two runs outside the engine, are timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from fastcoop.errors import UserError
from fastcoop.grids.planning import LoadedGrid
from fastcoop.methods import METHODS, RunContext, RunSpec
from fastcoop.methods.schedule import ScheduleSettings, steps_of
from fastcoop.progress import counted, duration
from fastcoop.results.database import DATABASE
from fastcoop.results.read import load_runs
from fastcoop.sweeps.batches import shape_of
from fastcoop.sweeps.caching import missing_crops

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.engine import TrainingPlan
    from fastcoop.engine.fit import RunCost
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
class Prompts:
    """How a backbone learns prompts: its path, why it is not "shared", the positions that a run's step computes on it
    and on the other path (means of all runs), and whether its tokenizer drops the full stop."""

    backbone: str
    path: str
    reason: str
    positions: float
    other_positions: float
    drops_full_stop: bool

    def line(self) -> str:
        """Return this as a line of text."""
        why = f" ({self.reason})" if self.reason else ""
        other = "plain" if self.path == "shared" else "shared"
        stop = "; its tokenizer drops their full stop" if self.drops_full_stop else ""
        return (
            f"{self.backbone}  prompts on the {self.path} path{why}: {self.positions:,.0f} positions per run and step, "
            f"{self.other_positions:,.0f} on the {other} path{stop}"
        )


@dataclass(frozen=True)
class Forecast:
    """What is left of a sweep.

    Attributes:
        parts: Its batches, by backbone and method.
        prompts: How each backbone learns prompts, where it does.
        nodes: Distinct token prefixes that training computes, counted once per step and run.
        flops: Floating-point operations of training, forward and backward.
        crops: Images and views that are encoded first.
        workers, threads: Processes, and threads of each.
        seconds: Expected wall time of the command; None if the time of a part is unknown.
        memory_bytes: Expected memory of all processes.
    """

    parts: tuple[Part, ...]
    prompts: tuple[Prompts, ...]
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
        yield from (one.line() for one in self.prompts)
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
        folder: The results folder; its runs give the times of others of their method and backbone.
    """
    import torch
    from threadpoolctl import threadpool_limits

    startup, missing, wall = min(time.process_time(), MAX_STARTUP_SECONDS), missing_crops(loaded), 0.0
    took: dict[Any, float] = {}
    if (folder / DATABASE).is_file():
        took = load_runs(folder).set_index(["key", "device"]).seconds.to_dict()
    parts: list[Part] = []
    seconds: list[float] = []
    trainings: list[TrainingPlan] = []
    costs_of: dict[str, list[RunCost]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.team.threads)
    with threadpool_limits(plan.team.threads):
        for names in dict.fromkeys((batch.backbone, batch.method) for batch in plan.batches):
            batches = [batch for batch in plan.batches if (batch.backbone, batch.method) == names]
            known = plan.runs if batches[0].trains else plan.pending
            groups = [[known[key] for key in batch.keys] for batch in batches]
            plans = [
                _plan(group, batch.budget)
                for group, batch in zip(groups, batches, strict=True)
                if batch.trains
            ]
            device = str(groups[0][0].model.device)
            done = [
                run
                for run in plan.runs.values()
                if (run.backbone, run.method) == names and took.get((run.key, device), 0.0) > 0
            ]
            # A batch has a size and some smaller costs: stages and steps of training, or runs.
            works = [np.array(_work(one)) for one in plans]
            works = works or [np.array([len(group), sum(map(_size, group))]) for group in groups]
            every = [run for group in groups for run in group]
            if done and not groups[0][0].has_learned:
                size = _plan(done, None).flops if plans else sum(map(_size, done))
                works = [work[-1:] for work in works]
                rates: Sequence[float] | None = [sum(took[run.key, device] for run in done) / size]
            elif plans:
                rates = _time_steps(max(plans, key=lambda one: one.flops), every[0].model)
            else:
                rates = _time_runs(every)
            found = None if rates is None else [float(work @ np.array(rates)) for work in works]
            counts = [len(group) for group in groups]
            parts.append(Part(*names, len(groups), sum(counts), max(counts), sum(found) if found else None))
            seconds += found or []
            trainings += plans
            costs_of.setdefault(names[0], []).extend(cost for one in plans for cost in one.runs)
        for backbone in {name for name, _ in missing}:
            wall += _crop_seconds(loaded, {names: n for names, n in missing.items() if names[0] == backbone})
    torch.set_num_threads(threads)
    wall += startup * (2 if plan.team.size > 1 else 1)  # workers load what this process has loaded
    wall += max(max(seconds, default=0.0), sum(seconds) / plan.team.size)
    costs = [cost for of_backbone in costs_of.values() for cost in of_backbone]
    largest = max((one.bytes_of(next(one.stages()).runs) for one in trainings), default=0)
    processes = plan.team.size + (plan.team.size > 1)
    return Forecast(
        parts=tuple(parts),
        prompts=tuple(
            _prompts(loaded.backbone(name), of_backbone)
            for name, of_backbone in costs_of.items()
            if of_backbone
        ),
        nodes=float(sum(cost.tree.nodes * cost.shape.steps for cost in costs)),
        flops=float(sum(cost.flops for cost in costs)),
        crops=sum(missing.values()),
        workers=plan.team.size,
        threads=plan.team.threads,
        seconds=wall if len(seconds) == len(plan.batches) else None,
        memory_bytes=processes * (psutil.Process().memory_info().rss + largest),
    )


def _plan(runs: Sequence[RunSpec[Any]], budget: int | None) -> TrainingPlan:
    from fastcoop.engine import plan_training

    shapes = [shape for run in runs if (shape := shape_of(run))]
    return plan_training(runs[0].model, shapes, memory_budget=budget)


def _prompts(backbone: Backbone, costs: Sequence[RunCost]) -> Prompts:
    from fastcoop.prompts.plain import drops_full_stop

    path, reason = backbone.prompt_path
    rows, shared = (mean(getattr(one.tree, name) for one in costs) for name in ("rows", "shared_rows"))
    plain = mean(len(one.shape.class_names) for one in costs) * backbone.text.context_length
    other, drops = plain if path == "shared" else shared, drops_full_stop(backbone.tokenizer)
    return Prompts(backbone.name, str(path), reason, rows, other, drops)


def _work(plan: TrainingPlan) -> tuple[float, float, float]:
    """Return the stages, the steps and the floating-point operations of a training."""
    stages = [stage.steps for stage in plan.stages()]
    return len(stages), sum(stages), plan.flops


def _time_steps(plan: TrainingPlan, backbone: Backbone) -> tuple[float, float, float]:
    """Return the seconds of a training's stage, of its step and of its floating-point operation.

    Two trainings are timed, on features of ones: a run of one class, and the plan's first runs, as many and with as
    many classes as ``MAX_STEP_FLOPS`` allows.
    """
    import torch

    from fastcoop.engine import FastSchedule, Run, plan_training, train
    from fastcoop.prompts import initial_contexts

    on_cpu, clock = backbone.device.type == "cpu", _clock(backbone)
    epochs = 5 if on_cpu else 25  # of one step each; on a GPU, later steps are recorded and replayed

    def timed(left: float) -> tuple[float, float, float]:
        runs: list[Run] = []
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
        ends = [clock()]
        train(backbone, runs, on_step=lambda get_state: ends.append(clock()))
        first, *steps = (end - start for start, end in pairwise(ends))
        return first, median(steps), plan_training(backbone, [run.shape for run in runs]).flops / epochs

    _, small, small_flops = timed(0.0)
    first, large, flops = timed(MAX_STEP_FLOPS if on_cpu else 1000 * MAX_STEP_FLOPS)
    per_flop = max(0.0, large - small) / max(flops - small_flops, 1.0)
    return max(0.0, first - large), max(0.0, small - per_flop * small_flops), per_flop


def _time_runs(runs: Sequence[RunSpec[Any]]) -> tuple[float, float] | None:
    """Return the seconds of a run outside the engine, and those that a unit of its `_size` adds.

    The smallest run is timed, and one of about mean size or ``MAX_RUN_SECONDS`` at most. None if features are missing.
    """
    kinds = METHODS[runs[0].method].kinds  # the runs are of one method
    stores = {id(data): data.store for run in runs for data in (run.data, *run.targets)}.values()
    if not all(store is not None and store.holds(kinds) for store in stores):
        return None
    sizes = sorted(runs, key=_size)
    if isinstance(sizes[0].settings, ScheduleSettings) and not sizes[0].has_learned:
        short = [sizes[0].settings.model_copy(update={"epochs": epochs}) for epochs in (1, 2, 4, 8, 16)]
        sizes = [replace(sizes[0], settings=settings) for settings in short]
    small, least = _time(sizes[0]), _size(sizes[0])
    if small is None:
        return None
    limit = min(mean(map(_size, sizes)), least * MAX_RUN_SECONDS / small)
    large = [run for run in sizes if least < _size(run) <= limit]
    seconds = _time(large[-1]) if large else None
    if seconds is None:
        return 0.0, small / least
    slope = max(0.0, seconds - small) / (_size(large[-1]) - least)
    return small - slope * least, slope


def _time(run: RunSpec[Any]) -> float | None:
    """Return the seconds of a run outside the engine, once its method is imported and its features are read.

    None if the features of some images are missing, or are of other pictures than there are now.
    """
    method, context, clock = METHODS[run.method], RunContext(), _clock(run.model)
    method.run(run.model, [], lambda index, outcome: None, context)
    try:
        read = [data.test for data in run.tests], run.subset and run.data.train(run.subset)
    except UserError:
        return None
    start = clock()
    method.run(run.model, [run], lambda index, outcome: None, context)
    del read
    return clock() - start


def _clock(backbone: Backbone) -> Any:
    """Return a clock: of this thread's work on a CPU, whatever else the machine does, or else of wall time."""
    return time.thread_time if backbone.device.type == "cpu" else time.perf_counter


def _size(run: RunSpec[Any]) -> float:
    """Return what the time of a run outside the engine grows with: steps, or images and classes."""
    if run.has_learned or run.subset is None:
        return 1.0
    return float(steps_of(run) or len(run.subset.train) * len(run.data.class_names))


def _crop_seconds(loaded: LoadedGrid, missing: dict[tuple[str, str], int]) -> float:
    """Return the seconds of encoding the missing crops of a backbone, by the time of a few test images."""
    from fastcoop.features.encode import Chunk, Encoding, decode, start_encoding

    names = next(iter(missing))
    images = loaded.data(*names).dataset
    chunk = Chunk("test", tuple(range(min(TIMED_CROPS, len(images.splits["test"])))), range(1))
    encoding = Encoding(
        loaded.backbone(names[0]), images, loaded.grid.recipe, dtype="float32", batch_size=TIMED_CROPS
    )
    crops = [decode(encoding, chunk, row) for row in chunk.rows]  # others are read meanwhile
    start = time.perf_counter()
    start_encoding(encoding, chunk, crops)()
    return sum(missing.values()) * (time.perf_counter() - start) / len(chunk.rows)
