"""Batches: planned from the whole grid, trees alike together, recorded and formed again."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from fastcoop.grids import read_grid
from fastcoop.grids.planning import plan_runs
from fastcoop.methods import METHODS, RunSpec
from fastcoop.results.records import Batch
from fastcoop.results.store import open_store
from fastcoop.sweeps.batches import form_batches, in_order, plan_batches
from fastcoop.sweeps.loading import load_grid

BUDGET = 1 << 30


@pytest.fixture
def planned(world: Path, grid: dict[str, Any]) -> dict[str, RunSpec]:
    loaded = load_grid(read_grid(grid), world / "data", "cpu")
    return {run.key: run for run in plan_runs(loaded.runs())}


def test_every_run_is_in_one_batch_and_trees_alike_are_together(planned: dict[str, RunSpec]) -> None:
    batches = plan_batches(planned.values(), budget=BUDGET)
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted(planned)
    assert {batch.method for batch in batches if batch.trains} == {"coop"}
    for batch in batches:
        assert {planned[key].method for key in batch.keys} == {batch.method}
        if batch.method == "linear_probe":
            assert len(batch.keys) == 1
        if batch.trains:
            layouts = [
                repr(METHODS["coop"].run_shape(planned[key], planned[key].model).layout) for key in batch.keys
            ]
            changes = sum(a != b for a, b in pairwise(layouts))
            assert changes == len(set(layouts)) - 1, "a tree's runs lie side by side"


def test_the_plan_is_the_same_each_time_and_whatever_the_order(planned: dict[str, RunSpec]) -> None:
    once = plan_batches(planned.values(), budget=BUDGET)
    again = plan_batches(reversed(list(planned.values())), budget=BUDGET)
    trained = [[batch.keys for batch in batches if batch.trains] for batches in (once, again)]
    assert trained[0] == trained[1]


def test_batches_are_cut_so_that_workers_end_together(planned: dict[str, RunSpec]) -> None:
    whole = [batch for batch in plan_batches(planned.values(), budget=BUDGET) if batch.trains]
    assert len(whole) == 1, "small trees share a batch"
    # Where the room is small, so are batches: with room for a single row every tree's runs are cut.
    cut = [batch for batch in plan_batches(planned.values(), budget=1) if batch.trains]
    assert len(cut) > len(whole)
    assert sum(batch.cost for batch in cut) == pytest.approx(sum(batch.cost for batch in whole))


def test_a_gpu_gets_one_batch_of_each_precision_per_worker(
    world: Path, grid: dict[str, Any], planned: dict[str, RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"context_length": 2, "epochs": 3}
    methods = [{"coop": settings}, {"coop": settings | {"precision": "bfloat16"}}]
    loaded = load_grid(read_grid(grid | {"methods": methods}), world / "data", "cpu")
    runs = {run.key: run for run in plan_runs(loaded.runs())}

    def batches(workers: int) -> list[Batch]:
        return plan_batches(runs.values(), budget=1, gpu_workers=workers)

    def precisions(batch: Batch) -> set[str]:
        return {runs[key].settings.precision for key in batch.keys}

    assert sorted(map(precisions, batches(1)), key=str) == [{"bfloat16"}, {"float32"}]
    assert batches(2) == batches(1), "too few rows for two GPUs"
    monkeypatch.setattr("fastcoop.sweeps.batches.MIN_GPU_ROWS", 1)
    halves = batches(2)
    assert sorted(map(precisions, halves), key=str) == 2 * [{"bfloat16"}] + 2 * [{"float32"}]
    assert sorted(key for batch in halves for key in batch.keys) == sorted(runs)
    most = max(batch.cost / len(batch.keys) for batch in halves)
    assert abs(halves[0].cost - halves[1].cost) <= 2 * most
    monkeypatch.setattr("fastcoop.sweeps.batches.MAX_GPU_CONTEXTS", 4 * 2 * 16 + 1)
    assert {len(batch.keys) for batch in batches(1)} == {1}, "a checkpoint would hold too many contexts"

    # Batches that a CPU's sweep recorded train on as they were.
    recorded = [batch for batch in plan_batches(planned.values(), budget=1) if batch.trains]
    again = form_batches(planned, planned, recorded, budget=BUDGET, gpu_workers=1)
    assert {batch.keys for batch in again if batch.trains} == {batch.keys for batch in recorded}


def test_the_cheapest_results_of_every_dataset_come_first() -> None:
    runs: dict[str, RunSpec] = {}

    def batch(
        cost: float, method: str, *datasets: str, shots: tuple[int, ...] = (0,), backbone: str = "a"
    ) -> Batch:
        keys = []
        for dataset, number in product(datasets, shots):
            keys.append(f"{backbone} {method} {dataset} {number}")
            runs[keys[-1]] = RunSpec(method, METHODS[method].Settings(), backbone, dataset, number, 1)
        return Batch(method, backbone, tuple(keys), 1, 9 if method == "coop" else None, cost)

    expected = [
        batch(0.1, "zero_shot", "x"),
        batch(0.1, "zero_shot", "y"),
        batch(0.1, "zero_shot", "x", backbone="b"),  # a bad backbone shows at once
        # A short batch of each method and dataset.
        batch(0.6, "linear_probe", "x", shots=(1,)),
        batch(0.7, "linear_probe", "y", shots=(1,)),
        batch(20.0, "coop", "x", "y", shots=(1, 2)),
        # Others outside the engine by shots; then training, longest first.
        batch(0.9, "linear_probe", "x", shots=(2,)),
        batch(1.6, "linear_probe", "x", shots=(16,)),
        batch(9e9, "coop", "y", shots=(16,)),
        batch(300.0, "coop", "x", shots=(16,)),
        batch(40.0, "coop", "x", shots=(4,)),
        batch(70.0, "cocoop", "x", shots=(1,), backbone="b"),
        batch(500.0, "coop", "z", shots=(1,), backbone="b"),
    ]
    mixed = expected[::-1]
    mixed.sort(key=lambda one: one.backbone)
    assert in_order(mixed, runs)[2:] == expected[2:]
    assert {one.keys for one in in_order(mixed, runs)[:2]} == {one.keys for one in expected[:2]}


def test_order_changes_no_batch(planned: dict[str, RunSpec]) -> None:
    batches = plan_batches(planned.values(), budget=1)
    ordered = in_order(batches, planned)
    assert sorted(map(repr, ordered)) == sorted(map(repr, batches))
    assert ordered[0].method == "zero_shot"


def test_recorded_batches_are_formed_again_with_their_done_runs(
    planned: dict[str, RunSpec], tmp_path: Path
) -> None:
    first = [batch for batch in plan_batches(planned.values(), budget=1) if batch.trains]
    with open_store(tmp_path) as store:
        store.replace_batches([], first)
    with open_store(tmp_path) as store:
        recorded = store.batches()
    assert recorded == first
    left = {key: run for key, run in planned.items() if key == first[0].keys[-1]}
    assert form_batches(planned, left, recorded, budget=BUDGET) == [first[0]]
    # A grid that lacks one of its runs cannot form it; what is left is planned anew.
    narrowed = {key: run for key, run in planned.items() if key != first[0].keys[0]}
    (anew,) = form_batches(narrowed, left, recorded, budget=BUDGET)
    assert anew.keys == tuple(left)
    assert form_batches(planned, left, [first[0], first[0]], budget=BUDGET) == [first[0]]


def test_batches_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    whole = Batch("coop", "b", ("1", "2", "3"), 1, 10, 3.0)
    halves = [Batch("coop", "b", ("1",), 1, 5, 1.0, 1), Batch("coop", "b", ("2", "3"), 1, 5, 2.0, 1)]
    with open_store(tmp_path) as store:
        store.replace_batches([], [whole])
        store.replace_batches([whole], halves)
        assert store.batches() == halves
