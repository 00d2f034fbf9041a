"""The encoder beside whatever else a caller does with torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcoop.engine import PromptEncoder, PromptLearner, encode_prompts, train
from fastcoop.engine.schedule import learning_rates
from fastcoop.engine.tower import ForestPass
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout

NAMES = ("cat", "cat fish", "dog")
LAYOUT = PromptLayout(3, "mid")


def features_and_gradient(encoder, contexts):
    contexts = contexts.detach().clone().requires_grad_()
    features = encoder(contexts)
    (features**2).sum().backward()
    return features.detach(), contexts.grad


def test_two_graphs_alive_at_once_and_a_graph_kept_give_the_same_bits_as_one(backbone):
    encoder = PromptEncoder(backbone, NAMES, LAYOUT)
    one = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 3, 32, dtype=torch.float64, requires_grad=True)
    first, second = encoder(one), encoder(other)
    grads = [torch.autograd.grad((first**2).sum(), one, retain_graph=True)[0] for _ in range(2)]
    (of_other,) = torch.autograd.grad((second**2).sum(), other)
    for contexts, features, grad in (
        (one, first, grads[0]),
        (one, first, grads[1]),
        (other, second, of_other),
    ):
        expected = features_and_gradient(encoder, contexts)
        assert torch.equal(features, expected[0])
        assert torch.equal(grad, expected[1])


def test_calls_from_many_threads_do_not_meet(backbone):
    encoder = PromptEncoder(backbone, NAMES, LAYOUT)
    given = [torch.randn(2, 3, 32, dtype=torch.float64) for _ in range(8)]
    alone = [features_and_gradient(encoder, contexts) for contexts in given]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda contexts: features_and_gradient(encoder, contexts), given))
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_autocast_changes_nothing(backbone32, make_run):
    contexts = torch.randn(2, 3, 32)
    expected = features_and_gradient(PromptEncoder(backbone32, NAMES, LAYOUT), contexts)
    (trained,) = train(backbone32, [make_run(epochs=3)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = features_and_gradient(PromptEncoder(backbone32, NAMES, LAYOUT), contexts)
        (under_autocast,) = train(backbone32, [make_run(epochs=3)])
    assert all(torch.equal(a, b) for a, b in zip(rounded, expected, strict=True))
    assert torch.equal(under_autocast.contexts, trained.contexts)


def test_contexts_of_any_layout_in_memory_and_precision(backbone):
    encoder = PromptEncoder(backbone, NAMES, LAYOUT)
    contexts = torch.randn(32, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    assert torch.equal(encoder(contexts), encoder(contexts.contiguous()))
    half = contexts.half().requires_grad_()
    features = encoder(half)
    features.sum().backward()
    assert torch.equal(features, encoder(half.double()))
    assert (features.dtype, half.grad.dtype) == (torch.float64, torch.float16)
    assert not encoder(contexts).requires_grad
    with torch.inference_mode():
        assert torch.equal(encoder(contexts), encoder(contexts.contiguous()))


def test_a_gradient_s_gradient_is_refused_not_silently_zero(backbone):
    contexts = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    features = PromptEncoder(backbone, NAMES, LAYOUT)(contexts)
    with pytest.raises(UserError, match="differentiated once"):
        torch.autograd.grad(features.sum(), contexts, create_graph=True)


def test_what_is_no_list_of_names_or_no_run_is_refused(backbone):
    with pytest.raises(UserError, match='got the single name "cat"'):
        PromptEncoder(backbone, "cat", LAYOUT)
    with pytest.raises(UserError, match="Expected class names that are text, got 2"):
        PromptEncoder(backbone, ["cat", 2], LAYOUT)
    with pytest.raises(UserError, match="Expected contexts as a tensor, got an object of type ndarray"):
        PromptEncoder(backbone, NAMES, LAYOUT)(np.zeros((1, 3, 32)))
    with pytest.raises(UserError, match=r"got \(0, 3, 32\)"):
        PromptEncoder(backbone, NAMES, LAYOUT)(torch.zeros(0, 3, 32))
    assert encode_prompts(backbone, []) == []


def test_a_prompt_learner_in_one_s_own_loop_trains_as_train_does(backbone, make_run):
    layout, epochs = PromptLayout(4, "mid"), 6
    learner = PromptLearner(backbone, NAMES, layout, seed=3)
    assert [name for name, _ in learner.named_parameters()] == ["contexts"]
    assert list(learner.state_dict()) == ["contexts"]
    run = make_run(layout, NAMES, epochs=epochs, views=1)
    run = replace(run, contexts=learner.contexts.detach().clone())
    (trained,) = train(backbone, [run])
    images = torch.nn.functional.normalize(run.features[:, 0].double(), dim=-1)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for rate in learning_rates(epochs):
        optimizer.param_groups[0]["lr"] = rate
        weights = torch.nn.functional.normalize(learner(), dim=-1)
        loss = torch.nn.functional.cross_entropy(backbone.logit_scale * images @ weights.t(), run.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(learner.contexts, run.contexts)
    torch.testing.assert_close(learner.contexts.detach(), trained.contexts, rtol=1e-9, atol=1e-12)
    other = PromptLearner(backbone, NAMES, layout, words="a photo of a")
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other(), learner())
    assert learner().shape == (len(NAMES), 24)


def test_an_encoder_moves_as_a_module_does(backbone32):
    contexts = torch.randn(2, 3, 32)
    expected = PromptEncoder(backbone32, NAMES, LAYOUT)(contexts)
    model = torch.nn.Sequential(PromptEncoder(backbone32, NAMES, LAYOUT))
    assert not model.state_dict()
    assert torch.equal(model(contexts), expected)
    model.double()
    assert model(contexts).dtype == torch.float64
    torch.testing.assert_close(model(contexts).float(), expected, rtol=1e-4, atol=1e-5)
    assert model.to("meta")[0]._trees.tower.device.type == "meta"


def test_without_a_gradient_nothing_is_kept_for_backward(backbone32, monkeypatch):
    calls = []
    forward = ForestPass.forward

    def noted(self, contexts, workspace):
        calls.append((self, workspace))
        return forward(self, contexts, workspace)

    monkeypatch.setattr(ForestPass, "forward", noted)
    encoder = PromptEncoder(backbone32, NAMES, LAYOUT)
    learned, plain = torch.randn(2, 3, 32, requires_grad=True), torch.randn(2, 3, 32)
    features = [encoder(learned)]
    features.append(encoder(plain))
    with torch.inference_mode():
        features.append(encoder(learned))
    with torch.no_grad():
        features.append(encoder(learned))
    assert [f.requires_grad for f in features] == [True, False, False, False]
    assert torch.equal(features[0], features[3])
    assert [workspace.keep for _, workspace in calls] == [True, False, False, False]
    assert calls[3][1].nbytes < 0.8 * calls[0][1].nbytes
    assert len({id(one) for one, _ in calls}) == 1  # indices are built once
    features_and_gradient(encoder, plain)
