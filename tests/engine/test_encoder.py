"""The encoder beside whatever else a caller does with torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastcoop.engine import PromptEncoder, encode_prompts, train
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
    with pytest.raises(UserError, match='the single name "cat" came'):
        PromptEncoder(backbone, "cat", LAYOUT)
    with pytest.raises(UserError, match=r"\(0, 3, 32\) came"):
        PromptEncoder(backbone, NAMES, LAYOUT)(torch.zeros(0, 3, 32))
    assert encode_prompts(backbone, []) == []
