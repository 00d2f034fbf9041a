"""Batches: which runs train together, and in which order batches are run.

A batch is recorded, and a resumed sweep restores it, so that its runs train together again and, from a checkpoint,
reach the same bits. Methods that do not train in the engine have batches of single runs. A GPU is best filled by few
batches: while one trains, runs that wait take the rows of those that end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastcoop.backbones import Backbone
from fastcoop.methods import METHODS, RunSpec
from fastcoop.methods.schedule import steps_of
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from fastcoop.engine import RunShape

# "Rows" are the tree nodes of a training step; a "fill" is the number of rows that the engine trains at once.
MAX_BATCH_FRACTION = 1 / 16  # of all training work in a batch, so that workers finish at about the same time
MAX_BATCH_FILLS = 4  # rows in one batch, in fills; the engine trains one fill at a time
MIN_BATCH_FILLS = 1 / 8  # batches with fewer rows are slow, so they also take runs of the next tree
MIN_GPU_ROWS = 16384  # a GPU's batches are not cut into parts with fewer rows
MAX_RUNS_TOGETHER = 256  # of a method that learns runs of one dataset in one batch of tensors
MAX_GPU_CONTEXTS = 1e9  # bytes of all contexts in a GPU's batch: its checkpoint holds them
CORE_FLOPS = 3e10  # per second; as the next, only a first guess of how long batches take
STEP_SECONDS = 0.05  # of a training outside the engine
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
        gpu_workers: Processes that train on a GPU, each of which gets one batch per backbone, method and precision.
            None: batches for cores, or for workers whose number is not known.

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
    """Return the sizes of a run that is to train in the engine; None for other runs."""
    return None if run.has_learned else METHODS[run.method].run_shape(run, run.model)


def in_order(batches: Sequence[Batch], runs: Mapping[str, RunSpec]) -> list[Batch]:
    """Return batches in the order to start them. ``runs``: theirs, by key.

    The cheapest results of every dataset come first, so that a mistake shows early: methods that learn nothing, with
    all backbones. Then one backbone after the other: a short batch of each method and dataset, where there is one; then
    others outside the engine, whose time is unknown, by shots; then training, longest first, so that short batches even
    out the end.
    """
    methods, backbones = list(METHODS), list(dict.fromkeys(batch.backbone for batch in batches))
    learning = [batch for batch in batches if METHODS[batch.method].learns]
    first, shown = set[tuple[str, ...]](), set[tuple[str, ...]]()
    for batch in sorted(learning, key=lambda batch: batch.cost):
        shows = {(batch.backbone, batch.method, runs[key].dataset) for key in batch.keys}
        if batch.cost <= MAX_FIRST_SECONDS and not shows <= shown:
            first.add(batch.keys)
            shown |= shows

    def shots(batch: Batch) -> float:
        return min(float("inf") if runs[key].shots == "all" else float(runs[key].shots) for key in batch.keys)

    def place(batch: Batch) -> tuple[Any, ...]:
        method, backbone = methods.index(batch.method), backbones.index(batch.backbone)
        if not METHODS[batch.method].learns:
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
    batches = []
    for (method, *_), group in groups.items():
        images = len(group[0].subset.train) if group[0].subset else 0
        steps = steps_of(group[0])
        cost = 0.5 + steps * STEP_SECONDS if steps else 0.5 + images / 200
        if not METHODS[method].learns:
            cost = 0.1 * len(group)
        if METHODS[method].runs_together:
            cost = 0.5 + sum(len(run.subset.train) for run in group) / 2000
        batches.append(Batch(method, group[0].backbone, tuple(run.key for run in group), 1, cost=cost))
    return batches


def _training_batches(
    backbone: Backbone,
    runs: Sequence[RunSpec],
    shapes: Mapping[str, RunShape],
    budget: int,
    gpu_workers: int | None,
) -> list[Batch]:
    """Sort runs by tree, longest first, and cut the list into batches."""
    from fastcoop.engine import plan_training
    from fastcoop.engine.tree_layout import tree_key

    trees = {key: tree_key(shape.class_names, shape.layout) for key, shape in shapes.items()}
    plan = plan_training(backbone, list(shapes.values()), memory_budget=budget)
    rows = {tree: cost.rows for tree, cost in plan.trees.items()}
    place = {tree: number for number, tree in enumerate(sorted(rows, key=repr))}
    row_seconds = 4 * 12 * backbone.text.width**2 * backbone.text.layers / CORE_FLOPS
    root_seconds = ROOT_FLOPS * backbone.text.width**3 / CORE_FLOPS
    costs = {
        key: shape.steps * (rows[trees[key]] * row_seconds + shape.is_fast * root_seconds)
        for key, shape in shapes.items()
    }
    fill, max_cost = plan.rows_estimate, sum(costs.values()) * MAX_BATCH_FRACTION
    batches: list[Batch] = []
    keys: list[str] = []
    method, tree, held, cost = "", None, 0, 0.0

    def close() -> None:
        if keys:
            batches.append(Batch(method, backbone.name, tuple(keys), 1, budget, cost))

    runs = sorted(runs, key=lambda r: (r.method, place[trees[r.key]], -shapes[r.key].steps, r.seed, r.key))
    if gpu_workers is not None:
        sizes = {key: (rows[trees[key]], _context_bytes(shape, backbone)) for key, shape in shapes.items()}
        for part in _gpu_parts(runs, costs, sizes, gpu_workers):
            of_part = tuple(run.key for run in part)
            whole_cost = sum(costs[key] for key in of_part)
            batches.append(Batch(part[0].method, backbone.name, of_part, 1, budget, whole_cost))
        return batches
    for run in runs:
        key, more = run.key, held + rows[trees[run.key]]
        too_large = cost + costs[key] > max_cost or more > MAX_BATCH_FILLS * fill
        is_full = held >= MIN_BATCH_FILLS * fill and (trees[key] != tree or too_large)
        if run.method != method or is_full:
            close()
            keys, held, cost = [], 0, 0.0
        method, tree = run.method, trees[key]
        keys.append(key)
        held, cost = held + rows[tree], cost + costs[key]
    close()
    return batches


def _gpu_parts(
    runs: Sequence[RunSpec], costs: Mapping[str, float], sizes: Mapping[str, tuple[int, int]], workers: int
) -> list[list[RunSpec]]:
    """Cut the runs of each method and precision into parts of about the same cost, if possible one per worker.

    ``sizes``: rows and bytes of the contexts, by key.
    """
    groups: dict[tuple[str, str], list[RunSpec]] = {}
    for run in runs:
        groups.setdefault((run.method, str(getattr(run.settings, "precision", ""))), []).append(run)
    parts: dict[tuple[str, str, int], list[RunSpec]] = {}
    for names, group in groups.items():
        rows, context_bytes = map(sum, zip(*(sizes[run.key] for run in group), strict=True))
        number = max(1, min(workers, rows // MIN_GPU_ROWS), math.ceil(context_bytes / MAX_GPU_CONTEXTS))
        share = sum(costs[run.key] for run in group) / number
        ends = accumulate(costs[run.key] for run in group)
        for run, end in zip(group, ends, strict=True):
            middle = end - costs[run.key] / 2
            parts.setdefault((*names, min(number - 1, int(middle / share))), []).append(run)
    return list(parts.values())


def _context_bytes(shape: RunShape, backbone: Backbone) -> int:
    """Return the bytes of a run's contexts, with the matrices of a fast schedule's optimizer."""
    width = backbone.text.width
    return 4 * math.prod(shape.layout.shape(len(shape.class_names), width)) + 16 * width**2 * shape.is_fast
