"""Batches: which runs train together, and in which order batches are run.

A batch is recorded, and a resumed sweep restores it, so that its runs train together again and, from a checkpoint,
reach the same bits. Runs of different methods share a batch if their methods name equal trainers; a run without a
trainer has a batch of its own. A GPU is best filled by few batches: while one trains, runs that wait take the rows of
those that end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from fastcoop.engine.fit import plan_training
from fastcoop.methods import METHODS, RunSpec
from fastcoop.methods.schedule import steps_of
from fastcoop.methods.spec import method_names
from fastcoop.methods.training import TrainedMethod
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.engine import RunShape
    from fastcoop.engine.fit import RunCost
    from fastcoop.prompts.tree import TreeKey

# "Rows" are the tree nodes of a training step; a "fill" is the number of rows that the engine trains at once.
MAX_BATCH_FRACTION = 1 / 16  # of all training work in a batch, so that workers finish at about the same time
MAX_BATCH_FILLS = 4  # rows in one batch, in fills; the engine trains one fill at a time
MIN_BATCH_FILLS = 1 / 8  # batches with fewer rows are slow, so they also take runs of the next tree
MIN_GPU_ROWS = 16384  # a GPU's batches are not cut into parts with fewer rows
MAX_RUNS_TOGETHER = 256  # of a method that learns runs of one dataset in one batch of tensors
MAX_GPU_CONTEXTS = 1e9  # bytes of all contexts in a GPU's batch: its checkpoint holds them
CORE_FLOPS = 3e10  # per second; as the next, only a first guess of how long batches take
STEP_SECONDS = 0.05  # of a training without a trainer
ROOT_FLOPS = (
    40  # of a fast schedule's inverse root in each step, times the width cubed, by the time that it takes
)
MAX_FIRST_SECONDS = 60.0  # expected, of a batch that starts before others because it is short


def form_batches(
    planned: Mapping[str, RunSpec],
    pending: Mapping[str, RunSpec],
    recorded: Sequence[Batch],
    *,
    budget: int,
    gpu_workers: int | None = None,
) -> list[Batch]:
    """Return the batches of all pending runs, in order: recorded ones as they were, and new ones for the other runs.

    A recorded batch is restored if all its runs are in the grid and some of them are to be trained.

    Args:
        planned: All runs of the grid, by key.
        pending: The runs to do, by key.
        recorded: Batches of an earlier sweep.
        budget: Memory for the training of each new batch, in bytes.
        gpu_workers: Processes that train on a GPU, each of which gets one batch per backbone and trainer. None: batches
            for cores, or for workers whose number is not known.

    Raises:
        UserError: A prompt does not fit the text tower.
    """
    to_train = {key for key, run in pending.items() if not run.has_learned}
    batches: list[Batch] = []
    taken: set[str] = set()
    for batch in recorded:
        complete = all(key in planned and key not in taken for key in batch.keys)
        if complete and not to_train.isdisjoint(batch.keys):
            # Keys contain digests of weights, not names: the backbone may have been renamed.
            batches.append(replace(batch, backbone=planned[batch.keys[0]].backbone))
            taken.update(batch.keys)
    rest = [run for key, run in pending.items() if key not in taken]
    return in_order(
        [*batches, *plan_batches(rest, budget=budget, gpu_workers=gpu_workers)], {**planned, **pending}
    )


def plan_batches(runs: Iterable[RunSpec], *, budget: int, gpu_workers: int | None = None) -> list[Batch]:
    """Return new batches of ``runs``, backbone by backbone. Arguments and exceptions are those of `form_batches`."""
    by_backbone: dict[Backbone, list[RunSpec]] = {}
    for run in runs:
        by_backbone.setdefault(run.model, []).append(run)
    batches: list[Batch] = []
    for backbone, group in by_backbone.items():
        found = {run.key: shape_of(run) for run in group}
        shapes = {key: shape for key, shape in found.items() if shape is not None}
        batches += _plain_batches([run for run in group if run.key not in shapes])
        if shapes:
            trained = [run for run in group if run.key in shapes]
            batches += _training_batches(backbone, trained, shapes, budget, gpu_workers)
    return batches


def shape_of(run: RunSpec) -> RunShape | None:
    """Return the sizes of a run that is to be trained together with others; None for other runs."""
    return None if run.has_learned else METHODS[run.method].run_shape(run, run.model)


def training_seconds(backbone: Backbone, cost: RunCost) -> float:
    """Return a first guess of the seconds that a run trains on one core."""
    text = backbone.text
    row_seconds = 4 * 12 * text.width**2 * text.layers / CORE_FLOPS
    root_seconds = ROOT_FLOPS * text.width**3 / CORE_FLOPS
    return cost.shape.steps * (cost.tree.rows * row_seconds + cost.shape.is_fast * root_seconds)


def in_order(batches: Sequence[Batch], runs: Mapping[str, RunSpec]) -> list[Batch]:
    """Return batches in the order to start them. ``runs``: theirs, by key.

    The cheapest results of every dataset come first, so that a mistake shows early: methods that learn nothing, with
    all backbones. Then one backbone after the other: a short batch of each method and dataset, where there is one; then
    others without a trainer, whose time is unknown, by shots; then training, longest first, so that short batches even
    out the end.
    """
    methods, backbones = list(METHODS), list(dict.fromkeys(batch.backbone for batch in batches))
    learning = [batch for batch in batches if METHODS[runs[batch.keys[0]].method].learns]
    first, shown = set[tuple[str, ...]](), set[tuple[str, ...]]()
    for batch in sorted(learning, key=lambda batch: batch.cost):
        shows = {(batch.backbone, runs[key].method, runs[key].dataset) for key in batch.keys}
        if batch.cost <= MAX_FIRST_SECONDS and not shows <= shown:
            first.add(batch.keys)
            shown |= shows

    def shots(batch: Batch) -> float:
        return min(float("inf") if runs[key].shots == "all" else float(runs[key].shots) for key in batch.keys)

    def place(batch: Batch) -> tuple[Any, ...]:
        name, backbone = runs[batch.keys[0]].method, backbones.index(batch.backbone)
        method = methods.index(name)
        if not METHODS[name].learns:
            return 0, backbone, method
        if batch.keys in first:
            return 1, backbone, 0, batch.cost
        return (
            (1, backbone, 2, -batch.cost)
            if batch.trains
            else (1, backbone, 1, shots(batch), method, -batch.cost)
        )

    return sorted(batches, key=place)


def _plain_batches(runs: Sequence[RunSpec]) -> list[Batch]:
    """Return a batch per run of methods that learn, and batches per dataset of other methods, whose runs are short, and
    of those that learn runs together."""
    groups: dict[tuple[Any, ...], list[RunSpec]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for run in sorted(runs, key=lambda run: len(run.subset.train) if run.subset else 0):
        method, of_dataset = METHODS[run.method], (run.method, run.dataset)
        together = counts[of_dataset] // MAX_RUNS_TOGETHER if method.runs_together else None
        alone = run.key if method.learns and together is None else together
        groups.setdefault((*of_dataset, alone), []).append(run)
        counts[of_dataset] += 1
    return [
        Batch(
            group[0].method, group[0].backbone, tuple(run.key for run in group), 1, cost=_plain_seconds(group)
        )
        for group in groups.values()
    ]


def _plain_seconds(group: Sequence[RunSpec]) -> float:
    """Return a first guess of the seconds of a batch without a trainer."""
    method, run = METHODS[group[0].method], group[0]
    if not method.learns or run.has_learned:
        return 0.1 * len(group)
    if method.runs_together:
        return 0.5 + sum(len(run.subset.train) for run in group) / 2000
    steps = steps_of(run)
    return 0.5 + steps * STEP_SECONDS if steps else 0.5 + len(run.subset.train) / 200


class _Sized(NamedTuple):
    """A run to train, and what it takes.

    ``trainer``: its name, or that of a method whose own `run` trains. ``bytes``: of contexts, kept in checkpoints.
    """

    run: RunSpec
    trainer: str
    tree: TreeKey
    rows: int
    cost: float
    bytes: int


def _training_batches(
    backbone: Backbone,
    runs: Sequence[RunSpec],
    shapes: Mapping[str, RunShape],
    budget: int,
    gpu_workers: int | None,
) -> list[Batch]:
    """Sort runs by trainer and tree, longest first, and cut the list into batches."""
    plan = plan_training(backbone, list(shapes.values()), memory_budget=budget)
    costs = dict(zip(shapes, plan.runs, strict=True))
    place = {
        tree: number for number, tree in enumerate(sorted({run.shape.tree for run in plan.runs}, key=repr))
    }

    def sized(run: RunSpec) -> _Sized:
        cost, method = costs[run.key], METHODS[run.method]
        is_own = type(method).run is not TrainedMethod.run  # which knows no other methods
        trainer = run.method if is_own else repr(method.trainer(run.settings))
        seconds, kept = training_seconds(backbone, cost), _context_bytes(cost.shape, backbone)
        return _Sized(run, trainer, cost.shape.tree, cost.tree.rows, seconds, kept)

    def order(one: _Sized) -> tuple[Any, ...]:
        return one.trainer, place[one.tree], -shapes[one.run.key].steps, one.run.seed, one.run.key

    ordered = sorted(map(sized, runs), key=order)
    fill = plan.rows_estimate
    parts = _gpu_parts(ordered, gpu_workers) if gpu_workers is not None else _cpu_parts(ordered, fill)
    return [
        Batch(
            method_names(one.run for one in part), backbone.name, tuple(one.run.key for one in part), threads=1,
            budget=budget, cost=sum(one.cost for one in part),
        )
        for part in parts
    ]  # fmt: skip


def _cpu_parts(runs: Sequence[_Sized], fill: int) -> list[list[_Sized]]:
    """Cut runs where the trainer changes, and once there are enough rows where the tree does or the part gets large."""
    max_cost = sum(one.cost for one in runs) * MAX_BATCH_FRACTION
    parts: list[list[_Sized]] = []
    rows, cost = 0, 0.0
    for one in runs:
        too_large = cost + one.cost > max_cost or rows + one.rows > MAX_BATCH_FILLS * fill
        if (
            not parts
            or parts[-1][-1].trainer != one.trainer
            or (rows >= MIN_BATCH_FILLS * fill and (too_large or parts[-1][-1].tree != one.tree))
        ):
            parts.append([])
            rows, cost = 0, 0.0
        parts[-1].append(one)
        rows, cost = rows + one.rows, cost + one.cost
    return parts


def _gpu_parts(runs: Sequence[_Sized], workers: int) -> list[list[_Sized]]:
    """Cut the runs of each trainer into parts of about the same cost, if possible one per worker."""
    parts: dict[tuple[str, int], list[_Sized]] = {}
    for trainer, of_trainer in groupby(runs, key=lambda one: one.trainer):
        group = list(of_trainer)
        rows, context_bytes = sum(one.rows for one in group), sum(one.bytes for one in group)
        number = max(1, min(workers, rows // MIN_GPU_ROWS), math.ceil(context_bytes / MAX_GPU_CONTEXTS))
        share = sum(one.cost for one in group) / number
        for one, end in zip(group, accumulate(one.cost for one in group), strict=True):
            middle = end - one.cost / 2
            parts.setdefault((trainer, min(number - 1, int(middle / share))), []).append(one)
    return list(parts.values())


def _context_bytes(shape: RunShape, backbone: Backbone) -> int:
    """Return the bytes of a run's contexts, with the matrices of a fast schedule's optimizer."""
    width = backbone.text.width
    return 4 * math.prod(shape.layout.shape(len(shape.class_names), width)) + 16 * width**2 * shape.is_fast
