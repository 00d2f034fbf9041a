"""``--dry-run``: the expected time and memory of a sweep.

Counts, operations and bytes come from the engine's plan. Times are the planned cost of batches by the pace of their
kind, which sweeps recorded on this machine, or else a few steps or runs are timed now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import psutil

from fastcoop.engine.fit import RunCost, plan_training
from fastcoop.methods.late import Backbone
from fastcoop.progress import counted, duration
from fastcoop.prompts.plain import drops_full_stop
from fastcoop.results.records import Batch
from fastcoop.sweeps import timing
from fastcoop.sweeps.batches import shape_of
from fastcoop.sweeps.caching import missing_crops
from fastcoop.sweeps.known import known_paces
from fastcoop.sweeps.loading import LoadedGrid
from fastcoop.sweeps.pace import Kind, kind_of

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


def forecast(loaded: LoadedGrid, plan: SweepPlan, cache: Path) -> Forecast:
    """Return the expected time and memory of the runs that a sweep still has to do.

    Args:
        loaded: The grid with its backbones, datasets and opened feature stores.
        plan: The runs and their batches.
        cache: The folder of features, with what sweeps recorded on this machine.
    """
    missing, team, runs = missing_crops(loaded), plan.team, {**plan.runs, **plan.pending}
    known = known_paces(cache, str(loaded.backbones[0].device), team.threads)
    kinds: dict[Kind, list[Batch]] = {}
    trained: dict[str, list[RunCost]] = {}
    largest = 0  # bytes of a batch
    for batch in plan.batches:
        kinds.setdefault(kind_of(batch), []).append(batch)
        if batch.trains:
            shapes = [shape for key in batch.keys if (shape := shape_of(plan.runs[key]))]
            planned = plan_training(loaded.backbone(batch.backbone), shapes, memory_budget=batch.budget)
            trained.setdefault(batch.backbone, []).extend(planned.runs)
            largest = max(largest, planned.bytes_of(planned.first_batch()))
    parts, longest = [], 0.0  # seconds of a batch
    for (method, name, trains), batches in kinds.items():
        pace, source = known.get((method, name, trains)), "by earlier sweeps"
        if pace is None:
            pace = timing.time_work(loaded, batches, runs, team.threads)
            source = "timed now" if pace else "could not be timed"
            source = "no features" if not pace and any(one == name for one, _ in missing) else source
        sizes = [len(batch.keys) for batch in batches]
        seconds = pace and pace * sum(batch.cost for batch in batches)
        longest = max(longest, (pace or 0.0) * max(batch.cost for batch in batches))
        parts.append(Part(name, method, len(sizes), sum(sizes), max(sizes), seconds, source))
    wall = sum(timing.crop_seconds(loaded, name, missing) for name in {name for name, _ in missing})
    wall += STARTUP_SECONDS * (2 if team.size > 1 else 1)  # of this process, then of its workers
    wall += max(longest, sum(part.seconds or 0.0 for part in parts) / team.size)
    resident = max(psutil.Process().memory_info().rss, PROCESS_BYTES)
    costs = list(chain(*trained.values()))
    return Forecast(
        parts=tuple(parts),
        prompts=tuple(_prompt_line(loaded.backbone(name), costs) for name, costs in trained.items()),
        nodes=float(sum(cost.tree.nodes * cost.shape.steps for cost in costs)),
        flops=float(sum(cost.flops for cost in costs)),
        crops=sum(missing.values()),
        workers=team.size,
        threads=team.threads,
        seconds=None if any(part.seconds is None for part in parts) else wall,
        memory_bytes=int((team.size + (team.size > 1)) * (resident + largest)),
    )


def _prompt_line(backbone: Backbone, costs: Sequence[RunCost]) -> str:
    """Return how a backbone learns prompts: the positions that a run's step computes on its path and on the other."""
    path, reason = backbone.prompt_path
    here, shared = (mean(getattr(one.tree, kind) for one in costs) for kind in ("rows", "shared_rows"))
    plain = mean(len(one.shape.class_names) for one in costs) * backbone.text.context_length
    other, there = ("plain", plain) if path == "shared" else ("shared", shared)
    why = f" ({reason})" if reason else ""
    stop = "; its tokenizer drops their full stop" if drops_full_stop(backbone.tokenizer) else ""
    return (
        f"{backbone.name}  prompts on the {path} path{why}: {here:,.0f} positions per run and step, "
        f"{there:,.0f} on the {other} path{stop}"
    )
