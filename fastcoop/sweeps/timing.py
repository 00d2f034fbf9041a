"""What the time of runs grows with, and their speed: of runs that are done, or of a few steps that are timed now."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from fastcoop.backbones import Backbone
from fastcoop.engine.fit import RunCost, TrainingPlan, plan_training
from fastcoop.errors import UserError
from fastcoop.grids.planning import LoadedGrid
from fastcoop.methods import METHODS, RunContext, RunSpec
from fastcoop.methods.schedule import ScheduleSettings, steps_of
from fastcoop.results.store import seconds_of
from fastcoop.sweeps.batches import shape_of
from fastcoop.sweeps.known import Speed, loaded_backbone, record_speeds

MAX_STEP_FLOPS = 3e9  # of a timed training step: about a tenth of a second of a core
MAX_RUN_SECONDS = 1.0  # of a timed run of a method outside the engine
EPOCHS = (1, 2, 4, 8, 16)  # of such runs that train by steps
TIMED_CROPS = 8


def kind_of(run: RunSpec[Any]) -> str:
    """Return the name of runs whose time grows with their work alike: backbone, method, and what they do."""
    shape = shape_of(run)
    what = " (tests only)" if run.has_learned else " (fast)" if shape and shape.is_fast else ""
    return f"{run.backbone} {run.method}{what}"


def costs_of(runs: Mapping[str, RunSpec[Any]]) -> dict[str, RunCost]:
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


def speeds_of(
    runs: Mapping[str, RunSpec[Any]], costs: Mapping[str, RunCost], took: Mapping[str, tuple[float, str]]
) -> dict[str, Speed]:
    """Return the speed of runs that are done, by `kind_of`."""
    done: dict[str, list[tuple[float, float]]] = {}
    for key, run in runs.items():
        seconds, device = took.get(key, (0.0, ""))
        if seconds > 0 and device == str(run.model.device):
            done.setdefault(kind_of(run), []).append((work_of(run, costs), seconds))
    return {kind: _line(points) for kind, points in done.items()}


def record(runs: Mapping[str, RunSpec[Any]], folder: Path, cache: Path, threads: int) -> None:
    """Record the speed of runs that a sweep did, for dry runs on this machine.

    Runs of one size alone say nothing of other sizes, except in the engine, which trains them together.
    """
    costs, works = costs_of(runs), dict[str, set[float]]()
    for run in runs.values():
        works.setdefault(kind_of(run), set()).add(1.0 if run.key in costs else work_of(run, costs))
    found = speeds_of(runs, costs, seconds_of(folder))
    kept = {kind: speed for kind, speed in found.items() if works[kind] == {1.0} or len(works[kind]) > 1}
    for device in {str(run.model.device) for run in runs.values()}:  # one, if there are runs
        record_speeds(cache, device, threads, kept)


def _line(points: Sequence[tuple[float, float]]) -> Speed:
    """Return the line through (work, seconds) with the least squares, neither part of it below zero."""
    work, seconds = (mean(column) for column in zip(*points, strict=True))
    spread = sum((one - work) ** 2 for one, _ in points)
    slope = sum((one - work) * (took - seconds) for one, took in points) / spread if spread else math.inf
    slope = min(max(slope, 0.0), seconds / work)
    return Speed(seconds - slope * work, slope)


def speed(runs: Sequence[RunSpec[Any]], threads: int) -> Speed | None:
    """Time a few steps or runs of one kind; None where their features are missing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            return _step(runs) if shape_of(runs[0]) else _run(runs)
    finally:
        torch.set_num_threads(before)


