"""The fast schedule follows its formula (docs/fast.md), and each run as if it were alone; so do other objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.engine import PromptEncoder, Run, train
from fastcoop.engine.forest import Trees
from fastcoop.engine.objectives import CrossEntropy, Images, Objective, PullToPrompt
from fastcoop.engine.optimizers import inverse_root, newton_schulz
from fastcoop.engine.schedule import FastSchedule
from fastcoop.engine.training import WORTH_RECORDING, ActiveRun, Batch
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.engine.test_batch import HostWatch, OutOfMemoryAt
from tests.engine.test_company import company, wide  # noqa: F401 (a fixture)
from tests.engine.test_training import distance
from tests.pretend_gpu import pretend_gpu

PULL = 4.0


def plain_fast(backbone, run: Run, steps: int | None = None) -> Tensor:
    """The schedule by autograd and eigenvalues, one run."""
    encoder, s = PromptEncoder(backbone, run.class_names, run.layout), run.schedule
    contexts = run.contexts.double().clone()
    images = F.normalize(run.features.double(), dim=-1).flatten(0, 1)
    labels = run.labels.repeat_interleave(run.features.shape[1])
    width = contexts.shape[-1]
    momentum, statistics = torch.zeros_like(contexts), torch.zeros(width, width, dtype=torch.float64)
    for t in range(run.epochs if steps is None else steps):
        leaf = contexts.requires_grad_()
        texts = F.normalize(encoder(leaf), dim=-1)
        loss = F.cross_entropy(backbone.logit_scale * images @ texts.T, labels)
        if isinstance(run.objective, PullToPrompt):
            loss = loss + run.objective.weight * (texts - run.objective.reference).square().sum(1).mean()
        (grad,) = torch.autograd.grad(loss, leaf)
        contexts = contexts.detach()
        momentum = 0.8 * momentum + 0.2 * grad
        rows = grad.reshape(-1, width)
        statistics = 0.95 * statistics + 0.05 * rows.T @ rows
        if t < 4 or t % 4 == 0:
            mean = statistics / (1 - 0.95 ** (t + 1))
            values, vectors = torch.linalg.eigh(mean / mean.diagonal().mean())
            root = vectors @ torch.diag((values.clamp(min=0) + s.ridge) ** -0.5) @ vectors.T
        step = (momentum / (1 - 0.8 ** (t + 1))) @ root
        step = step * math.sqrt(step.numel()) / step.norm()
        contexts = contexts - s.learning_rate * (1 - t / run.epochs) * step
    return contexts


def fast(run: Run, epochs: int, pull: bool = False, **settings: float) -> Run:
    objective: Objective = CrossEntropy()
    if pull:
        draw = torch.Generator().manual_seed(run.seed)
        reference = torch.randn(
            len(run.class_names), run.features.shape[-1], generator=draw, dtype=torch.float64
        )
        objective = PullToPrompt(F.normalize(reference, dim=-1), PULL)
    return replace(run, epochs=epochs, objective=objective, schedule=FastSchedule(**settings))


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_a_training_ends_where_the_formula_ends(backbone, make_run, position, specific, pull):
    run = fast(make_run(PromptLayout(4, position, specific), images=70), 15, pull)
    other = fast(make_run(PromptLayout(2, "mid"), seed=3, images=11), 6, not pull, ridge=0.1)
    (trained, companion) = train(backbone, [run, other])
    assert distance(trained.contexts, plain_fast(backbone, run)) < 1e-9
    assert distance(companion.contexts, plain_fast(backbone, other)) < 1e-9
    assert distance(trained.contexts, run.contexts) > 0.05
    assert trained.losses.shape == (15,)
    assert trained.losses[-1] < trained.losses[0]


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_has_the_same_bits_alone_and_in_company(wide, number):  # noqa: F811
    torch.set_num_threads(number)
    runs = [fast(run, 3 + n % 4, pull=n % 2 == 0) for n, run in enumerate(company())]
    together = train(wide, [*company()[:2], *runs])[2:]
    chosen = (1, 2, 5, 7)
    one_by_one = dict(zip(chosen, train(wide, [runs[n] for n in chosen], memory_budget=1), strict=True))
    for n in chosen:
        (alone,) = train(wide, [runs[n]])
        assert distance(alone.contexts, runs[n].contexts) > 0.05
        for other in (together[n], one_by_one[n]):
            assert torch.equal(alone.contexts, other.contexts)
            assert (alone.losses == other.losses).all()
    torch.set_num_threads(1)


@pytest.mark.parametrize("numbers", [2000, 200])
def test_parts_of_the_loss_add_up_and_do_not_depend_on_companions(backbone32, make_run, monkeypatch, numbers):
    runs = [fast(make_run(seed=seed, images=30), 5, pull=True) for seed in range(3)]
    runs += [replace(run, objective=Smoothed(0.3 * n)) for n, run in enumerate(runs)]
    whole = train(backbone32, runs)
    monkeypatch.setattr("fastcoop.engine.fit.LOSS_NUMBERS", {True: numbers, False: numbers})
    cut = train(backbone32, runs)
    for run, a, b in zip(runs, whole, cut, strict=True):
        assert distance(a.contexts - run.contexts, b.contexts - run.contexts) < 1e-3
        assert torch.equal(train(backbone32, [run])[0].contexts, b.contexts)
        assert a.losses == pytest.approx(b.losses, rel=1e-3)
    assert not torch.equal(whole[0].contexts, cut[0].contexts)  # it was cut


def test_training_taken_up_at_any_step_ends_in_the_same_bits(backbone32, make_run):
    runs = [fast(make_run(seed=1, snapshots=(2, 6)), 6), make_run(seed=2)]
    runs.append(fast(make_run(PromptLayout(3, "end", True), seed=5), 8))
    states = []
    whole = train(backbone32, runs, on_step=lambda state: states.append(state()))
    assert {"statistics.0", "root.0", "momentum.0", "momentum.1"} <= states[2].keys()
    assert "statistics.1" not in states[2]
    for state in states:
        for ours, theirs in zip(train(backbone32, runs, state=state), whole, strict=True):
            assert torch.equal(ours.contexts, theirs.contexts)
            assert (ours.losses == theirs.losses).all()
            assert ours.snapshots.keys() == theirs.snapshots.keys()


@pytest.mark.parametrize("rate", [1e30, 3.0])
def test_a_diverging_run_stays_where_it_did_and_leaves_its_companions_alone(
    backbone32, make_run, monkeypatch, rate
):
    well, ill = fast(make_run(seed=2), 6), fast(make_run(seed=1), 6, learning_rate=rate)
    monkeypatch.setattr("fastcoop.engine.training.DIVERGED", 1.02)
    outcomes = []
    for every in (1, 1000):
        monkeypatch.setattr("fastcoop.engine.training.SYNC_EVERY", every)
        outcomes.append(train(backbone32, [ill, well]))
    for lost, other in outcomes:
        assert (lost.status, other.status) == ("diverged", "done")
        assert lost.contexts.numpy().tobytes() == outcomes[0][0].contexts.numpy().tobytes()
        assert torch.equal(other.contexts, train(backbone32, [well])[0].contexts)


def test_a_single_class_has_no_gradient_and_does_not_move(backbone32, make_run):
    run = fast(make_run(names=("cat",)), 5)
    (trained,) = train(backbone32, [run])
    assert trained.status == "done"
    assert torch.equal(trained.contexts, run.contexts.float())


def test_the_root_of_a_run_that_diverged_is_finite_and_changes_no_other():
    a, ridge = torch.eye(8, dtype=torch.float64), torch.full((2, 1, 1), 0.03, dtype=torch.float64)
    for value in (math.nan, math.inf):
        good, lost = inverse_root(torch.stack([a, a * value]), ridge, 0.03)
        assert torch.equal(good, inverse_root(a[None], ridge[:1], 0.03)[0])
        assert torch.equal(lost, a / 0.03**0.5)


@pytest.mark.parametrize(("width", "rank", "ridge"), [(24, 2, 0.03), (64, 200, 1e-3), (48, 1, 1.0)])
def test_newton_schulz_is_the_root_by_eigenvalues(width, rank, ridge):
    draw = torch.Generator().manual_seed(0)
    g = torch.randn(3, rank, width, generator=draw, dtype=torch.float64)
    a = g.transpose(1, 2) @ g * torch.tensor([1.0, 1e-12, 1e9], dtype=torch.float64)[:, None, None]
    ridges = torch.full((3, 1, 1), ridge, dtype=torch.float64)
    by_values = inverse_root(a, ridges, ridge)
    mean = a.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    m = a / mean + ridge * torch.eye(width, dtype=torch.float64)
    by_products = newton_schulz(m, ridge)
    for ours, theirs, matrix in zip(by_products, by_values, m, strict=True):
        assert distance(ours, theirs) < 1e-9
        assert torch.allclose(ours @ matrix @ ours, torch.eye(width, dtype=torch.float64), atol=1e-8)


@dataclass(frozen=True, eq=False)
class Smoothed(Objective):
    """As a user may write it: label smoothing, by autograd."""

    smoothing: float = 0.1

    def losses(self, texts: Tensor, images: Images) -> Tensor:
        log_p = torch.log_softmax(images.logits(texts), -1)
        right = log_p.gather(-1, images.targets)[..., 0]
        s = self.smoothing[:, None]  # type: ignore[index]
        return -(1 - s) * right - s * log_p.mean(-1)


@dataclass(frozen=True, eq=False)
class TwoParts(Smoothed):
    """Two gradients, of which the second counts half."""

    parts = 2

    def losses(self, texts: Tensor, images: Images) -> tuple[Tensor, Tensor]:
        first = super().losses(texts, images)
        return first, images.logits(texts).square().mean(-1)

    def penalty(self, texts: Tensor) -> Tensor:
        return 9 * texts[:, 0].square()[:, 0]

    def combine(self, grads):
        return grads[0] + 0.5 * grads[1]


def test_runs_of_several_objectives_and_schedules_train_together(backbone, make_run):
    """Smoothing of 0 is CoOp's own objective; two parts are one loss with the sum of both."""

    @dataclass(frozen=True, eq=False)
    class Added(Smoothed):
        def losses(self, texts, images):
            return super().losses(texts, images) + 0.5 * images.logits(texts).square().mean(-1)

        penalty = TwoParts.penalty

    def runs(*objectives):
        given = [make_run(seed=seed, images=images) for seed, images in enumerate((40, 20))]
        given.append(fast(make_run(PromptLayout(3, "mid"), seed=2), 6))
        return [replace(run, objective=one) for run, one in zip(given, objectives, strict=True)]

    plain = train(backbone, runs(CrossEntropy(), CrossEntropy(), CrossEntropy()))
    same = train(backbone, runs(Smoothed(0.0), CrossEntropy(), Smoothed(0.0)))
    for ours, theirs in zip(same, plain, strict=True):
        assert distance(ours.contexts, theirs.contexts) < 1e-12
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    mixed = runs(Smoothed(0.3), TwoParts(0.2), TwoParts(0.1))
    together, added = train(backbone, mixed), train(backbone, runs(Smoothed(0.3), Added(0.2), Added(0.1)))
    for run, ours, theirs, other in zip(mixed, together, added, plain, strict=True):
        assert distance(ours.contexts, theirs.contexts) < 1e-9
        assert distance(ours.contexts, train(backbone, [run])[0].contexts) < 1e-12
        assert distance(ours.contexts, other.contexts) > 1e-6

    class First(TwoParts):
        combine = Objective.combine

    class Only(Smoothed):
        penalty = TwoParts.penalty

    first, only = (train(backbone, runs(*[one(0.2)] * 3)) for one in (First, Only))
    for ours, theirs in zip(first, only, strict=True):
        assert distance(ours.contexts, theirs.contexts) < 1e-9
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)


