"""CoCoOp and TCP against their formulas written plainly: the model's own blocks, autograd and torch's optimizers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

import fastcoop as fc
from fastcoop.backbones import Backbone
from fastcoop.datasets import FewShot
from fastcoop.engine.encoder import ROWS_AT_ONCE
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec, prompt_nets
from fastcoop.methods.cocoop import CoCoOpMethod
from fastcoop.prompts import PromptLayout, initial_contexts
from fastcoop.sweeps.records import recorded_settings
from tests.advice import follows
from tests.methods.conftest import DIM, job, make_data, run
from tests.methods.test_class_tokens import plain_features
from tests.reference import reference_features

QUICK: dict[str, dict[str, Any]] = {
    "cocoop": {"epochs": 3, "learning_rate": 0.1, "reduction": 4, "batch_size": 2},
    "tcp": {"epochs": 4, "layer": 1, "lmbda": 3.0, "batch_size": 4},
}
NET = ("meta_net.linear1.weight", "meta_net.linear1.bias", "meta_net.linear2.weight", "meta_net.linear2.bias")


def meta_net(p: dict[str, Tensor], x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    w1, b1, w2, b2 = (p[name] for name in NET)
    return linear(activation(linear(x, w1, b1)), w2, b2)


def plain_cocoop(
    backbone: Backbone, one: RunSpec, p: dict[str, Tensor], images: Tensor
) -> tuple[Tensor, float]:
    contexts = p["ctx"] + meta_net(p, images, torch.relu)[:, None]
    rows = []
    for image, context in zip(images, contexts, strict=True):
        texts = reference_features(backbone.model, backbone.tokenizer, one.data.class_names, context, "end")
        rows.append(backbone.logit_scale * normalize(texts, dim=-1) @ image)
    return torch.stack(rows), 0.0


def plain_tcp(backbone: Backbone, one: RunSpec, p: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Any]:
    names, settings = one.data.class_names, one.settings
    with torch.no_grad():
        texts = normalize(
            backbone.model.encode_text(backbone.tokenizer([f"a photo of a {n}." for n in names])), dim=-1
        )
    tokens = meta_net(p, texts, lambda x: x * torch.sigmoid(1.702 * x)).view(len(names), 4, -1)
    learned = plain_features(
        backbone.model, backbone.tokenizer, names, "X X X X {}.", p["ctx"], tokens, settings.layer
    )
    learned = normalize(learned, dim=-1)
    return backbone.logit_scale * images @ learned.T, settings.lmbda * (1 - (learned * texts).sum(1).mean())


PLAIN: dict[str, Any] = {"cocoop": plain_cocoop, "tcp": plain_tcp}


def plain_training(backbone: Backbone, one: RunSpec, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The method's SGD or Adam over the run's batches, with the rate of each epoch written out."""
    settings, (features, labels) = one.settings, map(torch.from_numpy, one.data.train_views(one.subset))
    p = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(p.values(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    if one.method == "tcp":
        optimizer = torch.optim.Adam(p.values(), lr=1.0, eps=1e-3, weight_decay=5e-4)
    images, views, size = len(labels), features.shape[1], settings.batch_size
    steps, draw = max(1, images // size), np.random.default_rng(one.seed)
    for epoch in range(settings.epochs):
        cosine = 0.5 * settings.learning_rate * (1 + np.cos(np.pi * (epoch - 1) / settings.epochs))
        optimizer.param_groups[0]["lr"] = 1e-5 if epoch == 0 else cosine
        order, view = draw.permutation(images), draw.integers(views, size=images)
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            rows, chosen = order[part], view[: steps * min(size, images)][part]
            batch = normalize(features[rows, chosen], dim=-1)
            logits, more = PLAIN[one.method](backbone, one, p, batch)
            optimizer.zero_grad()
            (cross_entropy(logits, labels[rows]) + more).backward()
            optimizer.step()
    return {name: value.detach() for name, value in p.items()}


def classifier(backbone: Backbone, one: RunSpec, outcome: Outcome, data: Data) -> Any:
    return METHODS[one.method].classifier(backbone, replace(one, weights=outcome.weights), data)


@pytest.mark.parametrize("name", QUICK)
def test_training_is_the_formula(backbone: Backbone, data: Data, name: str) -> None:
    one = job(data, name, shots=2, **QUICK[name])
    (outcome,) = run(backbone, name, [one])
    contexts = initial_contexts(
        backbone, PromptLayout(4), len(data.class_names), one.seed, one.settings.words
    )
    with torch.random.fork_rng():
        torch.manual_seed(one.seed)
        start = METHODS[name].new_net(backbone, one.settings, contexts).state_dict()
    expected = plain_training(backbone, one, start)
    assert expected.keys() == outcome.weights.keys()
    for key, value in expected.items():
        moved = (value - start[key]).norm()
        assert moved > 1e-3
        assert (torch.from_numpy(outcome.weights[key]) - value).norm() < 1e-4 * moved, key
    images = torch.from_numpy(data.unit_test)
    with torch.no_grad():
        logits, _ = PLAIN[name](
            backbone, one, {k: torch.from_numpy(v) for k, v in outcome.weights.items()}, images
        )
    np.testing.assert_allclose(
        classifier(backbone, one, outcome, data).logits(data.unit_test), logits, atol=2e-3
    )


@pytest.mark.parametrize("name", QUICK)
def test_runs_train_together_and_resume_each_with_the_bits_that_it_has_alone(
    backbone: Backbone, data: Data, name: str
) -> None:
    """Of other seeds, shots, lengths and batch sizes, and of two lists of classes; from a state in which one ended."""
    more = make_data(("pug", "maine coon"), name="pets", seed=4)
    runs = [
        job(data, name, seed=1, **QUICK[name]),
        job(data, name, seed=2, shots=4, **QUICK[name] | {"epochs": 1}),
        job(data, name, seed=3, shots=4, **QUICK[name] | {"batch_size": 3}),
        job(more, name, seed=1, **QUICK[name]),
    ]
    states: list[Any] = []

    class Kept:
        def load(self) -> Any:
            return states[3] if states else None

        def offer(self, get_state: Callable[[], Any]) -> None:
            states.append(get_state())

    found: list[dict[int, Outcome]] = [{}, {}]
    for outcomes in found:
        METHODS[name].run(backbone, runs, outcomes.__setitem__, RunContext(checkpoint=Kept()))
    assert "step.1" in states[3]
    assert "step.3" not in states[3]
    for index, one in enumerate(runs):
        (alone,) = run(backbone, name, [one])
        for outcomes in found:
            assert (outcomes[index].losses == alone.losses).all()
            for key, array in alone.weights.items():
                assert (outcomes[index].weights[key] == array).all(), key


@pytest.mark.parametrize(("name", "own"), [("cocoop", 2), ("tcp", 1)])
def test_the_memory_budget_limits_the_runs_of_a_forest_and_changes_no_bits(
    backbone: Backbone, data: Data, monkeypatch: pytest.MonkeyPatch, name: str, own: int
) -> None:
    """``own``: sets of prompts in a step of one run."""
    found, sizes = list[list[Outcome]](), list[int]()

    def counted(encoder: Any, inputs: Any, room: int) -> Any:
        step(Counting(encoder), inputs, room)

    class Counting:
        def __init__(self, encoder: Any):
            self.encoder, self.runs_at_once = encoder, encoder.runs_at_once

        def __call__(self, *given: Tensor) -> Tensor:
            sizes.append(len(given[0]))
            return self.encoder(*given)

    step = prompt_nets._step
    monkeypatch.setattr(prompt_nets, "_step", counted)
    for budget, most in ((None, 3 * own), (1, own)):
        outcomes: dict[int, Outcome] = {}
        runs = [job(data, name, seed=seed, **QUICK[name]) for seed in (1, 2, 3)]
        METHODS[name].run(backbone, runs, outcomes.__setitem__, RunContext(memory_budget=budget))
        assert set(sizes) == {most}
        sizes.clear()
        found.append([outcomes[n] for n in range(3)])
    for one, other in zip(*found, strict=True):
        assert all((one.weights[key] == array).all() for key, array in other.weights.items())


@pytest.mark.parametrize("name", QUICK)
def test_what_is_learned_does_not_depend_on_the_callers_settings_of_torch(
    backbone: Backbone, data: Data, name: str
) -> None:
    one = job(data, name, **QUICK[name])
    (plain,), found = run(backbone, name, [one]), []
    with torch.inference_mode():
        found += run(backbone, name, [one])
    torch.set_default_dtype(torch.float64)
    try:
        found += run(backbone, name, [one])
    finally:
        torch.set_default_dtype(torch.float32)
    for outcome in found:
        assert all((outcome.weights[key] == array).all() for key, array in plain.weights.items())


def test_a_run_that_trains_together_has_the_time_of_its_own_test_and_of_no_other(
    backbone: Backbone, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, scores_of = iter(range(1000)), CoCoOpMethod.scores_of
    passed = [0.0]

    def slow(*arguments: Any) -> Any:
        passed[0] += 1e6
        return scores_of(*arguments)

    monkeypatch.setattr(CoCoOpMethod, "scores_of", slow)
    monkeypatch.setattr("fastcoop.methods.training.time.perf_counter", lambda: passed[0] + next(clock))
    runs = [job(data, "cocoop", seed=seed, **QUICK["cocoop"] | {"epochs": seed}) for seed in (1, 2)]
    outcomes = run(backbone, "cocoop", runs)
    assert [round(outcome.seconds / 1e6, 2) for outcome in outcomes] == [1, 1]
    (later,) = run(backbone, "cocoop", [replace(runs[0], weights=outcomes[0].weights)])
    assert later.seconds == 0


@pytest.mark.parametrize("name", QUICK)
def test_learned_weights_are_tested_later_and_elsewhere(backbone: Backbone, data: Data, name: str) -> None:
    new = make_data(("pug", "maine coon"), name="pets", seed=4)
    one = job(data, name, targets=(new,), **QUICK[name])
    (outcome,) = run(backbone, name, [one])
    assert set(outcome.scores) == {"animals", "pets"}
    (later,) = run(backbone, name, [replace(one, weights=outcome.weights)])
    assert (later.scores["pets"].predictions == outcome.scores["pets"].predictions).all()
    assert later.scores["pets"].confidence.tolist() == outcome.scores["pets"].confidence.tolist()


@pytest.mark.parametrize("name", QUICK)
def test_test_images_and_labels_change_nothing_that_is_learned(backbone: Backbone, name: str) -> None:
    (one,) = run(backbone, name, [job(make_data(), name, **QUICK[name])])
    other = make_data()
    other.store._labels["test"] = other.store._labels["test"][::-1].copy()
    other.store._features["test"] += 1.0
    (two,) = run(backbone, name, [job(other, name, **QUICK[name])])
    assert all((one.weights[key] == two.weights[key]).all() for key in one.weights)
    assert (one.losses == two.losses).all()


@pytest.mark.parametrize("name", QUICK)
def test_each_setting_changes_what_is_learned(backbone: Backbone, data: Data, name: str) -> None:
    more: dict[str, Any] = {
        "init": "the photo of",
        "reduction": 2,
        "batch_size": 3,
        "epochs": 2,
        "learning_rate": 0.01,
    }
    if name == "tcp":
        more |= {"lmbda": 0.0, "layer": 2, "template": "a drawing of a {}.", "context_length": 3}
    settings = [QUICK[name], *(QUICK[name] | {key: value} for key, value in more.items())]
    outcomes = run(backbone, name, [job(data, name, **given) for given in settings])
    logits = [classifier(backbone, job(data, name, **given), outcome, data).logits(data.unit_test)
              for given, outcome in zip(settings, outcomes, strict=True)]  # fmt: skip
    for key, changed in zip(more, logits[1:], strict=True):
        assert np.abs(changed - logits[0]).max() > 1e-3, key


def test_tcp_depends_on_the_words_behind_the_class_name(backbone: Backbone, data: Data) -> None:
    def behind(words: str) -> Data:
        return Data(replace(data.dataset, template=f"a photo of a {{}}{words}."), data.store, data.views)

    datas = [behind(words) for words in ("", ", a type of pet")]
    jobs = [job(one, "tcp", template="a photo of a {}.", **QUICK["tcp"]) for one in datas]
    (outcome,) = run(backbone, "tcp", jobs[:1])
    logits = [classifier(backbone, one, outcome, one.data).logits(data.unit_test) for one in jobs]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    prompts = [METHODS["tcp"].prompts(one.settings, one.data) for one in jobs]
    assert prompts[0] != prompts[1]
    planned = replace(jobs[1], data=Data(datas[1].dataset, None))
    assert (
        json.loads(recorded_settings(METHODS["tcp"], planned))["dataset_prompt"] == datas[1].dataset.template
    )


@pytest.mark.parametrize("name", QUICK)
def test_a_class_without_images_has_a_prompt_like_any_other(
    backbone: Backbone, data: Data, name: str
) -> None:
    one = job(data, name, **QUICK[name])
    seen = one.data.dataset.splits["train"].labels[one.subset.train] > 0
    (outcome,) = run(backbone, name, [replace(one, subset=FewShot(one.subset.train[seen], one.subset.val))])
    assert np.isfinite(classifier(backbone, one, outcome, data).logits(data.unit_test)).all()
    assert outcome.status == "done"


def test_cocoop_in_parts_of_few_images(
    backbone: Backbone, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = run(backbone, "cocoop", [job(data, "cocoop", **QUICK["cocoop"] | {"batch_size": 6})])
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", 1)
    (parts,) = run(backbone, "cocoop", [job(data, "cocoop", **QUICK["cocoop"] | {"batch_size": 6})])
    for key, array in whole.weights.items():
        np.testing.assert_allclose(parts.weights[key], array, atol=1e-5)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)


def test_a_sweep_says_what_cocoop_costs(data: Data) -> None:
    new = make_data(("pug", "maine coon"), name="pets")
    runs = [job(data, "cocoop", **QUICK["cocoop"], seed=seed, targets=(new,)) for seed in (1, 2)]
    assert [*METHODS["cocoop"].notes(runs)] == [
        "cocoop encodes a prompt per image and class: 108 prompts forward and backward in training, and 234 in tests, "
        "in 2 runs."
    ]


def test_the_work_of_a_cocoop_run_has_that_of_its_tests(backbone: Backbone, data: Data) -> None:
    one = job(data, "cocoop", **QUICK["cocoop"])
    more = replace(one, targets=(make_data(("pug", "maine coon"), name="pets"),))
    alone, both = (METHODS["cocoop"].run_shape(each, backbone).steps for each in (one, more))
    # Prompts over 3 classes: 3 steps in 3 epochs of 2 images, then 27 and 18 test images, which only go forward.
    assert alone == 3 * 3 * 2 + math.ceil(27 / 2)
    assert both == math.ceil(3 * 3 * 2 + (27 * 3 + 18 * 2) / 3 / 2)


@follows("the size of a feature, got {}; give a smaller number")
def test_a_reduction_to_nothing_is_refused(backbone: Backbone, data: Data) -> None:
    X, y = data.train(data.subset(2, 1))
    with pytest.raises(UserError, match=r"at most 16, .* got 17; give a smaller number"):
        fc.CoCoOp(backbone, epochs=1, reduction=DIM + 1).fit(X, y, class_names=data.class_names)
    fc.CoCoOp(backbone, epochs=1, reduction=DIM).fit(X, y, class_names=data.class_names)
    with pytest.raises(UserError, match=r"at most 16, .* got 17; give a smaller number"):
        fc.CLIPAdapter(reduction=DIM + 1).fit(X, y, text_features=np.eye(3, DIM))


@pytest.mark.parametrize("name", ["cocoop", "tcp", "clip_adapter"])
def test_a_reduction_to_nothing_is_refused_before_a_sweep_starts(
    backbone: Backbone, data: Data, name: str
) -> None:
    more = {"layer": 1} if name == "tcp" else {}
    one = job(data, name, model=backbone, **more, reduction=DIM + 1)
    with pytest.raises(UserError, match="at most 16"):
        METHODS[name].check(one)


def test_training_that_diverges_is_recorded(backbone: Backbone, data: Data) -> None:
    (outcome,) = run(backbone, "cocoop", [job(data, "cocoop", **QUICK["cocoop"] | {"learning_rate": 1e30})])
    assert outcome.status == "diverged"
