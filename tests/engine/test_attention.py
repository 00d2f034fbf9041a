"""Attention over trees: prompt by prompt beside dense masks, and the C kernels beside that."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcoop.engine import PromptEncoder, train
from fastcoop.engine import tower as tower_module
from fastcoop.engine.attention import PathAttention, paths_of
from fastcoop.engine.forest import Forest, Workspace
from fastcoop.engine.kernels import cpu
from fastcoop.engine.kernels.cpu import TreeAttention
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.engine.weights import FoldedTower, fold
from fastcoop.prompts import PromptLayout
from fastcoop.prompts.layout import Slot
from fastcoop.prompts.tree import build_tree
from tests.engine.conftest import tiny_backbone

START, VECTOR, END = Slot(False, 0), Slot(True, 0), Slot(False, 99)
names = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=24), min_size=1, max_size=8)
starts = st.sampled_from([(START, VECTOR), (VECTOR,), (START, Slot(False, 5), VECTOR, Slot(True, 1))])
compiled = pytest.mark.skipif(
    cpu.load_kernels() is None, reason="no C compiler makes the kernels for CPUs here"
)


@cache
def tower_of(dtype: torch.dtype, width: int, heads: int) -> FoldedTower:
    return fold(tiny_backbone(dtype, width=width, heads=heads).text)


def forest_of(dtype: torch.dtype, trees, width: int = 32, heads: int = 2) -> Forest:
    """Return the forest of (start of all prompts, names, runs)."""
    tower, groups = tower_of(dtype, width, heads), []
    for start, classes, runs in trees:
        prompts = [(*start, *(Slot(False, token) for token in name), END) for name in classes]
        groups.append((TreeLayout(build_tree(prompts), tower), runs))
    return Forest(tower, groups)


def numbers(forest: Forest, draw: torch.Generator, *shape: int) -> torch.Tensor:
    """Draw numbers of the forest's precision, in float64."""
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(forest.tower.dtype).double()