def test_a_pull_to_text_features_of_another_length_is_refused(backbone):
    raw = backbone.encode_text(["a cat", "a dog"])
    with pytest.raises(
        UserError, match=r"a reference of length 1, as F.normalize\(h, dim=-1\) is, got lengths of"
    ):
        PullToPrompt(raw, 4.0)
    PullToPrompt(F.normalize(raw, dim=-1), 4.0)


def test_numpy_s_numbers_differ_from_run_to_run_too(backbone, make_run):
    run = make_run()
    pulled = [
        replace(run, objective=PullToPrompt(torch.eye(len(run.class_names), backbone.embed_dim), weight))
        for weight in np.float32([0.0, 30.0, 60.0])
    ]
    together = train(backbone, pulled)
    for ours, alone in zip(together, pulled, strict=True):
        assert distance(ours.contexts, train(backbone, [alone])[0].contexts) < 1e-9
    free, held, more = (one.losses[0] for one in together)
    assert more - held == pytest.approx(held - free)
    assert held - free > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "the learning_rate of a fast schedule to be a finite number above 0"),
        ({"ridge": 1e-9}, "the ridge of a fast schedule to be from 1e-06 to 1e"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FastSchedule(**settings)


def test_a_gpu_s_steps_are_recorded_and_end_where_the_cpu_s_end(backbone32, make_run):
    """By products in place of eigenvalues; the pretended GPU refuses to record what waits for the host."""
    runs = [
        fast(make_run(seed=1), 18, pull=True),
        fast(make_run(PromptLayout(3, "mid", True), seed=2), 20),
    ]
    runs.append(make_run(seed=3, epochs=WORTH_RECORDING))
    expected = train(backbone32, runs)
    with pretend_gpu():
        there = tiny_backbone(torch.float32)
        there.model.to("cuda")
        found = train(there, runs)
    for run, ours, theirs in zip(runs, found, expected, strict=True):
        assert ours.status == "done"
        assert distance(ours.contexts - run.contexts, theirs.contexts - run.contexts) < 1e-2
        assert distance(ours.contexts, run.contexts) > 1e-3


def test_a_fast_step_waits_for_nothing_and_is_whole_or_not_at_all(backbone, make_run):
    runs = [fast(make_run(seed=1), 6, pull=True), fast(make_run(PromptLayout(2, "mid", True), seed=2), 6)]
    trees = Trees(backbone)

    def batch_of(steps):
        active = [ActiveRun.start(n, run, torch.float64, trees.tower.device) for n, run in enumerate(runs)]
        batch = Batch(trees, active, backbone.logit_scale)
        for _ in range(steps):
            batch.step()
        return batch

    whole, counting = batch_of(2), batch_of(1)
    with HostWatch() as watch, OutOfMemoryAt(-1) as counted:
        counting.step()
    assert not set(watch.seen) - {"equal"}
    operations = -1 - counted.left
    for number in (operations // 2, *range(operations - 40, operations, 3)):
        batch = batch_of(1)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(number):
            batch.step()
        batch.step()
        assert torch.equal(batch.vectors, whole.vectors)
        for a, b in zip(batch.active, whole.active, strict=True):
            assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
