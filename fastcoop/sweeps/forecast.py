"""``--dry-run``: the expected time and memory of a sweep.

Counts, operations and bytes come from the engine's plan. The time of a method's runs with a backbone comes from the
grid's runs in the results folder, or from what sweeps recorded on this machine, or else a few steps are timed now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import psutil

from fastcoop.engine.fit import RunCost
from fastcoop.grids.planning import LoadedGrid
from fastcoop.methods import RunSpec
from fastcoop.progress import counted, duration
from fastcoop.prompts.plain import drops_full_stop
from fastcoop.results.store import seconds_of
from fastcoop.sweeps import timing
from fastcoop.sweeps.caching import missing_crops
from fastcoop.sweeps.known import Speed, known_speeds
from fastcoop.sweeps.timing import costs_of, kind_of, plan_of, speeds_of, work_of

if TYPE_CHECKING:
    from fastcoop.sweeps.grid_sweep import SweepPlan

STARTUP_SECONDS = 6.0  # of a process, on one core: importing libraries, loading a backbone
UNKNOWN = Speed(math.nan, math.nan)
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
        folder: The results folder; its runs give the times of others of their kind.
        cache: The folder of features, with what sweeps recorded on this machine.
    """
    costs, missing, threads = costs_of(plan.runs), missing_crops(loaded), plan.team.threads
    runs = {
        batch.name: [(plan.runs if batch.trains else plan.pending)[key] for key in batch.keys]
        for batch in plan.batches
    }
    kinds: dict[str, list[RunSpec[Any]]] = {}
    for run in chain(*runs.values()):
        kinds.setdefault(kind_of(run), []).append(run)
    done = speeds_of(plan.runs, costs, seconds_of(folder))
    speeds = known_speeds(cache, str(loaded.backbones[0].device), threads) | done
    sources = dict.fromkeys(speeds, "by earlier sweeps") | dict.fromkeys(done, "by runs that are done")
    for kind in kinds.keys() - speeds.keys():
        found = timing.speed(kinds[kind], threads)
        sources[kind] = "no features" if found is None else "timed now"
        speeds |= {} if found is None else {kind: found}
    took = {
        name: sum(speeds.get(kind_of(run), UNKNOWN).seconds(work_of(run, costs)) for run in of_batch)
        for name, of_batch in runs.items()
    }
    parts = []
    for names in dict.fromkeys((batch.backbone, batch.method) for batch in plan.batches):
        batches = [batch.name for batch in plan.batches if (batch.backbone, batch.method) == names]
        sizes, seconds = [len(runs[name]) for name in batches], sum(took[name] for name in batches)
        source = ", ".join(dict.fromkeys(sources[kind_of(run)] for name in batches for run in runs[name]))
        known = None if math.isnan(seconds) else seconds
        parts.append(Part(*names, len(sizes), sum(sizes), max(sizes), known, source))
    trained: dict[str, list[RunCost]] = {}
    largest = 0
    for batch in (batch for batch in plan.batches if batch.trains):
        trained.setdefault(batch.backbone, []).extend(costs[key] for key in batch.keys)
        planned = plan_of(runs[batch.name], batch.budget)
        largest = max(largest, planned.bytes_of(next(planned.stages()).runs))
    wall = sum(timing.crop_seconds(loaded, name, missing) for name in {name for name, _ in missing})
    wall += STARTUP_SECONDS * (2 if plan.team.size > 1 else 1)  # of this process, then of its workers
    wall += max(max(took.values(), default=0.0), sum(took.values()) / plan.team.size)
    resident = max(psutil.Process().memory_info().rss, PROCESS_BYTES)
    every = list(chain(*trained.values()))
    return Forecast(
        parts=tuple(parts),
        prompts=tuple(_prompts(loaded, trained)),
        nodes=float(sum(cost.tree.nodes * cost.shape.steps for cost in every)),
        flops=float(sum(cost.flops for cost in every)),
        crops=sum(missing.values()),
        workers=plan.team.size,
        threads=threads,
        seconds=None if math.isnan(sum(took.values())) else wall,
        memory_bytes=int((plan.team.size + (plan.team.size > 1)) * (resident + largest)),
    )


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
