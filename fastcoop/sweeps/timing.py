"""What a dry run times: a few training steps, a batch that is not trained in the engine, a few crops."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fastcoop.datasets import FewShot, Split
from fastcoop.engine.fit import plan_training
from fastcoop.features.plan import Chunk, Encoding
from fastcoop.methods import METHODS, Data, RunContext, RunSpec
from fastcoop.methods.data import Labelled
from fastcoop.methods.late import Backbone, fresh_state, torch
from fastcoop.results.records import Batch
from fastcoop.sweeps.batches import shape_of, training_seconds
from fastcoop.sweeps.known import loaded_backbone
from fastcoop.sweeps.loading import LoadedGrid

MAX_STEP_FLOPS = {"cpu": 1e10, "cuda": 3e12}  # of a timed training step: about a third of a second of a core
MAX_IMAGES = 1024  # of a timed training, which are in memory
MAX_COST = 1.0  # of a timed batch outside the engine, if there is one that short
ENOUGH = 0.4  # seconds that are timed, in whole steps
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
    short = [one for one in batches if one.cost <= MAX_COST] or [min(batches, key=lambda one: one.cost)]
    batch = max(batches if batches[0].trains else short, key=lambda one: one.cost)
    backbone, before = loaded_backbone(loaded.backbone(batch.backbone)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads), fresh_state():
            pace, shortest = None, min(batches, key=lambda one: one.cost)
            # A method's first runs also do what a process does once; a training's first step does.
            for one in (batch,) if batch.trains or shortest is batch else (shortest, batch):
                timed, cost = [replace(runs[key], model=backbone) for key in one.keys], one.cost
                if one.trains:
                    timed, cost = _small_runs(backbone, timed)
                pace = _time_runs(backbone, timed, cost, skip=int(one.trains))
            return pace
    finally:
        torch.set_num_threads(before)


class _Measured(Exception):
    """Ends runs of which enough is timed."""


def _time_runs(backbone: Backbone, runs: Sequence[RunSpec[Any]], cost: float, skip: int) -> float | None:
    """Return the seconds per unit of the runs' cost, without their first ``skip`` steps; None if they fail at once."""
    method, reports = METHODS[runs[0].method], list[tuple[float, float]]()  # time, runs done since the last

    def on_progress(done: float) -> None:
        reports.append((time.perf_counter(), done))
        if len(reports) > skip + 1 and reports[-1][0] - reports[skip][0] > ENOUGH:
            raise _Measured

    method.run(backbone, [], lambda index, outcome: None, RunContext())  # imports what it needs
    on_progress(0.0)
    with suppress(Exception):  # also that there are no features
        method.run(backbone, runs, lambda index, outcome: None, RunContext(on_progress=on_progress))
        reports.append((time.perf_counter(), 0.0))  # after the last tests
    (start, _), *others = reports[min(skip, max(0, len(reports) - 2)) :]
    done = sum(share for _, share in others)
    return (others[-1][0] - start) * len(runs) / (cost * done) if done else None


@dataclass(eq=False)
class _Ones(Data):
    """A dataset whose training features are ones: training takes as long on them as on others."""

    dim: int = 0

    def _stored(self, subset: FewShot, kind: str) -> Labelled:
        images = len(subset.train)
        return np.ones((images, 1 + self.views, self.dim), np.float16), np.zeros(images, np.int64)


def _small_runs(backbone: Backbone, runs: Sequence[RunSpec[Any]]) -> tuple[list[RunSpec[Any]], float]:
    """Return the longest runs of a batch, on features of ones and without tests, and their cost.

    They do half of its work, so about as many train at once for most of the time. They, or the classes of a single one,
    are fewer where a step would have more than MAX_STEP_FLOPS operations.
    """
    plan = plan_training(backbone, [shape for run in runs if (shape := shape_of(run))])
    work, left = sum(cost.row_steps for cost in plan.runs) / 2, MAX_STEP_FLOPS[backbone.device.type]
    longest = list[tuple[RunSpec[Any], float]]()  # and their operations of a step
    for index in sorted(plan.first_batch(), key=lambda index: -plan.runs[index].shape.steps):
        cost = plan.runs[index]
        if longest and (work <= 0 or cost.step_flops > left):
            break
        longest.append((_small_run(backbone, runs[index], share=left / cost.step_flops), cost.step_flops))
        work, left = work - cost.row_steps, left - cost.step_flops
    # Networks train one list of classes after the other: first one of a usual size.
    mean = fmean(flops for _, flops in longest)
    small = [run for run, _ in sorted(longest, key=lambda one: abs(one[1] - mean))]
    planned = plan_training(backbone, [shape for run in small if (shape := shape_of(run))])
    return small, sum(training_seconds(backbone, cost) for cost in planned.runs)


def _small_run(backbone: Backbone, run: RunSpec[Any], share: float) -> RunSpec[Any]:
    """Return a run on features of ones, without tests, with a share of its classes."""
    names = run.data.class_names[: max(1, int(len(run.data.class_names) * min(1.0, share)))]
    splits = {**run.data.dataset.splits, "test": Split((), np.zeros(0, np.int64))}
    dataset = replace(run.data.dataset, class_names=names, splits=splits)
    subset = replace(run.subset, train=run.subset.train[:MAX_IMAGES])
    ones = _Ones(dataset, None, run.data.views, dim=backbone.embed_dim)
    return replace(run, data=ones, subset=subset, targets=())


def crop_seconds(loaded: LoadedGrid, name: str, missing: Mapping[tuple[str, str], int]) -> float:
    """Return the seconds of encoding a backbone's missing crops, by the time of a few test images."""
    from fastcoop.features.encode import decode, start_encoding

    of_backbone = {names: count for names, count in missing.items() if names[0] == name}
    images, backbone = loaded.data(*next(iter(of_backbone))).dataset, loaded_backbone(loaded.backbone(name))
    chunk = Chunk("test", tuple(range(min(TIMED_CROPS, len(images.splits["test"])))), range(1))
    encoding = Encoding(backbone, images, loaded.grid.recipe, dtype="float32")
    crops = [decode(encoding, chunk, row) for row in chunk.rows]  # others are read meanwhile
    start = time.perf_counter()
    start_encoding(encoding, chunk, crops)()
    return sum(of_backbone.values()) * (time.perf_counter() - start) / len(chunk.rows)
