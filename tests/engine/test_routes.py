"""The numbered way of rows into parts and back, beside the plain one: positions indexed, axes turned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcoop.engine.attention import Routes
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.engine.weights import fold
from fastcoop.prompts.layout import Slot
from fastcoop.prompts.tree import build_tree
from tests.engine.conftest import tiny_backbone

HEADS, D = 2, 3
START, CONTEXT, END = Slot(False, 0), Slot(True, 0), Slot(False, 99)
trees = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=12)
tower = fold(tiny_backbone(torch.float32, layers=1).text)
both = pytest.mark.parametrize("leaves_only", [False, True])


def layout_of(names: list[list[int]]) -> TreeLayout:
    prompts = [(START, CONTEXT, *(Slot(False, token) for token in name), END) for name in names]
    return TreeLayout(build_tree(prompts), tower)


@both
@given(trees, st.integers(1, 3))
def test_parts_get_the_rows_of_their_positions_head_by_head(leaves_only, names, runs):
    layout = layout_of(names)
    routes = Routes(layout, HEADS, runs, leaves_only)
    rows = torch.randn(runs, layout.rows, 3, HEADS, D)
    q, k, v = rows[:, torch.as_tensor(layout.gather)].permute(2, 0, 3, 1, 4)  # (R, H, padded, d)
    blocks = routes.qkv(rows.view(-1, D)[routes.rows_to_packs])
    for pack, (pack_q, (pack_k, pack_v)), mask in zip(layout.packs, blocks, routes.masks, strict=True):
        shape = (runs, HEADS, *pack.positions.shape, D)
        assert torch.equal(pack_k, k[:, :, pack.positions.ravel()].view(shape))
        assert torch.equal(pack_v, v[:, :, pack.positions.ravel()].view(shape))
        asked, masked = q[:, :, pack.positions.ravel()].view(shape), pack.mask
        if leaves_only:
            at = torch.as_tensor(pack.leaf_places)
            asked = asked.take_along_dim(at[None, None, :, :, None], 3)
            masked = masked.take_along_dim(at[..., None], 1)
        assert torch.equal(pack_q, asked)
        assert torch.equal(mask, masked)


@both
@given(trees, st.integers(1, 3))
def test_rows_get_back_what_the_position_that_owns_them_has(leaves_only, names, runs):
    layout = layout_of(names)
    routes = Routes(layout, HEADS, runs, leaves_only)
    rows = torch.randn(runs, layout.rows, 3, HEADS, D)
    slices = rows.view(-1, D)[routes.rows_to_packs]
    back = slices[routes.packs_to_rows].view(rows.shape)
    asking = layout.leaf_rows if leaves_only else slice(None)
    assert torch.equal(back[:, :, 1:], rows[:, :, 1:])
    assert torch.equal(back[:, asking, 0], rows[:, asking, 0])
    copies = slices[routes.copies].view(runs, len(layout.copies), 2, HEADS, D)
    assert torch.equal(copies, rows[:, torch.as_tensor(layout.gather[layout.copies]), 1:])


@both
@given(trees, st.integers(1, 3))
def test_every_row_that_asks_gets_one_answer_and_other_queries_are_silent(leaves_only, names, runs):
    layout = layout_of(names)
    routes = Routes(layout, HEADS, runs, leaves_only)
    askers = len(layout.leaf_rows) if leaves_only else layout.rows
    wanted = torch.randn(runs * askers * HEADS, D)
    queries = wanted[routes.query_index]
    queries[routes.unused_queries] = torch.nan
    assert torch.equal(queries[routes.output_index], wanted)
    assert len(routes.output_index) + len(routes.unused_queries) == len(queries)


def test_the_worked_example_of_the_docstring():
    layout = layout_of([[1], [2]])
    routes = Routes(layout, heads=1, runs=1, leaves_only=False)
    assert routes.rows_to_packs.tolist() == [0, 1, 2, 3, 6, 9, 12, 4, 7, 10, 13, 5, 8, 11, 14]
    assert routes.packs_to_rows.tolist() == [0, 1, 2, 3, 7, 11, 4, 8, 12, 5, 9, 13, 6, 10, 14]
    assert routes.query_index.tolist() == routes.output_index.tolist() == [0, 1, 2, 3, 4]
    two_heads = Routes(layout, heads=2, runs=1, leaves_only=False)
    assert two_heads.rows_to_packs[6:14].tolist() == [6, 12, 18, 24, 7, 13, 19, 25]
    last = Routes(layout, heads=1, runs=1, leaves_only=True)
    assert last.query_index.tolist() == last.output_index.tolist() == [0, 1]
