"""Which nodes of a tree stand together in attention: bundles of paths, and packs of bundles.

Attention is computed by packs, each one batched product over bundles of about equal size:

        constants -- trunk --+-- bundle        trunk: the live nodes above every leaf (end token)
        (start)     (context)+-- bundle        bundle: the nodes below the trunk of one prompt, or of several prompts
                             +-- bundle                that share many nodes, each node once

A node in two bundles is a query in the first; the second holds a copy of its key and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np

from fastcoop.prompts.tree import Tree

NONE = -1  # in place of a node: padding
# Costs of attention in comparisons of a query with a key, about 0.4 us each with 8 heads of 64 on one CPU core.
POSITION_COST = 20  # carrying a position into attention and back
PACK_COST = 1000  # calling a pack's operations
PACK_POSITIONS = 4096  # a pack is cut at this many positions, so that its scores stay in cache


class Bundle(NamedTuple):
    """Nodes of some paths, each once, in depth-first order."""

    constants: list[int]
    live: list[int]


class Packing(NamedTuple):
    """A tree cut into packs of bundles. Where there is a trunk, it is the first pack, a single bundle."""

    constants: list[int]  # constant nodes above every leaf
    has_trunk: bool
    # Nodes of bundles, padded: constants (bundles, before), live (bundles, T).
    packs: list[tuple[np.ndarray, np.ndarray]]


def pack_tree(tree: Tree) -> Packing:
    """Cut ``tree`` into a trunk and bundles, and the bundles into packs."""
    paths = [tree.path(int(leaf)) for leaf in np.unique(tree.leaf)]
    shared = 0  # nodes above every leaf
    while all(shared < len(path) - 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    constants, trunk = split(tree, paths[0][:shared])
    packs = into_packs(bundle_paths(tree, [path[shared:] for path in paths], shared), shared)
    packs = [[Bundle([], trunk)], *packs] if trunk else packs
    of_kinds = (zip(*pack, strict=True) for pack in packs)
    return Packing(constants, bool(trunk), [(padded(before), padded(live)) for before, live in of_kinds])


def bundle_paths(tree: Tree, paths: Sequence[Sequence[int]], shared: int) -> list[Bundle]:
    """Bundle neighboring paths where sharing their common nodes saves more than the masked comparisons cost.

    ``paths`` holds each leaf's nodes, in depth-first order, below the ``shared`` nodes that all positions read.
    """

    def cost(nodes: Sequence[int]) -> int:
        return _cost(1, int(tree.live[nodes].sum()), shared)

    bundles: list[list[int]] = []
    for path in map(list, paths):
        together = sorted({*bundles[-1], *path}) if bundles else []
        if bundles and cost(together) <= cost(bundles[-1]) + cost(path):
            bundles[-1] = together
        else:
            bundles.append(path)
    return [split(tree, nodes) for nodes in bundles]


def into_packs(bundles: Sequence[Bundle], shared: int) -> list[list[Bundle]]:
    """Group bundles of about equal size, the largest first, at the lowest cost of calls and padding."""

    def size(bundle: Bundle) -> int:
        return len(bundle.live)

    sizes = [list(equal) for _, equal in groupby(sorted(bundles, key=size, reverse=True), key=size)]
    best: list[tuple[int, list[list[Bundle]]]] = [(0, [])]  # for the largest size, the two largest, ...
    for end in range(1, len(sizes) + 1):
        ways = []
        for start in range(end):
            cost, packs = best[start]
            last = list(chain(*sizes[start:end]))
            ways.append((cost + PACK_COST + _cost(len(last), size(last[0]), shared), [*packs, last]))
        best.append(min(ways, key=lambda way: way[0]))
    steps = [(pack, max(1, PACK_POSITIONS // size(pack[0]))) for pack in best[-1][1]]
    return [pack[i : i + step] for pack, step in steps for i in range(0, len(pack), step)]


def _cost(bundles: int, length: int, shared: int) -> int:
    return bundles * length * (POSITION_COST + shared + length)


def split(tree: Tree, nodes: Sequence[int]) -> Bundle:
    """Return nodes as a bundle: constants and live nodes, each in the given order."""
    return Bundle(*([node for node in nodes if tree.live[node] == is_live] for is_live in (False, True)))


def padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Return lists of nodes as rows, padded at the end with NONE."""
    rows = np.full((len(lists), max(map(len, lists))), NONE, np.int64)
    for row, nodes in zip(rows, lists, strict=True):
        row[: len(nodes)] = nodes
    return rows
