"""What can be held to be true of a GPU without one: torch's fake tensors know devices and types, and no numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastcoop.engine import encode_prompts, fit, kernels
from fastcoop.engine.forest import Trees
from fastcoop.engine.runs import Run
from fastcoop.engine.training import SYNC_EVERY, ActiveRun, Batch, train
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.prompts import PromptLayout
from fastcoop.prompts.tree import tree_key
from tests.engine.conftest import tiny_backbone
from tests.engine.step_counting import FakeRun
from tests.pretend_gpu import pretend_gpu

LAYOUTS = (
    PromptLayout(4),
    PromptLayout(4, "mid"),
    PromptLayout(3, "front", True),
    PromptLayout(2, "end", True),
)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """A fake tensor cannot be passed to a kernel, which a machine with a GPU would launch."""
    monkeypatch.setattr(kernels, "_run_on", lambda device: False)


def fakes_want_a_driver() -> bool:
    """Whether this torch asks CUDA which device it is on when a fake tensor is indexed (2.6 and 2.7 do)."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda")[torch.tensor([0])]
    except RuntimeError:
        return True
    return False


def fake(thing: Any) -> Any:
    """``thing`` with every tensor in it replaced by a fake one on a GPU."""
    if isinstance(thing, torch.Tensor):
        return torch.empty(thing.shape, dtype=thing.dtype, device="cuda")
    if isinstance(thing, tuple):
        return tuple(map(fake, thing))
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {field.name: fake(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
        return dataclasses.replace(thing, **fields)
    return thing


@pytest.mark.skipif(
    fakes_want_a_driver(), reason="this torch's fake tensors want a CUDA driver; there is none"
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_on_a_gpu_stays_there(backbone32, make_run, precision):
    """Types fit; no operation mixes a GPU's tensor with a CPU's; none reads a number back, which a fake has not."""
    trees = Trees(backbone32, precision)
    runs = [make_run(layout, seed=seed, views=1) for seed, layout in enumerate((*LAYOUTS, LAYOUTS[0]))]
    laid_out = {key: trees[key].tree for key in (tree_key(run.class_names, run.layout) for run in runs)}
    scale = backbone32.logit_scale
    with FakeTensorMode(allow_non_fake_inputs=False):
        trees.tower = tower = fake(trees.tower)
        for key, tree in laid_out.items():
            trees._known[key] = TreeLayout(tree, tower)
        active = []
        for n, run in enumerate(runs):
            active.append(ActiveRun.start(n, _without_checks(run), torch.float32, tower.device))
        batch = Batch(trees, active, scale)
        batch._step()
        batch._step()
        held = (
            batch.vectors,
            batch.active[0].tensors["momentum"],
            batch.losses,
            batch.diverged_at,
            batch.limit,
            batch.counter,
        )
        assert {tensor.device.type for tensor in held} == {"cuda"}
        assert (
            batch.vectors.dtype
            == batch.active[0].tensors["momentum"].dtype
            == batch.losses.dtype
            == torch.float32
        )
        # In bfloat16 too: only so does backward take them.
        assert batch.workspace.layers[0].x_stats[0][0].dtype == torch.float32
        with pytest.raises(DataDependentOutputException):  # a fake does notice
            batch.sync()
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            batch.vectors + torch.ones(batch.vectors.shape)


@pytest.mark.skipif(
    fakes_want_a_driver(), reason="this torch's fake tensors want a CUDA driver; there is none"
)
def test_contexts_on_the_cpu_are_encoded_on_the_gpu(backbone32):
    """What a run has learned lies on the CPU, and is tested over a tower on the GPU."""
    trees = Trees(backbone32)
    names, layout = ("cat", "dog"), PromptLayout(4, "mid")
    tree = trees[tree_key(names, layout)].tree
    with FakeTensorMode(allow_non_fake_inputs=False):
        trees.tower = tower = fake(trees.tower)
        trees._known[tree_key(names, layout)] = TreeLayout(tree, tower)
        contexts = torch.empty(3, 4, tower.width)
        (features,) = encode_prompts(backbone32, [(names, layout, contexts)], trees)
        assert features.device.type == "cuda"


def _without_checks(run: Run) -> Run:
    """``run`` with fake tensors, whose labels cannot be looked at."""
    other = object.__new__(FakeRun)
    tensors = {
        name: torch.empty(getattr(run, name).shape, dtype=getattr(run, name).dtype)
        for name in ("contexts", "features", "labels")
    }
    for field in dataclasses.fields(run):
        object.__setattr__(other, field.name, tensors.get(field.name, getattr(run, field.name)))
    return other


def test_memory_that_torch_keeps_for_itself_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 99_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert fit.free_bytes(torch.device("cuda")) == 10_400


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert fit.is_out_of_memory(error) is expected


def test_a_divergence_on_a_gpu_is_found_one_look_later_without_waiting(backbone32, make_run, monkeypatch):
    """A pretended GPU gives the numbers of the CPU, and tells when the host asks for them."""
    runs = [make_run(seed=0, epochs=64), make_run(seed=1, epochs=64, learning_rate=1e30)]
    expected = train(backbone32, runs)
    waits: list[int] = []
    sync = Batch.sync
    monkeypatch.setattr(Batch, "sync", lambda self: (waits.append(self.done), sync(self)))
    with pretend_gpu():
        there = tiny_backbone(torch.float32)
        there.model.to("cuda")
        found = train(there, runs)
    assert [one.status for one in found] == [one.status for one in expected] == ["done", "diverged"]
    assert found[1].diverged_at == expected[1].diverged_at < SYNC_EVERY
    assert waits == [2 * SYNC_EVERY, 64 - 2 * SYNC_EVERY]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.contexts, theirs.contexts, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4)
