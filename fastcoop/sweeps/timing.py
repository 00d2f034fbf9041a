"""What a dry run times: a few training steps, a batch that is not trained in the engine, a few crops."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from fastcoop.backbones import Backbone
from fastcoop.engine.fit import plan_training
from fastcoop.methods import RunSpec
from fastcoop.results.records import Batch
from fastcoop.sweeps.batches import shape_of, training_seconds
from fastcoop.sweeps.known import loaded_backbone
from fastcoop.sweeps.loading import LoadedGrid
from fastcoop.sweeps.tasks import BatchFinished, BatchProgress, Event, Task, run_task

MAX_STEP_FLOPS = 3e9  # of a timed training step: about a tenth of a second of a core
MAX_COST = 1.0  # of a timed batch outside the engine, if there is one that short
TIMED_CROPS = 8


def time_work(
    loaded: LoadedGrid, batches: Sequence[Batch], runs: Mapping[str, RunSpec[Any]], threads: int
) -> float | None:
    """Return the seconds of one worker per unit of `Batch.cost`; None if a batch fails, as without features.

    Args:
        loaded: The grid. A backbone that is only known by its sizes is loaded.
        batches: All of one kind of work.
        runs: Their runs, by key.
        threads: Of a worker.
    """
    name, before = batches[0].backbone, torch.get_num_threads()
    loaded.named.update(
        {spec: loaded_backbone(one) for spec, one in loaded.named.items() if one.name == name}
    )
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            if not batches[0].trains:
                return _time_batch(loaded, batches, runs, threads)
            return _time_steps(loaded.backbone(name), [runs[key] for batch in batches for key in batch.keys])
    finally:
        torch.set_num_threads(before)


class _Measured(Exception):
    """Ends a batch of which a number of runs is timed."""


def _time_batch(
    loaded: LoadedGrid, batches: Sequence[Batch], runs: Mapping[str, RunSpec[Any]], threads: int
) -> float | None:
    """Time the largest batch that is expected to be short, until it first reports progress."""
    short = [batch for batch in batches if batch.cost <= MAX_COST] or [min(batches, key=lambda one: one.cost)]
    batch, start = max(short, key=lambda one: one.cost), time.perf_counter()

    def on_event(event: Event) -> None:
        nonlocal start
        if isinstance(event, BatchProgress) and not event.runs:
            start = time.perf_counter()
        elif isinstance(event, BatchProgress):
            raise _Measured(event.runs)
        elif isinstance(event, BatchFinished) and not event.error:
            raise _Measured(len(batch.keys))

    try:
        task = Task(replace(batch, threads=threads), tuple(runs[key].unbound() for key in batch.keys))
        run_task(task, loaded, on_event)
    except _Measured as measured:
        return (time.perf_counter() - start) / batch.cost * len(batch.keys) / float(measured.args[0])
    return None


def _time_steps(backbone: Backbone, runs: Sequence[RunSpec[Any]]) -> float:
    """Time a few steps of the first runs that would train together, on features of ones.

    The runs, or the classes of a single one, are cut so that a step has at most MAX_STEP_FLOPS operations (1,000 times
    as many on a GPU).
    """
    from fastcoop.engine import FastSchedule, Run, train
    from fastcoop.prompts import initial_contexts

    plan = plan_training(backbone, [shape for run in runs if (shape := shape_of(run))])
    # A GPU records, then replays.
    epochs, left = (4, MAX_STEP_FLOPS) if backbone.device.type == "cpu" else (25, 1000 * MAX_STEP_FLOPS)
    timed: list[Run] = []
    for cost in (plan.runs[index] for index in plan.first_batch()):
        if timed and cost.step_flops > left:
            break
        names, layout, size = cost.shape.class_names, cost.shape.layout, cost.shape.batch_size
        names = names[: max(1, int(len(names) * min(1.0, left / cost.step_flops)))]
        schedule = FastSchedule() if cost.shape.is_fast else None
        contexts = initial_contexts(backbone, layout, len(names), 0)
        features, labels = torch.ones(size, 1, backbone.embed_dim), torch.zeros(size, dtype=torch.long)
        timed.append(Run(names, layout, contexts, features, labels, epochs, 0, size, schedule=schedule))
        left -= cost.step_flops
    ends = [time.perf_counter()]
    train(backbone, timed, on_step=lambda get_state: ends.append(time.perf_counter()))
    _, *steps = (end - start for start, end in pairwise(ends))
    costs = plan_training(backbone, [run.shape for run in timed]).runs
    return median(steps) * epochs / sum(training_seconds(backbone, cost) for cost in costs)


def crop_seconds(loaded: LoadedGrid, name: str, missing: Mapping[tuple[str, str], int]) -> float:
    """Return the seconds of encoding a backbone's missing crops, by the time of a few test images."""
    from fastcoop.features.encode import Chunk, Encoding, decode, start_encoding

    of_backbone = {names: count for names, count in missing.items() if names[0] == name}
    images, backbone = loaded.data(*next(iter(of_backbone))).dataset, loaded_backbone(loaded.backbone(name))
    chunk = Chunk("test", tuple(range(min(TIMED_CROPS, len(images.splits["test"])))), range(1))
    encoding = Encoding(backbone, images, loaded.grid.recipe, dtype="float32")
    crops = [decode(encoding, chunk, row) for row in chunk.rows]  # others are read meanwhile
    start = time.perf_counter()
    start_encoding(encoding, chunk, crops)()
    return sum(of_backbone.values()) * (time.perf_counter() - start) / len(chunk.rows)
