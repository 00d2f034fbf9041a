"""The plan's rows, operations, bytes and stages are those of training."""

from __future__ import annotations

import weakref

import pytest
import torch

from fastcoop.engine import train
from fastcoop.engine.fit import LOSS_NUMBERS, BatchBudget, RunShape, loss_parts, plan_training
from fastcoop.engine.forest import Buffer, Forest, Trees, Workspace
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.training import Batch
from fastcoop.prompts import PromptLayout

NAMES = tuple(
    f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("cat", "dog house", "owl")
)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_the_estimate_covers_what_a_pass_holds(backbone, position, class_specific):
    trees, runs = Trees(backbone), 8
    layout = trees[NAMES, PromptLayout(16, position, class_specific)]
    forest_pass, workspace = ForestPass(Forest(trees.tower, [(layout, runs)])), Workspace(trees.tower)
    forest_pass.forward(torch.zeros(runs * layout.vectors, 32), workspace)
    forest_pass.backward(torch.zeros(runs * len(NAMES), 24), workspace)
    cost = plan_training(backbone, [RunShape(NAMES, PromptLayout(16, position, class_specific), 1)]).runs[0]
    estimate = runs * cost.tree.activation_bytes
    assert (cost.tree.rows, cost.tree.nodes) == (layout.rows, layout.tree.nodes)
    assert 0.6 * estimate < workspace.nbytes < 1.2 * estimate


def test_training_says_so_where_the_estimate_was_off(backbone32, make_run, monkeypatch, caplog):
    runs = [make_run(epochs=2, seed=seed) for seed in range(4)]
    with caplog.at_level("DEBUG", "fastcoop"):
        train(backbone32, runs)
    assert "4 runs take" in caplog.text
    assert "more than estimated" not in caplog.text
    ten = property(lambda self: 10, lambda self, value: None)
    monkeypatch.setattr(BatchBudget, "activation_bytes", ten, raising=False)
    train(backbone32, runs)
    assert "more than estimated; a smaller memory budget is safer" in caplog.text


def test_memory_of_an_earlier_forest_is_freed_before_the_next_one_is_built(backbone32, make_run, monkeypatch):
    build, workspaces = Batch.__init__, []

    def watched(self, *given):
        assert all(earlier() is None for earlier in workspaces)
        build(self, *given)
        workspaces.append(weakref.ref(self.workspace))

    monkeypatch.setattr(Batch, "__init__", watched)
    train(backbone32, [make_run(epochs=epochs) for epochs in (2, 4, 5)])
    assert len(workspaces) == 3


def test_a_buffer_is_one_memory_also_after_it_grew():
    buffer = Buffer(torch.float32, torch.device("cpu"))
    small = buffer(2, 3)
    assert buffer(2, 3).data_ptr() == small.data_ptr()
    assert buffer.memory.nbytes == 6 * 4
    large = buffer(4, 3)
    assert buffer(2, 3).data_ptr() == large.data_ptr() != small.data_ptr()
    assert buffer.memory.nbytes == 12 * 4


def shapes(*, images: int = 0, features: object = None) -> list[RunShape]:
    lengths = ((4, 5), (4, 5), (4, 2), (2, 3), (2, 3), (2, 1), (2, 1))
    return [
        RunShape(NAMES, PromptLayout(length), steps, images=images, views=2, features=features)
        for length, steps in lengths
    ]


def test_runs_fit_up_to_the_budget_and_never_fewer_than_one(backbone):
    plan = plan_training(backbone, shapes(), memory_budget=1)
    tight = BatchBudget(plan)
    assert tight.try_add(plan.runs[0])
    assert not tight.try_add(plan.runs[1])
    assert not tight.shrink()
    plan = plan_training(backbone, shapes(), memory_budget=plan.bytes_of([0, 0, 0]))
    budget = BatchBudget(plan)
    assert [budget.try_add(plan.runs[0]) for _ in range(4)] == [True, True, True, False]
    assert budget.bytes == plan.bytes_of([0, 0, 0])
    assert budget.shrink()
    budget.clear()
    assert [budget.try_add(plan.runs[0]) for _ in range(2)] == [True, False]


def test_features_are_counted_once_where_runs_share_them(backbone):
    plan = plan_training(backbone, [*shapes(images=9, features=1), *shapes(images=9)])
    size = plan.runs[0].feature_bytes
    assert size >= 9 * 2 * 24 * 8
    shared, own = plan.bytes_of([0, 1, 2]), plan.bytes_of([7, 8, 9])
    assert own - shared == 2 * size


@pytest.mark.parametrize("fits", [0, 2, 3, 100])
def test_the_first_batch_and_all_work_are_those_of_training(backbone32, make_run, fits):
    runs = []
    for seed, shape in enumerate(shapes()):
        runs.append(make_run(shape.layout, NAMES, epochs=shape.steps, seed=seed, views=1))
    largest = plan_training(backbone32, [run.shape for run in runs])
    budget = max(1, largest.bytes_of([*range(len(runs))][:fits]) if fits else 1)
    seen: list[float] = []
    train(backbone32, runs, memory_budget=budget, on_progress=seen.append)
    plan = plan_training(backbone32, [run.shape for run in runs], memory_budget=budget)
    first = plan.first_batch()
    assert len(first) == (min(fits, len(runs)) or 1)
    assert seen[0] == sum(plan.runs[n].tree.rows for n in first)
    assert sum(seen) == sum(run.row_steps for run in plan.runs)


def test_a_plan_of_many_runs_adds_up(backbone):
    plan = plan_training(backbone, shapes() * 200)
    assert len({id(cost.tree) for cost in plan.runs}) == 2
    assert plan.flops == pytest.approx(sum(cost.flops for cost in plan.runs))
    assert sorted(plan.order()) == list(range(200 * 7))


def test_a_fast_run_s_loss_and_matrices_are_counted(backbone32):
    """Every image in each step, in parts of the loss of one size at most, however many runs."""

    def cost(images: int, **options):
        shape = RunShape(NAMES, PromptLayout(4), 10, images, 8, images * 8, is_fast=True, **options)
        return plan_training(backbone32, [shape] * 3)

    small, large = cost(10), cost(10**6)
    products = 2 * 2 * 80 * len(NAMES) * 24 + 2 * 2 * 4 * 32 * 32  # logits and gradients; covariance and root
    assert small.runs[0].step_flops - small.runs[0].tree.flops == products
    assert small.runs[0].flops == 10 * small.runs[0].step_flops
    limit = large.max_loss_bytes
    assert small.runs[0].loss_bytes == 80 * (4 * len(NAMES) + 2 * 24) * 4 < limit == large.runs[0].loss_bytes
    for plan in (small, large):
        one, two = plan.bytes_of([0]), plan.bytes_of([0, 1])
        more = plan.runs[0].tree.activation_bytes + plan.runs[0].state_bytes + plan.runs[0].feature_bytes
        assert two - one == more + (plan.runs[0].loss_bytes if plan is small else 0)
    assert small.runs[0].state_bytes > 4 * 8 * 32 * 32  # statistics and root, and those of the next step


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (1000, 10), (128_000, 1000), (10**6, 20_000)])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_parts_of_a_loss_are_as_large_as_the_limit_allows(images, classes, on_cpu):
    rows, runs = loss_parts(images, classes, 512, on_cpu)
    per_row = 4 * classes + 2 * 512
    assert rows * runs * per_row <= LOSS_NUMBERS[on_cpu]
    assert rows == images or 2 * rows * per_row > LOSS_NUMBERS[on_cpu]
