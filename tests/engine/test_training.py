"""Training follows the official recipe, and each run as if it were alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastcoop.backbones.precision import warn_if_dtype_is_slow
from fastcoop.engine import Run, plan_training, train
from fastcoop.engine.fit import BatchBudget
from fastcoop.engine.objectives import CrossEntropy, Images, class_gradients
from fastcoop.engine.runs import draw_batches
from fastcoop.engine.schedule import learning_rates
from fastcoop.engine.tower import ForestPass
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.reference import reference_features


def plain_training(backbone, run: Run, epochs: list[torch.Tensor] | None = None) -> torch.Tensor:
    """The official recipe with torch's SGD and scheduler, one run, 77 tokens; ``epochs`` gets each one's contexts."""
    contexts = run.contexts.double().clone().requires_grad_()
    optimizer = torch.optim.SGD([contexts], lr=0.002, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs)
    images = F.normalize(run.features.double(), dim=-1).flatten(0, 1)
    views = run.features.shape[1]
    batches = iter(torch.as_tensor(draw_batches(run)))
    for epoch in range(run.epochs):
        if epoch == 0:
            rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 1e-5
        for _ in range(run.steps_per_epoch):
            rows = next(batches)
            rows = rows[rows >= 0]
            text = reference_features(
                backbone.model, backbone.tokenizer, run.class_names, contexts, run.layout.class_position
            )
            logits = backbone.logit_scale * images[rows] @ F.normalize(text, dim=-1).t()
            optimizer.zero_grad()
            F.cross_entropy(logits, run.labels[rows // views]).backward()
            optimizer.step()
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = rate
        else:
            cosine.step()
        if epochs is not None:
            epochs.append(contexts.detach().clone())
    return contexts.detach()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_learning_rates_are_the_official_ones():
    assert learning_rates(5) == pytest.approx([1e-5, 0.002, 0.00180902, 0.00130902, 0.00069098], abs=1e-8)


def test_a_hundred_epochs_end_where_the_plain_recipe_ends(backbone, make_run):
    run = make_run(epochs=100, images=20)
    assert run.steps == 100
    trained = train(backbone, [run])[0]
    expected = plain_training(backbone, run)
    assert distance(expected, run.contexts) > 0.1  # it moved
    assert distance(trained.contexts, expected) < 1e-9
    assert trained.status == "done"
    assert trained.losses[-1] < trained.losses[0]


def test_several_batches_an_epoch_follow_the_plain_recipe(backbone, make_run):
    run = make_run(PromptLayout(3, "mid", True), images=70, epochs=4, seed=3)
    assert (run.steps_per_epoch, run.steps) == (2, 8)
    assert distance(train(backbone, [run])[0].contexts, plain_training(backbone, run)) < 1e-9


def test_contexts_after_every_epoch_are_the_plain_recipe_s(backbone, make_run):
    run = make_run(PromptLayout(3, "end", True), images=40, epochs=7, snapshots=range(1, 8), batch_size=16)
    assert run.steps == 14
    plain: list[torch.Tensor] = []
    plain_training(backbone, run, plain)
    kept = train(backbone, [make_run(epochs=9), run])[1].snapshots
    assert list(kept) == list(range(1, 8))
    for epoch, expected in enumerate(plain, 1):
        assert distance(kept[epoch], expected) < 1e-9


@pytest.mark.parametrize(("images", "seed"), [(1, 0), (3, 12), (6, 1), (6, 7)])
def test_batches_of_one_follow_the_plain_recipe(backbone, make_run, images, seed):
    """Their losses jump from image to image; a jump is no divergence."""
    run, states = make_run(images=images, batch_size=1, epochs=8, seed=seed), []
    (trained,) = train(backbone, [run], on_step=lambda state: states.append(state()))
    assert trained.status == "done"
    for state in states[::7]:
        assert torch.equal(train(backbone, [run], state=state)[0].contexts, trained.contexts)
    assert distance(trained.contexts, plain_training(backbone, run)) < 1e-9


@pytest.mark.parametrize(
    "run",
    [
        {"views": 1},
        {"epochs": 1},
        {"images": 33},
        {"layout": PromptLayout(1), "names": ("cat",)},
        {"layout": PromptLayout(1, "mid", True)},
        {"layout": PromptLayout(2, "front", True), "names": ("dog", "cat", "dog")},
    ],
    ids=str,
)
def test_runs_at_the_edge_follow_the_plain_recipe_beside_others(backbone, make_run, run):
    edge = make_run(**run)
    trained = train(backbone, [make_run(seed=5), edge])[1]
    assert distance(trained.contexts, plain_training(backbone, edge)) < 1e-9


def various_runs(make_run, epochs):
    return [
        make_run(PromptLayout(4), epochs=epochs, seed=1),
        make_run(PromptLayout(4), epochs=max(epochs // 2, 1), seed=2, images=40),
        make_run(PromptLayout(7, "mid", True), epochs=epochs, seed=3),
        make_run(PromptLayout(2, "front"), names=("one", "two two"), epochs=max(epochs // 3, 1), seed=4),
    ]


@pytest.mark.parametrize("most", [None, 2, 1])
def test_runs_do_not_depend_on_their_companions(backbone, make_run, monkeypatch, most):
    """All together; two at a time, the others joining as runs leave; one after another."""
    runs, together_at_most = various_runs(make_run, 100), []
    try_add, forward = BatchBudget.try_add, ForestPass.forward
    if most is not None:
        monkeypatch.setattr(
            BatchBudget, "try_add", lambda self, cost: self.runs < most and try_add(self, cost)
        )

    def watched(self, vectors, workspace):
        together_at_most.append(sum(group.runs for group in self.forest.groups))
        return forward(self, vectors, workspace)

    monkeypatch.setattr(ForestPass, "forward", watched)
    together = train(backbone, runs)
    assert max(together_at_most) == (most or len(runs))
    for run, trained in zip(runs, together, strict=True):
        assert distance(trained.contexts, train(backbone, [run])[0].contexts) < 1e-9


def test_one_float32_step_does_not_depend_on_companions(backbone32, make_run):
    """Contexts hardly move in a step, so its momentum, which is its gradient, is compared as well."""
    runs = [
        make_run(run.layout, run.class_names, seed=run.seed, epochs=2) for run in various_runs(make_run, 1)
    ]

    def after_one_step(runs):
        states = []
        train(backbone32, runs, on_step=lambda state: states.append(state()))
        return states[0]

    together = after_one_step(runs)
    for n, run in enumerate(runs):
        alone = after_one_step([run])
        assert distance(together[f"contexts.{n}"], alone["contexts.0"]) < 1e-6
        assert distance(together[f"momentum.{n}"], alone["momentum.0"]) < 1e-6
        assert float(alone["momentum.0"].norm()) > 0


def test_the_same_batch_again_is_bit_identical(backbone32, make_run):
    runs = various_runs(make_run, 10)
    for first, second in zip(train(backbone32, runs), train(backbone32, runs), strict=True):
        assert torch.equal(first.contexts, second.contexts)
        assert np.array_equal(first.losses, second.losses)


def test_training_taken_up_at_any_step_ends_in_the_same_bits(backbone32, make_run):
    runs = [*various_runs(make_run, 6), make_run(epochs=8, seed=9, learning_rate=math.inf)]
    states, ended = [], []
    starts = [run.contexts.clone() for run in runs]
    whole = train(backbone32, runs, on_step=lambda state: states.append(state()))
    assert len(states) == 6  # the longest, but for what diverged
    for state in states:
        resumed = train(backbone32, runs, state=state, on_done=lambda n, trained: ended.append(n))
        for ours, theirs in zip(resumed, whole, strict=True):
            assert ours.contexts.numpy().tobytes() == theirs.contexts.numpy().tobytes()
            np.testing.assert_array_equal(ours.losses, theirs.losses)
            assert (ours.status, ours.diverged_at) == (theirs.status, theirs.diverged_at)
    assert sorted(ended) == sorted([*range(5)] * 6)
    assert all(torch.equal(run.contexts, start) for run, start in zip(runs, starts, strict=True))


def test_the_seed_orders_the_batches_and_snapshots_are_kept(backbone, make_run):
    drawn = make_run(epochs=5, images=40, batch_size=16, snapshots=(1, 5))
    redrawn = replace(drawn, seed=77)
    one, other = train(backbone, [drawn, redrawn])
    assert distance(other.contexts, plain_training(backbone, redrawn)) < 1e-9
    assert distance(other.contexts, one.contexts) > 1e-5
    assert set(one.snapshots) == {1, 5}
    assert torch.equal(one.snapshots[5], one.contexts)
    assert 0 < distance(one.snapshots[1], drawn.contexts) < distance(one.contexts, drawn.contexts)


def test_batches_visit_every_image_once_an_epoch_and_drop_the_short_rest(make_run):
    small = draw_batches(make_run(images=20, epochs=3))
    assert small.shape == (3, 32)
    for row in small:
        assert sorted(row[row >= 0] // 3) == list(range(20))
    large = draw_batches(make_run(images=70, epochs=2))
    assert large.shape == (4, 32)
    assert len(set(large[:2].ravel() // 3)) == 64
    assert len(set(large.ravel() % 3)) == 3


def test_loss_and_gradient_are_cross_entropys():
    torch.manual_seed(0)
    features = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    images = F.normalize(torch.randn(2, 4, 8, dtype=torch.float64), dim=-1)
    labels = torch.tensor([[0, 4, 2, -1], [1, 1, 3, 0]])
    weights = torch.tensor([[1, 1, 1, 0], [0.75] * 4], dtype=torch.float64) / 3
    given = [(slice(0, 2), Images(images, labels, weights, 30.0))]
    losses, (grad,) = class_gradients(CrossEntropy(), features.detach(), given)
    logits = 30.0 * images @ F.normalize(features, dim=-1).transpose(1, 2)
    expected = torch.stack(
        [F.cross_entropy(x, y, ignore_index=-1) for x, y in zip(logits, labels, strict=True)]
    )
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, features.grad, rtol=1e-10, atol=1e-14)


def test_a_diverging_run_is_marked_and_leaves_its_companions_alone(backbone, make_run):
    well = make_run(epochs=8, seed=1)
    ill = make_run(epochs=8, seed=2, learning_rate=math.inf)
    alone = train(backbone, [well])[0]
    together = train(backbone, [well, ill])
    assert (
        torch.equal(together[0].contexts, alone.contexts)
        or distance(together[0].contexts, alone.contexts) < 1e-12
    )
    assert together[1].status == "diverged"
    assert together[1].diverged_at == 2  # the second step moved the contexts to infinity, the third saw it


def test_a_run_seen_late_to_have_diverged_ends_where_it_did(backbone32, make_run, monkeypatch):
    runs = [
        make_run(epochs=40, seed=1),
        make_run(epochs=40, seed=2, learning_rate=math.inf, snapshots=(1, 2, 3, 30)),
        make_run(epochs=40, seed=3, learning_rate=-30.0),
    ]
    monkeypatch.setattr("fastcoop.engine.training.DIVERGED", 1.2)
    outcomes = []
    for every in (1, 16, 1000):
        monkeypatch.setattr("fastcoop.engine.training.SYNC_EVERY", every)
        outcomes.append(train(backbone32, runs))
    at_once = outcomes[0]
    assert [trained.status for trained in at_once] == ["done", "diverged", "diverged"]
    assert set(at_once[1].snapshots) == set(range(1, at_once[1].diverged_at + 1))
    for late in outcomes[1:]:
        for a, b in zip(late, at_once, strict=True):
            assert (a.status, a.diverged_at, len(a.losses)) == (b.status, b.diverged_at, len(b.losses))
            assert set(a.snapshots) == set(b.snapshots)
        assert distance(late[0].contexts, at_once[0].contexts) < 1e-5
        np.testing.assert_array_equal(late[1].contexts.numpy(), at_once[1].contexts.numpy())
        assert distance(late[2].contexts, at_once[2].contexts) < 1e-5


def test_a_prompt_that_does_not_fit_is_refused_before_any_run_trains(backbone, make_run):
    steps: list[object] = []
    long = make_run(names=("cat", " ".join(["word"] * 80)))
    with pytest.raises(UserError, match=r'class "word word.*" has 87 tokens'):
        train(backbone, [make_run(), long], on_step=steps.append)
    assert not steps


def test_progress_adds_up_and_each_run_is_reported_once(backbone, make_run):
    runs = various_runs(make_run, 6)
    done, progress = [], []
    train(backbone, runs, on_done=lambda n, trained: done.append(n), on_progress=progress.append)
    assert sorted(done) == [0, 1, 2, 3]
    plan = plan_training(backbone, [run.shape for run in runs])
    assert sum(progress) == pytest.approx(sum(cost.row_steps for cost in plan.runs))


def test_unusable_runs_are_refused(make_run):
    good = make_run()
    with pytest.raises(UserError, match="Expected labels from 0 to 3, got 1 to 4"):
        Run(good.class_names, good.layout, good.contexts, good.features, good.labels + 1, 1, 0)
    for labels in (good.labels[:, None], good.labels.float(), good.labels[:-1]):
        with pytest.raises(UserError, match="integer label per image"):
            replace(good, labels=labels)
    with pytest.raises(UserError, match="batch_size of a run to be a whole number from 1 to 65536, got 0"):
        replace(good, batch_size=0)
    for epoch in (0, 7):
        with pytest.raises(UserError, match=rf"epochs 1 to 6, got \[{epoch}\]"):
            replace(good, snapshots=(epoch,))
    with pytest.raises(UserError, match="at least one image"):
        Run(good.class_names, good.layout, good.contexts, good.features[:0], good.labels[:0], 1, 0)
    with pytest.raises(UserError, match=r"contexts of shape \(4, 32\), got \(2, 32\)"):
        Run(good.class_names, good.layout, good.contexts[:2], good.features, good.labels, 1, 0)


def test_runs_of_another_backbone_s_sizes_are_refused(backbone, make_run):
    good = make_run()
    for change in ({"features": torch.randn(20, 3, 25)}, {"contexts": torch.randn(4, 33)}):
        with pytest.raises(UserError, match="vectors of 32 numbers and features of 24"):
            train(backbone, [good, replace(good, **change)])


@pytest.mark.parametrize("supported", [False, True])
def test_a_half_precision_without_instructions_for_it_is_spoken_of_once(
    backbone32, make_run, monkeypatch, caplog, supported
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    warn_if_dtype_is_slow.cache_clear()
    for precision in (None, torch.bfloat16, torch.bfloat16):
        train(backbone32, [make_run(epochs=1)], precision=precision)
    assert caplog.text.count("no instructions for bfloat16") == (not supported)
    assert not warn_if_dtype_is_slow(torch.bfloat16, "cuda")
    warn_if_dtype_is_slow.cache_clear()


def test_bfloat16_is_close_and_keeps_contexts_in_float32(backbone32, make_run):
    runs = [make_run(epochs=20), make_run(PromptLayout(4, "mid", True), epochs=20, seed=1)]
    exact = train(backbone32, runs)
    rounded = train(backbone32, runs, precision=torch.bfloat16)
    for a, b, run in zip(rounded, exact, runs, strict=True):
        assert a.contexts.dtype == torch.float32
        assert 0 < distance(a.contexts, b.contexts) < 0.02
        assert distance(a.contexts, run.contexts) > 5 * distance(a.contexts, b.contexts)
