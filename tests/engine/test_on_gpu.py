"""The same numbers on a GPU as on the CPU, where there is a GPU: on the last one, which is not the current one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcoop.backbones import Backbone
from fastcoop.engine import encode_prompts, kernels, tower, train
from fastcoop.engine.forest import Trees
from fastcoop.engine.training import WARM_UP, WORTH_RECORDING
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.engine.test_exact import FEATURES, GRADIENTS, NAMES, relative
from tests.engine.test_fast import fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

LAYOUTS = (PromptLayout(4), PromptLayout(7, "mid", True), PromptLayout(2, "front"), PromptLayout(4))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


def on(device: torch.device, dtype: torch.dtype = torch.float64) -> Backbone:
    backbone = tiny_backbone(dtype)
    backbone.model.to(device)
    return backbone


def test_features_and_gradients_are_the_cpu_s(backbone, device):
    there = on(device)
    torch.manual_seed(0)
    given = [torch.randn(2, *layout.shape(len(NAMES), 32), dtype=torch.float64) for layout in LAYOUTS]
    results = []
    for where in (backbone, there):
        contexts = [c.to(where.device).requires_grad_() for c in given]
        outputs = encode_prompts(
            where, [(NAMES, layout, c) for layout, c in zip(LAYOUTS, contexts, strict=True)]
        )
        sum((out**2).sum() for out in outputs).backward()
        results.append(
            ([out.detach().cpu() for out in outputs], [contexts_.grad.cpu() for contexts_ in contexts])
        )
    for tolerance, ours, theirs in zip((FEATURES, GRADIENTS), results[1], results[0], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) < tolerance


def test_recorded_training_ends_where_the_cpu_s_ends_and_again_in_the_same_bits(backbone, device, make_run):
    epochs = 4 * WORTH_RECORDING
    assert epochs > WARM_UP
    runs = [
        make_run(layout, seed=seed, epochs=epochs - seed, snapshots=(1, epochs // 2))
        for seed, layout in enumerate(LAYOUTS)
    ]
    there = on(device)
    once, again = train(there, runs), train(there, runs)
    for run, ours, same, theirs in zip(runs, once, again, train(backbone, runs), strict=True):
        assert relative(ours.contexts, theirs.contexts) < 1e-9
        assert relative(ours.contexts, run.contexts) > 0.01
        assert torch.equal(ours.contexts, same.contexts)
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-9)
        for epoch, kept in theirs.snapshots.items():
            assert relative(ours.snapshots[epoch], kept) < 1e-9


def test_the_fast_schedule_is_the_cpu_s(backbone, device, make_run):
    """Recorded in two variants: with a new inverse root by products, and with the one before."""
    runs = [fast(make_run(layout, seed=seed), 24 + seed, pull=True) for seed, layout in enumerate(LAYOUTS)]
    for run, ours, theirs in zip(runs, train(on(device), runs), train(backbone, runs), strict=True):
        assert relative(ours.contexts, theirs.contexts) < 1e-8
        assert relative(ours.contexts, run.contexts) > 0.01


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_kernels_compute_what_torch_s_operations_compute(device, monkeypatch, precision, tolerance):
    if not kernels.are_usable(device, precision):
        pytest.skip("Triton's kernels do not run here")
    there, results = on(device, torch.float32), []
    torch.manual_seed(0)
    given = [torch.randn(2, *layout.shape(len(NAMES), 32)) for layout in LAYOUTS]
    for with_kernels in (True, True, False):
        monkeypatch.setattr(tower, "are_usable", lambda *_, answer=with_kernels: answer)
        contexts = [c.to(device).requires_grad_() for c in given]
        items = [(NAMES, layout, c) for layout, c in zip(LAYOUTS, contexts, strict=True)]
        outputs = encode_prompts(there, items, Trees(there, precision))
        sum((out.float() ** 2).sum() for out in outputs).backward()
        results.append([out.detach() for out in outputs] + [c.grad for c in contexts])
    for ours, again, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < tolerance
        assert torch.equal(ours, again)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close(backbone32, device, make_run, precision):
    runs = [make_run(layout, seed=seed, epochs=2 * WORTH_RECORDING) for seed, layout in enumerate(LAYOUTS)]
    rounded = train(on(device, torch.float32), runs, precision=precision)
    for ours, theirs in zip(rounded, train(backbone32, runs), strict=True):
        assert ours.contexts.dtype == torch.float32
        assert 0 < relative(ours.contexts, theirs.contexts) < 0.05
