"""``--dry-run``: the expected time and memory of a sweep.

Counts, operations and bytes come from the engine's plan. The time of a method's runs with a backbone comes from the
grid's runs in the results folder, or from what sweeps recorded on this machine, or else a few steps are timed now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import psutil

from fastcoop.engine.fit import RunCost, TrainingPlan, plan_training
from fastcoop.grids.planning import LoadedGrid
from fastcoop.methods import RunSpec
from fastcoop.methods.schedule import steps_of
from fastcoop.progress import counted, duration
from fastcoop.prompts.plain import drops_full_stop
from fastcoop.results.store import seconds_of
from fastcoop.sweeps.batches import shape_of
from fastcoop.sweeps.caching import missing_crops
from fastcoop.sweeps.known import record_speeds, speeds_of

if TYPE_CHECKING:
    from fastcoop.sweeps.grid_sweep import SweepPlan

STARTUP_SECONDS = 6.0  # of a process, on one core: importing libraries, loading a backbone
PROCESS_BYTES = 700e6  # of a process with these libraries and a small backbone


@dataclass(frozen=True)
class Part:
    """Batches of a method with a backbone: their number, their runs, those of the largest, their seconds on one worker
    (None if unknown) and where these come from."""

    backbone: str
    method: str
    batches: int
    runs: int
    largest: int
    seconds: float | None
    source: str


@dataclass(frozen=True)
class Forecast:
    """What is left of a sweep.

    Attributes:
        parts: Its batches, by backbone and method.
        prompts: Lines on how each backbone learns prompts, where it does.
        nodes: Distinct token prefixes that training computes, counted once per step and run.
        flops: Floating-point operations of training, forward and backward.
        crops: Images and views that are encoded first.
        workers, threads: Processes, and threads of each.
        seconds: Expected wall time of the command; None if the time of a part is unknown.
        memory_bytes: Expected memory of all processes.
    """

    parts: tuple[Part, ...]
    prompts: tuple[str, ...]
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
            yield f"{part.backbone}  {part.method}: {counted(part.runs, 'run')} in {batches}, {took} ({part.source})"
        yield from self.prompts
        if self.nodes:
            yield f"training computes {self.nodes:.3g} nodes, {self.flops:.3g} floating-point operations"
        took = "unknown time" if self.seconds is None else duration(self.seconds)
        workers = f"{counted(self.workers, 'process')} (threads of each: {self.threads})"
        yield f"expected: {took} and {self.memory_bytes / 1e9:.1f} GB, by {workers}"
        if self.seconds is None:
            yield "times of methods outside the engine are known once the features are cached"


def forecast(loaded: LoadedGrid, plan: SweepPlan, folder: Path, cache: Path) -> Forecast:
    """Return the expected time and memory of the runs that a sweep still has to do.

    Args:
        loaded: The grid with its backbones, datasets and opened feature stores.
        plan: The runs and their batches.
        folder: The results folder; its runs give the times of others of their method and backbone.
        cache: The folder of features, with what sweeps recorded on this machine.
    """
    from fastcoop.sweeps import timing

    costs = cost_of_runs(plan.runs)
    missing, took = missing_crops(loaded), _speeds(plan.runs, costs, seconds_of(folder))
    parts, seconds, largest, threads = [], list[float](), 0, plan.team.threads
    trained: dict[str, list[RunCost]] = {}
    for backbone, method, trains in dict.fromkeys(
        (one.backbone, one.method, one.trains) for one in plan.batches
    ):
        batches = [
            one
            for one in plan.batches
            if (one.backbone, one.method, one.trains) == (backbone, method, trains)
        ]
        groups = [[(plan.runs if trains else plan.pending)[key] for key in one.keys] for one in batches]
        first, name = groups[0][0], f"{backbone} {method}"
        recorded = speeds_of(cache, str(first.model.device), threads)
        source, speed = "by runs that are done", took.get(name)
        if first.has_learned or speed is None:
            source, speed = "by earlier sweeps", None if first.has_learned else recorded.get(name)
        if speed is None:
            source, speed = "timed now", timing.speed([run for group in groups for run in group], threads)
        if speed is None:
            source = "no features"
        if trains:
            trained.setdefault(backbone, []).extend(costs[run.key] for group in groups for run in group)
            plans = [plan_of(group, batch.budget) for group, batch in zip(groups, batches, strict=True)]
            largest = max(largest, *(one.bytes_of(next(one.stages()).runs) for one in plans))
        works = [sum(work_of(run, costs) for run in group) for group in groups]
        found = [] if speed is None else [work * speed for work in works]
        counts = [len(group) for group in groups]
        total = sum(found) if found else None
        parts.append(Part(backbone, method, len(groups), sum(counts), max(counts), total, source))
        seconds += found
    every = [cost for of_backbone in trained.values() for cost in of_backbone]
    wall = sum(timing.crop_seconds(loaded, name, missing) for name in {name for name, _ in missing})
    wall += STARTUP_SECONDS * (2 if plan.team.size > 1 else 1)  # of this process, then of its workers
    wall += max(max(seconds, default=0.0), sum(seconds) / plan.team.size)
    resident = max(psutil.Process().memory_info().rss, PROCESS_BYTES)
    return Forecast(
        parts=tuple(parts),
        prompts=tuple(_prompts(loaded, trained)),
        nodes=float(sum(cost.tree.nodes * cost.shape.steps for cost in every)),
        flops=float(sum(cost.flops for cost in every)),
        crops=sum(missing.values()),
        workers=plan.team.size,
        threads=threads,
        seconds=wall if len(seconds) == len(plan.batches) else None,
        memory_bytes=int((plan.team.size + (plan.team.size > 1)) * (resident + largest)),
    )


def record(runs: Mapping[str, RunSpec[Any]], folder: Path, cache: Path, threads: int) -> None:
    """Record the speed of runs that are done, for dry runs of other grids on this machine."""
    for device in {str(run.model.device) for run in runs.values()}:
        record_speeds(cache, device, threads, _speeds(runs, cost_of_runs(runs), seconds_of(folder)))


def cost_of_runs(runs: Mapping[str, RunSpec[Any]]) -> dict[str, RunCost]:
    """Return the cost of all runs that train in the engine, by key."""
    by_model: dict[Any, list[RunSpec[Any]]] = {}
    for run in runs.values():
        if shape_of(run):
            by_model.setdefault(run.model, []).append(run)
    return {
        run.key: cost
        for group in by_model.values()
        for run, cost in zip(group, plan_of(group).runs, strict=True)
    }


def plan_of(runs: Sequence[RunSpec[Any]], budget: int | None = None) -> TrainingPlan:
    """Return the engine's plan of runs of one backbone that train."""
    shapes = [shape for run in runs if (shape := shape_of(run))]
    return plan_training(runs[0].model, shapes, memory_budget=budget)


