"""Batches: which runs train together, and in which order the work of a grid is done.

A run comes to the same bits only beside the same companions, so batches are planned from the whole grid and
recorded; a resumed sweep forms the recorded ones again. Methods that do not train in the engine need no companions.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastcoop.backbones import Backbone
from fastcoop.methods import METHODS, RunSpec
from fastcoop.methods.base import Training
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from fastcoop.engine.trees import TreeKey

SHARES = (
    16  # a batch takes at most this fraction of the work, so that workers end together whatever their number
)
ROOMS = 4  # a batch holds at most so many rooms full of rows, of which the engine trains one at a time
FEW = 8  # a batch of less than this fraction of a room is slow, so it takes in the next tree's runs
FLOPS = 3e10  # a second of a core: only the proportions matter, and whether a sweep is worth workers


def training_of(run: RunSpec) -> Training | None:
    """What a run asks of the engine; nothing if it has learned already and is only to be tested."""
    return None if run.has_learned else METHODS[run.method].training(run, run.model)


def reformed(recorded: Sequence[Batch], runs: Mapping[str, RunSpec], pending: Container[str]) -> list[Batch]:
    """Those of the recorded batches whose runs the grid has all, and of which any is still to be done."""
    batches: list[Batch] = []
    taken: set[str] = set()
    for batch in recorded:
        known = all(key in runs and key not in taken for key in batch.keys)
        if known and any(key in pending for key in batch.keys):
            # Keys know weights, not names: a backbone's folder may have been renamed since.
            batches.append(replace(batch, backbone=runs[batch.keys[0]].backbone))
            taken.update(batch.keys)
    return batches


def plan_batches(runs: Iterable[RunSpec], *, threads: int, budget: int) -> list[Batch]:
    """Batches of all ``runs``, backbone by backbone; ``threads`` and ``budget`` (bytes) are those of each batch.

    Raises UserError for a prompt that does not fit the text tower.
    """
    by_backbone: dict[Backbone, list[RunSpec]] = {}
    for run in runs:
        by_backbone.setdefault(run.model, []).append(run)
    batches: list[Batch] = []
    for backbone, mine in by_backbone.items():
        asked = {run.key: training_of(run) for run in mine}
        batches += _plain([run for run in mine if asked[run.key] is None], threads)
        training = {key: wanted for key, wanted in asked.items() if wanted is not None}
        batches += _cut(backbone, [run for run in mine if run.key in training], training, threads, budget)
    return batches


def in_order(batches: Iterable[Batch]) -> list[Batch]:
    """Batches in the order to begin them: a backbone at a time; first what learns nothing, then other plain runs,
    whose length nobody knows, then training, the longest first, so that short ones even out the end."""
    methods = list(METHODS)
    backbones: dict[str, int] = {}
    batches = list(batches)
    for batch in batches:
        backbones.setdefault(batch.backbone, len(backbones))

    def place(batch: Batch) -> tuple[Any, ...]:
        kind = 2 if batch.trains else int(METHODS[batch.method].learns)
        return (
            backbones[batch.backbone],
            kind,
            0 if batch.trains else methods.index(batch.method),
            -batch.cost,
        )

    return sorted(batches, key=place)


def _plain(runs: Sequence[RunSpec], threads: int) -> list[Batch]:
    """Runs that learn nothing dataset by dataset, since each takes no time; all others one by one."""
    groups: dict[tuple[str, ...], list[RunSpec]] = {}
    for run in runs:
        alone = (run.key,) if METHODS[run.method].learns else ()
        groups.setdefault((run.method, run.dataset, *alone), []).append(run)
    batches = []
    for (method, *_), group in groups.items():
        images = len(group[0].subset.train) if group[0].subset else 0
        cost = 0.5 + images / 200 if METHODS[method].learns else 0.1 * len(group)
        keys = tuple(run.key for run in group)
        batches.append(Batch(method, group[0].backbone, keys, threads, cost=cost))
    return batches


def _cut(
    backbone: Backbone,
    runs: Sequence[RunSpec],
    training: Mapping[str, Training],
    threads: int,
    budget: int,
) -> list[Batch]:
    """Runs side by side with those of their tree, the longest first, cut into batches."""
    from fastcoop.engine.trees import tree_key

    if not runs:
        return []
    trees = {key: tree_key(wanted.class_names, wanted.layout) for key, wanted in training.items()}
    rows = tree_rows(backbone, set(trees.values()))
    place = {tree: number for number, tree in enumerate(sorted(rows, key=repr))}
    text = backbone.text
    row_seconds = 4 * 12 * text.width**2 * len(text.blocks) / FLOPS
    costs = {key: rows[trees[key]] * wanted.steps * row_seconds for key, wanted in training.items()}
    room, share = room_rows(backbone, budget), sum(costs.values()) / SHARES
    batches: list[Batch] = []
    keys: list[str] = []
    method, tree, held, cost = "", None, 0, 0.0

    def close() -> None:
        if keys:
            batches.append(Batch(method, backbone.name, tuple(keys), threads, budget, cost))

    for run in sorted(
        runs, key=lambda r: (r.method, place[trees[r.key]], -training[r.key].steps, r.seed, r.key)
    ):
        key = run.key
        enough = held * FEW >= room
        more = held + rows[trees[key]]
        ends = enough and (trees[key] != tree or cost + costs[key] > share or more > ROOMS * room)
        if run.method != method or ends:
            close()
            keys, held, cost = [], 0, 0.0
        method, tree = run.method, trees[key]
        keys.append(key)
        held, cost = held + rows[tree], cost + costs[key]
    close()
    return batches


def tree_rows(backbone: Backbone, trees: Iterable[TreeKey]) -> dict[TreeKey, int]:
    """Rows that a run of each tree takes in the engine."""
    from fastcoop.prompts.layout import class_prompts
    from fastcoop.prompts.tree import build_tree

    rows = {}
    for tree in trees:
        names, layout = tree
        prompts = class_prompts(backbone.tokenizer, names, layout, backbone.text.context_length)
        rows[tree] = int(build_tree(prompts).live.sum())
    return rows


def room_rows(backbone: Backbone, budget: int) -> int:
    """About how many rows the engine trains at once in ``budget`` bytes."""
    from fastcoop.engine.fit import CPU_ROWS

    text = backbone.text
    kept = (
        len(text.blocks) * 12 * text.width * 4
    )  # a layer's residuals, q, k, v, hidden and scores, as float32
    fit = max(1, budget // kept)
    return min(CPU_ROWS, fit) if backbone.device.type == "cpu" else fit
