"""The kernels' numbers, in Triton's interpreter on a CPU. `test_kernels` runs this file with TRITON_INTERPRET=1.

The interpreter multiplies bfloat16 wrongly in products, so those tests are in float32 and float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcoop.engine.kernels import rows, step
from fastcoop.engine.kernels.attention import TiledAttention
from fastcoop.engine.kernels.tiles import Segments, plan_tiles
from fastcoop.prompts.layout import Slot
from fastcoop.prompts.tree import Tree, build_tree

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", list(EXACT))
START, END = Slot(False, 0), Slot(False, 99)
few = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

names = st.lists(st.integers(1, 3), min_size=0, max_size=9)


@st.composite
def random_trees(draw) -> Tree:
    """Prompts with one to 20 vectors before, in, or behind each name, shared by the classes or each class's own."""
    vectors, before, own = draw(st.sampled_from([1, 4, 20])), draw(st.integers(0, 2)), draw(st.booleans())
    prompts = []
    for number, name in enumerate(draw(st.lists(names, min_size=1, max_size=4))):
        learned = [Slot(True, m + own * vectors * number) for m in range(vectors)]
        cut = (0, vectors // 2, vectors)[before]
        tokens = [Slot(False, token) for token in name]
        prompts.append((START, *learned[:cut], *tokens, *learned[cut:], END))
    return build_tree(prompts)


forests = st.lists(st.tuples(random_trees(), st.integers(1, 2)), min_size=1, max_size=2)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def dense_attention(forest, q, k, v, constant_k, constant_v):
    """Every run's rows against all keys of its tree, with a mask; tensors (rows, heads, d) in float64."""
    outs, row, constant = [], 0, 0
    for tree, runs in forest:
        nodes = np.arange(tree.nodes)
        reads = (nodes[None, :] <= nodes[:, None]) & (nodes[:, None] < tree.subtree_end[None, :])
        live, n, c = torch.as_tensor(tree.live), int(tree.live.sum()), int((~tree.live).sum())
        for _ in range(runs):
            keys, values = (torch.empty(tree.nodes, *x.shape[1:], dtype=x.dtype) for x in (k, v))
            keys[live], values[live] = k[row : row + n], v[row : row + n]
            keys[~live], values[~live] = (
                constant_k[constant : constant + c],
                constant_v[constant : constant + c],
            )
            scores = torch.einsum("qhd,khd->hqk", q[row : row + n], keys)
            p = scores.masked_fill(~torch.as_tensor(reads)[live], -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", p, values))
            row += n
        constant += c
    return torch.cat(outs)


def leaf_rows(forest) -> torch.Tensor:
    found, row = [], 0
    for tree, runs in forest:
        rank = np.cumsum(tree.live) - 1
        for _ in range(runs):
            found += (row + rank[np.unique(tree.leaf)]).tolist()
            row += int(tree.live.sum())
    return torch.tensor(found)


@few
@given(
    forests,
    st.sampled_from(["all rows", "leaves have queries", "gradients of vectors"]),
    st.sampled_from([(torch.float64, 2, 16), (torch.float64, 3, 8), (torch.float32, 2, 8)]),
)
def test_attention_is_the_dense_masked_softmax(forest, kind, case):
    """In all layers, in the last one, and in the first one."""
    (dtype, heads, d), _ = case, torch.manual_seed(0)
    width, n = heads * d, sum(int(tree.live.sum()) * runs for tree, runs in forest)
    c = sum(int((~tree.live).sum()) for tree, _ in forest)
    qkv, constants = torch.randn(n, 3 * width, dtype=dtype), torch.randn(c, 2 * width, dtype=dtype)
    leaves_only = kind == "leaves have queries"
    asking = leaf_rows(forest) if leaves_only else torch.arange(n)
    query_of_row = torch.full((n,), -1, dtype=torch.int32)
    query_of_row[asking] = torch.arange(len(asking), dtype=torch.int32)
    grad = torch.randn(len(asking), width, dtype=dtype)
    attention = TiledAttention(plan_tiles(forest, "cpu", 16), heads, 16)
    places = attention.plan.learned if kind == "gradients of vectors" else attention.plan.every
    read = torch.argwhere(places.of_row >= 0)[:, 0]

    def run():
        q = qkv[asking, :width].contiguous() if leaves_only else qkv[:, :width]
        out, grads = torch.full((len(asking), width), torch.nan, dtype=dtype), torch.full_like(qkv, torch.nan)
        grads = grads[: len(read)]
        slots = torch.full((len(attention.plan.chain), 2 * width), torch.nan, dtype=dtype)
        attention.forward(q, qkv[:, width:], constants, out, query_of_row)
        attention.backward((q, qkv[:, width:], constants), grad, grads, slots, query_of_row, places)
        grad_q, *grad_kv = grads.chunk(3, 1)
        return out, grad_q[query_of_row[read] >= 0], *grad_kv

    q, k, v = (x.double().view(n, heads, d).requires_grad_() for x in qkv.split(width, 1))
    constant_k, constant_v = (x.double().view(c, heads, d) for x in constants.split(width, 1))
    expected = dense_attention(forest, q, k, v, constant_k, constant_v)[asking].view(-1, width)
    expected.backward(grad.double())
    theirs = expected.detach(), q.grad[asking if leaves_only else read], k.grad[read], v.grad[read]
    ours = run()
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b.reshape(a.shape)) < EXACT[dtype]


def test_attention_gives_the_same_bits_each_time_and_leaves_none_unwritten():
    prompts = [(START, Slot(True, 0), Slot(True, 1), Slot(False, name), END) for name in range(20)]
    plan = plan_tiles([(build_tree(prompts), 2)], "cpu", 16)
    n, width = len(plan.row_end), 8
    qkv, constants, grad = torch.randn(n, 3 * width), torch.randn(1, 2 * width), torch.randn(n, width)
    attention, results = TiledAttention(plan, 1, 16), []
    for _ in range(2):
        out, grads = torch.full((n, width), torch.nan), torch.full((n, 3 * width), torch.nan)
        slots = torch.full((len(plan.chain), 2 * width), torch.nan)
        q, kv = qkv[:, :width], qkv[:, width:]
        every = torch.arange(n, dtype=torch.int32)
        attention.forward(q, kv, constants, out, every)
        attention.backward((q, kv, constants), grad, grads, slots, every, plan.every)
        results.append(torch.cat([out, grads], 1))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@dtypes
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy; 1 / (1 + inf) is 0
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_are_torch_s(dtype, kind):
    x = (3 * torch.randn(3, 1000, dtype=dtype)).requires_grad_()
    grad, ours = torch.randn(3, 1000, dtype=dtype), torch.empty(3, 1000, dtype=dtype)
    expected = activate(x, kind)
    expected.backward(grad)
    rows.activation(x.detach(), kind, ours)
    assert relative(ours, expected.detach()) < EXACT[dtype]
    rows.activation_backward(grad, x.detach(), kind)
    assert relative(grad, x.grad) < EXACT[dtype]


@dtypes
@pytest.mark.parametrize("width", [8, 48, 1024])
def test_layer_norm_of_the_sum_and_its_gradient_are_torch_s(dtype, width):
    n = 5
    x, branch, bias, grad, residual = (3 * torch.randn(k, width, dtype=dtype) + 1 for k in (n, n, 1, n, n))
    total = (x + branch + bias).requires_grad_()
    expected = F.layer_norm(total, (width,), eps=1e-3) + 0.25
    expected.backward(grad)
    normal = torch.empty_like(x)
    rows.layer_norm(x, normal, 1e-3, 0.25, branch=branch, bias=bias[0], sums=x)
    assert relative(x, total.detach()) < EXACT[dtype]
    assert relative(normal, expected.detach()) < EXACT[dtype]
    out, onto = rows.Sums.like(x), rows.Sums(residual, None)
    rows.layer_norm_backward(grad, x, 1e-3, out, residual=onto)
    assert relative(out.high, total.grad + residual) < EXACT[dtype]
    rows.layer_norm_backward(grad, x, 1e-3, onto, residual=onto)  # in place
    assert torch.equal(residual, out.high)


def test_layer_norm_reads_chosen_rows_and_its_gradient_adds_what_few_rows_have():
    x, n, few_rows = torch.randn(9, 16, dtype=torch.float64), 4, 2
    chosen = torch.tensor([7, 0, 3, 3], dtype=torch.int32)
    normal, sums = torch.empty(n, 16, dtype=x.dtype), torch.empty(n, 16, dtype=x.dtype)
    rows.layer_norm(x, normal, 1e-5, 0.0, rows=chosen, sums=sums)
    assert torch.equal(sums, x[chosen])
    assert relative(normal, F.layer_norm(x[chosen], (16,))) < 1e-12
    grad, extra, residual = (torch.randn(k, 16, dtype=x.dtype) for k in (n, few_rows, few_rows))
    place = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    spread = torch.zeros(2, n, 16, dtype=x.dtype)
    spread[:, [1, 3]] = torch.stack([extra, residual])[:, [1, 0]]
    inputs = sums.clone().requires_grad_()
    F.layer_norm(inputs, (16,)).backward(grad + spread[0])
    out = rows.Sums(grad, None)
    rows.layer_norm_backward(
        grad, sums, 1e-5, out, residual=rows.Sums(residual, None), extra=extra, place=place
    )
    assert relative(grad, inputs.grad + spread[1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_gradients_add_up_what_numbers_of_two_bytes_would_round_off(dtype):
    """Forty branches, each below half of the last digit of the sum that they are added to."""
    n, width, branches = 3, 16, 40
    x, grad = torch.randn(n, width, dtype=dtype), torch.randn(n, width, dtype=dtype)
    exact_x = x.double().requires_grad_()
    F.layer_norm(exact_x, (width,)).backward(grad.double())
    start = 2048 * exact_x.grad.abs().max().ceil()
    onto = rows.Sums(torch.full_like(x, start), torch.zeros_like(rows.Sums.like(x).low))
    for _ in range(branches):
        rows.layer_norm_backward(grad, x, 1e-5, onto, residual=onto)
    numbers = onto.high.float()
    if dtype == torch.bfloat16:  # float32's bits
        numbers = (numbers.view(torch.int32) + onto.low).view(torch.float32)
    else:
        numbers += onto.low
    assert relative(numbers - start, branches * exact_x.grad) < 1e-3
    assert relative(onto.high, numbers) < 2**-8


@pytest.mark.parametrize("onto", [False, True])
def test_segments_are_summed_in_order(onto):
    targets = np.array([4, 0, -1, 4, *[2] * 40, 4])
    values = torch.randn(len(targets), 300, dtype=torch.float64)
    out = torch.randn(5, 300, dtype=torch.float64)
    expected = out.clone()
    for target in (0, 2, 4):
        expected[target] = onto * out[target] + values[targets == target].sum(0)
    rows.add_segments(out, values, Segments.of(targets, "cpu"), onto=onto)
    assert relative(out, expected) < 1e-12


@dtypes
def test_losses_and_gradients_of_all_runs_are_those_of_cross_entropy(dtype):
    classes, dim, images, batch = [3, 70, 1], 40, 11, 5
    features = torch.randn(sum(classes), dim, dtype=dtype)
    table = 3 * torch.randn(images, dim, dtype=dtype)
    labels = torch.randint(70, (images,))
    image_rows = torch.randint(images, (2, len(classes), batch), dtype=torch.int32)
    image_rows[1, 0, 3:] = -1  # a short batch
    labels[image_rows[1, 0, :3].long()] %= 3
    labels[image_rows[1, 2].long()] = 0
    losses, grads = torch.full((len(classes),), torch.nan, dtype=dtype), torch.full_like(features, torch.nan)
    blocks = step.class_blocks(classes, "cpu")
    step.cross_entropy(features, blocks, table, labels, image_rows, torch.tensor([1]), 100.0, losses, grads)
    for run, part in enumerate(features.split(classes)):
        own, read = part.double().requires_grad_(), image_rows[1, run].long()
        read = read[read >= 0]
        logits = 100.0 * F.normalize(table[read].double(), dim=-1) @ F.normalize(own, dim=-1).t()
        expected = F.cross_entropy(logits, labels[read])
        expected.backward()
        assert math.isclose(losses[run], expected.item(), rel_tol=EXACT[dtype], abs_tol=EXACT[dtype])
        difference = (grads.split(classes)[run] - own.grad).norm()
        assert difference <= EXACT[dtype] * max(1.0, own.grad.norm())


def test_the_optimizer_is_sgd_and_freezes_diverged_runs():
    width, steps = 12, 3
    runs, run_of_vector = 4, torch.tensor([0, 0, 1, 2, 3])
    vectors, momentum, grad = (torch.randn(5, width) for _ in range(3))
    decay, coef = torch.rand(2).tolist()
    rates, losses = torch.rand(steps, runs), torch.zeros(steps, runs)
    limit, untrained = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.full((runs,), 0.1)
    left, diverged, counter = torch.tensor([2, 1, 1, 1]), torch.tensor([-1, -1, -1, 0]), torch.tensor([1])
    loss = torch.tensor([5.0, 5.0, torch.nan, 0.5])  # the first run is in its first epoch
    change = coef * momentum + grad + decay * vectors
    moved = vectors - rates[1, run_of_vector, None] * change
    expected = torch.where(torch.tensor([True, True, False, False, False])[:, None], moved, vectors)
    step.note_losses(loss, losses, limit, untrained, left, diverged, counter, 10.0)
    step.sgd(vectors, momentum, grad, run_of_vector, rates, diverged, counter, decay, coef)
    assert relative(momentum, change) < 1e-6
    assert relative(vectors, expected) < 1e-6
    assert torch.equal(losses[1].nan_to_num(), loss.nan_to_num())
    assert diverged.tolist() == [-1, 1, 1, 0]
    assert limit.tolist() == [50.0, 1.0, 1.0, 1.0]
    assert counter.tolist() == [2]