def work_of(run: RunSpec[Any], costs: Mapping[str, RunCost]) -> float:
    """Return what a run's time grows with: operations in the engine, and else steps, or images and classes."""
    if run.has_learned or run.subset is None:
        return 1.0
    if run.key in costs:
        return costs[run.key].flops
    return float(steps_of(run) or len(run.subset.train) * len(run.data.class_names))


def _speeds(
    runs: Mapping[str, RunSpec[Any]], costs: Mapping[str, RunCost], took: Mapping[str, tuple[float, str]]
) -> dict[str, float]:
    """Return the seconds per unit of work of runs that are done, by "backbone method"."""
    sums: dict[str, list[float]] = {}
    for key, run in runs.items():
        seconds, device = took.get(key, (0.0, ""))
        if seconds > 0 and device == str(run.model.device):
            total = sums.setdefault(f"{run.backbone} {run.method}", [0.0, 0.0])
            total[:] = total[0] + seconds, total[1] + work_of(run, costs)
    return {name: seconds / work for name, (seconds, work) in sums.items()}


def _prompts(loaded: LoadedGrid, costs: Mapping[str, Sequence[RunCost]]) -> Iterator[str]:
    """Yield how each backbone learns prompts: the positions that a run's step computes on its path and on the other."""
    for name, of_backbone in costs.items():
        backbone = loaded.backbone(name)
        path, reason = backbone.prompt_path
        here, shared = (
            mean(getattr(one.tree, kind) for one in of_backbone) for kind in ("rows", "shared_rows")
        )
        plain = mean(len(one.shape.class_names) for one in of_backbone) * backbone.text.context_length
        other, there = ("plain", plain) if path == "shared" else ("shared", shared)
        why = f" ({reason})" if reason else ""
        stop = "; its tokenizer drops their full stop" if drops_full_stop(backbone.tokenizer) else ""
        yield (
            f"{name}  prompts on the {path} path{why}: {here:,.0f} positions per run and step, "
            f"{there:,.0f} on the {other} path{stop}"
        )
