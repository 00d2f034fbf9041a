"""The numbered way of rows into parts and back, beside the plain one: positions indexed, axes turned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcoop.engine.plan import TreePlan, plan_tree
from fastcoop.engine.routes import Routes
from fastcoop.prompts.layout import Slot
from fastcoop.prompts.tree import build_tree

HEADS, D = 2, 3
START, CONTEXT, END = Slot(False, 0), Slot(True, 0), Slot(False, 99)
trees = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=12)
both = pytest.mark.parametrize("ends", [False, True])


def plan_of(names: list[list[int]]) -> TreePlan:
    return plan_tree(
        build_tree([(START, CONTEXT, *(Slot(False, token) for token in name), END) for name in names])
    )


@both
@given(trees, st.integers(1, 3))
def test_parts_get_the_rows_of_their_positions_head_by_head(ends, names, runs):
    plan = plan_of(names)
    routes = Routes(plan, HEADS, runs, ends)
    rows = torch.randn(runs, plan.rows, 3, HEADS, D)
    q, k, v = rows[:, torch.as_tensor(plan.gather)].permute(2, 0, 3, 1, 4)  # (R, H, padded, d)
    blocks = routes.qkv(rows.view(-1, D)[routes.read])
    for part, (part_q, part_k, part_v), mask in zip(plan.parts, blocks, routes.masks, strict=True):
        shape = (runs, HEADS, part.bundles, part.length, D)
        assert torch.equal(part_k, k[:, :, part.positions].view(shape))
        assert torch.equal(part_v, v[:, :, part.positions].view(shape))
        asked, masked = q[:, :, part.positions].view(shape), part.mask
        if ends:
            at = torch.as_tensor(part.ends)
            asked = asked.take_along_dim(at[None, None, :, :, None], 3)
            masked = masked.take_along_dim(at[..., None], 1)
        assert torch.equal(part_q, asked)
        assert torch.equal(mask, masked)


@both
@given(trees, st.integers(1, 3))
def test_rows_get_back_what_the_position_that_owns_them_has(ends, names, runs):
    plan = plan_of(names)
    routes = Routes(plan, HEADS, runs, ends)
    rows = torch.randn(runs, plan.rows, 3, HEADS, D)
    slices = rows.view(-1, D)[routes.read]
    back = slices[routes.write].view(rows.shape)
    asking = plan.leaf_rows if ends else slice(None)
    assert torch.equal(back[:, :, 1:], rows[:, :, 1:])
    assert torch.equal(back[:, asking, 0], rows[:, asking, 0])
    copies = slices[routes.copies].view(runs, len(plan.copies), 2, HEADS, D)
    assert torch.equal(copies, rows[:, torch.as_tensor(plan.gather[plan.copies]), 1:])


@both
@given(trees, st.integers(1, 3))
def test_every_row_that_asks_gets_one_answer_and_other_queries_are_silent(ends, names, runs):
    plan = plan_of(names)
    routes = Routes(plan, HEADS, runs, ends)
    askers = len(plan.leaf_rows) if ends else plan.rows
    wanted = torch.randn(runs * askers * HEADS, D)
    queries = wanted[routes.ask]
    queries[routes.silent] = torch.nan
    assert torch.equal(queries[routes.answer], wanted)
    assert len(routes.answer) + len(routes.silent) == len(queries)
