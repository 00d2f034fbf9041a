"""Which paths stand together: every path whole in one bundle, every bundle in one pack, no way of parting cheaper."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastcoop.engine.packing import (
    PACK_COST,
    PACK_POSITIONS,
    POSITION_COST,
    Bundle,
    bundle_paths,
    into_packs,
)
from fastcoop.prompts.layout import Slot
from fastcoop.prompts.tree import Tree, build_tree

SHARED = 17
START, CONTEXT = Slot(False, 0), Slot(True, 0)
suffixes = st.lists(st.integers(1, 3), min_size=1, max_size=12)


def tree_of(names: list[list[int]]) -> Tree:
    end = Slot(False, 99)
    return build_tree([(START, CONTEXT, *(Slot(False, token) for token in name), end) for name in names])


def paths_below_the_context(tree: Tree) -> list[list[int]]:
    return [tree.path(int(leaf))[2:] for leaf in np.unique(tree.leaf)]


def bundled(names: list[list[int]]) -> list[Bundle]:
    tree = tree_of(names)
    return bundle_paths(tree, paths_below_the_context(tree), SHARED)


def cost(bundles: int, length: int) -> int:
    return bundles * length * (POSITION_COST + SHARED + length)


@given(st.lists(suffixes, min_size=1, max_size=12))
def test_every_path_is_whole_in_a_bundle_whose_nodes_are_in_order_and_come_once(names):
    tree = tree_of(names)
    paths = paths_below_the_context(tree)
    bundles = bundle_paths(tree, paths, SHARED)
    assert all(any(set(path) <= set(bundle.live) for bundle in bundles) for path in paths)
    assert all(a < b for bundle in bundles for a, b in pairwise(bundle.live))
    assert {node for bundle in bundles for node in bundle.live} == {node for path in paths for node in path}


@given(st.lists(suffixes, min_size=1, max_size=12))
def test_bundles_cost_no_more_than_single_paths(names):
    single = sum(cost(1, len(path)) for path in paths_below_the_context(tree_of(names)))
    assert sum(cost(1, len(bundle.live)) for bundle in bundled(names)) <= single


def test_names_that_share_much_are_bundled_and_strangers_are_not():
    makes = [[1, 2, 3, 4, 5, 6, model] for model in range(10, 14)]
    assert len(bundled(makes)) == 1
    assert len(bundled([[word, 2, 3] for word in range(10, 14)])) == 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_no_way_of_parting_the_sizes_is_cheaper(lengths):
    packs = into_packs([Bundle([], list(range(n))) for n in lengths], SHARED)
    assert sorted(len(bundle.live) for pack in packs for bundle in pack) == sorted(lengths)

    sizes = sorted(set(lengths), reverse=True)
    counts = [lengths.count(size) for size in sizes]
    ways = []
    for cuts in product([False, True], repeat=len(sizes) - 1):
        starts = [0, *(i for i, cut in enumerate(cuts, start=1) if cut), len(sizes)]
        ways.append(sum(PACK_COST + cost(sum(counts[a:b]), sizes[a]) for a, b in pairwise(starts)))
    assert sum(PACK_COST + cost(len(pack), len(pack[0].live)) for pack in packs) == min(ways)


def test_a_part_is_cut_where_its_scores_would_leave_the_cache():
    packs = into_packs([Bundle([], list(range(8)))] * PACK_POSITIONS, SHARED)
    assert {len(pack) * 8 for pack in packs} == {PACK_POSITIONS}