def _step(runs: Sequence[RunSpec[Any]]) -> Speed:
    """Time a few steps of the first runs that would train together, on features of ones.

    The runs, or the classes of a single one, are cut so that a step has at most MAX_STEP_FLOPS operations (1,000 times
    as many on a GPU).
    """
    from fastcoop.engine import FastSchedule, Run, train
    from fastcoop.prompts import initial_contexts

    backbone, plan = loaded_backbone(runs[0].model), plan_of(runs)
    on_cpu, clock = backbone.device.type == "cpu", _clock(backbone)
    # A GPU records, then replays.
    epochs, left = (4, MAX_STEP_FLOPS) if on_cpu else (25, 1000 * MAX_STEP_FLOPS)
    timed: list[Run] = []
    for cost in (plan.runs[index] for index in next(plan.stages()).runs):
        if timed and cost.step_flops > left:
            break
        names, layout, size = cost.shape.class_names, cost.shape.layout, cost.shape.batch_size
        names = names[: max(1, int(len(names) * min(1.0, left / cost.step_flops)))]
        schedule = FastSchedule() if cost.shape.is_fast else None
        contexts = initial_contexts(backbone, layout, len(names), 0)
        features, labels = torch.ones(size, 1, backbone.embed_dim), torch.zeros(size, dtype=torch.long)
        timed.append(Run(names, layout, contexts, features, labels, epochs, 0, size, schedule=schedule))
        left -= cost.step_flops
    ends = [clock()]
    train(backbone, timed, on_step=lambda get_state: ends.append(clock()))
    _, *steps = (end - start for start, end in pairwise(ends))
    return Speed(0.0, median(steps) * epochs / plan_training(backbone, [run.shape for run in timed]).flops)


def _run(runs: Sequence[RunSpec[Any]]) -> Speed | None:
    """Time the smallest run, and the largest of at most mean size that is short enough, if there is another."""
    kinds = METHODS[runs[0].method].kinds
    stores = {id(data): data.store for run in runs for data in (run.data, *run.targets)}.values()
    if not all(store is not None and store.holds(kinds) for store in stores):
        return None
    sizes, size = sorted(runs, key=lambda run: work_of(run, {})), mean(work_of(run, {}) for run in runs)
    if isinstance(sizes[0].settings, ScheduleSettings) and not sizes[0].has_learned:
        short = (sizes[0].settings.model_copy(update={"epochs": epochs}) for epochs in EPOCHS)
        sizes = [replace(sizes[0], settings=settings) for settings in short]
    backbone, work = loaded_backbone(runs[0].model), work_of(sizes[0], {})
    seconds = _time(sizes[0], backbone)
    if seconds is None:
        return None
    points, limit = [(work, seconds)], min(size, work * MAX_RUN_SECONDS / max(seconds, 1e-9))
    if large := [run for run in sizes if work < work_of(run, {}) <= limit]:
        points.append((work_of(large[-1], {}), _time(large[-1], backbone) or seconds))
    return _line(points)


def _time(run: RunSpec[Any], backbone: Backbone) -> float | None:
    """Return the seconds of a run outside the engine, once its method is imported and its features are read.

    None if the features of some images are missing, or are of other pictures than there are now.
    """
    run, method, clock = replace(run, model=backbone), METHODS[run.method], _clock(backbone)
    method.run(backbone, [], lambda index, outcome: None, RunContext())
    try:
        read = [data.test for data in run.tests], run.subset and run.data.train(run.subset)
    except UserError:
        return None
    start = clock()
    method.run(backbone, [run], lambda index, outcome: None, RunContext())
    del read
    return float(clock() - start)


def _clock(backbone: Backbone) -> Any:
    """Return a clock: of this thread's work on a CPU, whatever else the machine does, or else of wall time."""
    return time.thread_time if backbone.device.type == "cpu" else time.perf_counter


def crop_seconds(loaded: LoadedGrid, name: str, missing: Mapping[tuple[str, str], int]) -> float:
    """Return the seconds of encoding a backbone's missing crops, by the time of a few test images."""
    from fastcoop.features.encode import Chunk, Encoding, decode, start_encoding

    of_backbone = {names: count for names, count in missing.items() if names[0] == name}
    images, backbone = loaded.data(*next(iter(of_backbone))).dataset, loaded_backbone(loaded.backbone(name))
    chunk = Chunk("test", tuple(range(min(TIMED_CROPS, len(images.splits["test"])))), range(1))
    encoding = Encoding(backbone, images, loaded.grid.recipe, dtype="float32", batch_size=TIMED_CROPS)
    crops = [decode(encoding, chunk, row) for row in chunk.rows]  # others are read meanwhile
    start = time.perf_counter()
    start_encoding(encoding, chunk, crops)()
    return sum(of_backbone.values()) * (time.perf_counter() - start) / len(chunk.rows)