def random_qkv(forest: Forest, draw: torch.Generator, rows: int) -> torch.Tensor:
    """Draw queries, keys and values (rows, 3 width); queries are scaled, as the tower's."""
    width = forest.tower.width
    qkv = numbers(forest, draw, rows, 3 * width)
    qkv[:, :width] *= 2.0 ** -round(math.log2(width // forest.tower.heads) / 2)  # exact
    return qkv


def attended(attention, forest: Forest, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs and the gradient of qkv, from equal random numbers; of queries that exist."""
    draw, workspace, width = torch.Generator().manual_seed(0), Workspace(forest.tower), forest.tower.width
    is_last = layer == attention.last
    qkv = attention.qkv(layer, workspace)
    qkv.copy_(random_qkv(forest, draw, forest.rows))
    out = attention.forward(layer, workspace).clone()
    grad = numbers(forest, draw, *out.shape).to(out.dtype)
    of_qkv = attention.backward(layer, grad, workspace).clone()
    again = attention.backward(layer, grad, workspace)
    asked = forest.leaf_rows if is_last else slice(None)
    assert torch.equal(again[asked], of_qkv[asked])
    assert torch.equal(again[:, width:], of_qkv[:, width:])
    if is_last:
        queries = of_qkv[:, :width].clone()
        of_qkv[:, :width].zero_()
        of_qkv[asked, :width] = queries[asked]
    return out, of_qkv


def dense(forest: Forest, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one dense masked softmax over all nodes of each run."""
    tower, draw, heads = forest.tower, torch.Generator().manual_seed(0), forest.tower.heads
    is_last = layer == len(tower.blocks) - 1
    qkv = random_qkv(forest, draw, forest.rows).requires_grad_()
    outputs = []
    for g in forest.groups:
        tree, rows = g.tree_layout.tree, qkv[g.rows].unflatten(0, (g.runs, -1))
        live = torch.as_tensor(tree.live)
        q, *kv = rows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        order = torch.argsort(torch.cat([torch.where(live)[0], torch.where(~live)[0]]))
        constants = g.tree_layout.constants[layer].double().unsqueeze(1).expand(-1, g.runs, -1, -1, -1)
        k, v = (torch.cat(pair, 2)[:, :, order] for pair in zip(kv, constants, strict=True))
        node = torch.arange(tree.nodes)
        reads = (node[None] <= node[:, None]) & (node[:, None] < torch.as_tensor(tree.subtree_end)[None])
        out = ((q @ k.mT).masked_fill(~reads[live], -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        outputs.append((out[:, g.tree_layout.leaf_rows] if is_last else out).flatten(0, 1))
    out = torch.cat(outputs)
    grad = numbers(forest, draw, *out.shape)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("layer", [0, 1])
@settings(max_examples=15, deadline=None)
@given(trees=st.lists(st.tuples(starts, names, st.integers(1, 3)), min_size=1, max_size=3))
def test_prompt_by_prompt_is_a_dense_masked_softmax(layer, trees):
    forest = forest_of(torch.float64, trees)
    for ours, theirs in zip(
        attended(PathAttention(forest), forest, layer), dense(forest, layer), strict=True
    ):
        assert error(ours, theirs) < 1e-12


@compiled
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("width", "heads"), [(32, 2), (32, 1), (64, 1), (96, 2)])
@settings(max_examples=5, deadline=None)
@given(trees=st.lists(st.tuples(starts, names, st.integers(1, 3)), min_size=1, max_size=3))
def test_the_kernels_are_a_dense_masked_softmax(layer, width, heads, trees):
    forest = forest_of(torch.float32, trees, width, heads)
    assert TreeAttention.is_usable(forest)
    for ours, theirs in zip(
        attended(TreeAttention(forest), forest, layer), dense(forest, layer), strict=True
    ):
        assert error(ours, theirs) < 3e-6


@compiled
def test_other_runs_and_threads_change_no_bit_of_a_run():
    tree = ((START, VECTOR), [[1, 2], [1, 3, 2], [2]])
    alone = forest_of(torch.float32, [(*tree, 1)])
    expected = attended(TreeAttention(alone), alone, 0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for ours, theirs in zip(attended(TreeAttention(alone), alone, 0), expected, strict=True):
                assert torch.equal(ours, theirs)  # one run: with more threads these share its heads
            forest = forest_of(torch.float32, [(*tree, 3), ((VECTOR,), [[3]], 2)])
            attention, workspace = TreeAttention(forest), Workspace(forest.tower)
            draw = torch.Generator().manual_seed(0)
            qkv = attention.qkv(0, workspace)
            qkv.fill_(torch.nan)[: alone.rows] = random_qkv(forest, draw, alone.rows)
            grad = torch.full((forest.rows, 32), torch.nan)
            grad[: alone.rows] = numbers(forest, draw, alone.rows, 32)
            assert torch.equal(attention.forward(0, workspace)[: alone.rows], expected[0])
            assert torch.equal(attention.backward(0, grad, workspace)[: alone.rows], expected[1])
    finally:
        torch.set_num_threads(before)


def test_scores_far_apart_neither_overflow_nor_lose_the_largest():
    for forest, kind in ((forest_of(torch.float32, [((START, VECTOR), [[1, 2]], 1)]), k) for k in kinds()):
        attention, workspace = kind(forest), Workspace(forest.tower)
        qkv = attention.qkv(0, workspace)
        qkv.zero_()
        qkv[:, :32], qkv[1, 32:64] = 100.0, 100.0  # row 1's scores are larger than the others' by 160,000
        qkv[1, 64:] = 7.0
        out = attention.forward(0, workspace)
        assert torch.equal(out[1:], torch.full_like(out[1:], 7.0))


def kinds() -> list[type]:
    return [PathAttention, *[TreeAttention] * (cpu.load_kernels() is not None)]


def test_the_worked_example_of_the_docstring():
    tower = fold(tiny_backbone().text)
    prompts = [(START, VECTOR, Slot(False, token), END) for token in (1, 2)]
    layout = TreeLayout(build_tree(prompts), tower)
    dog, cat = paths_of(layout, False, torch.float64)  # by numbers of queries
    assert (cat.queries.tolist(), cat.keys.tolist()) == ([[0, 1, 2]], [[5, 0, 1, 2]])
    assert (dog.queries.tolist(), dog.keys.tolist()) == ([[3, 4]], [[5, 0, 3, 4]])
    (both,) = paths_of(layout, True, torch.float64)
    assert (both.queries.tolist(), both.outputs.tolist()) == ([[2], [4]], [0, 1])


@compiled
def test_float32_towers_on_a_cpu_use_the_kernels_and_others_do_not():
    for dtype, width, heads, expected in (
        (torch.float32, 32, 2, TreeAttention),
        (torch.float64, 32, 2, PathAttention),
        (torch.float32, 24, 2, PathAttention),
        (torch.float32, 144, 1, PathAttention),
    ):
        forest = forest_of(dtype, [((START, VECTOR), [[1]], 1)], width, heads)
        assert type(tower_module.ForestPass(forest).attention) is expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_an_encoder_can_be_copied(copied):
    encoder = PromptEncoder(tiny_backbone(torch.float32, heads=2), ["cat", "dog"], PromptLayout(4))
    contexts = torch.randn(1, 4, 32)
    assert torch.equal(copied(encoder)(contexts), encoder(contexts))


CHECK = """
import logging
logging.basicConfig(level="INFO")
from fastcoop.engine.kernels import cpu
print(cpu.load_kernels())
"""


def loaded_in_a_process(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, check=True
    )


def test_without_a_compiler_the_log_says_what_is_missing(tmp_path):
    found = loaded_in_a_process(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert found.stdout.strip() == "None"
    assert "slower without its kernels, which need a C compiler" in found.stderr
    assert not list((tmp_path / "fastcoop").iterdir())


@compiled
def test_the_kernels_are_compiled_once_for_all_processes(tmp_path):
    for _ in range(2):
        assert "CDLL" in loaded_in_a_process(XDG_CACHE_HOME=str(tmp_path)).stdout
        (file,) = (tmp_path / "fastcoop").iterdir()
        first = file.stat().st_mtime_ns
        os.utime(file, ns=(1, 1))
    assert first == 1


@compiled
def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    assert "CDLL" in loaded_in_a_process(XDG_CACHE_HOME=str(tmp_path / "file")).stdout


def test_training_goes_on_without_the_kernels(make_run, monkeypatch):
    backbone = tiny_backbone(torch.float32, heads=2)
    (with_kernels,) = train(backbone, [make_run()])
    monkeypatch.setattr(cpu, "load_kernels", lambda: None)
    (without,) = train(backbone, [make_run()])
    assert torch.allclose(with_kernels.contexts, without.contexts, rtol=1e-4, atol=1e-5)
