"""A token tree laid out for the hardware: rows for the dense products, parts for the attention.

Only live nodes (those with a learned vector at or above them) get a row; the others are constants of the frozen
tower and are only ever read as keys and values. A run's rows are its live nodes in depth-first order.

For attention the tree is cut into bundles of paths, and bundles of about equal size are a part, so that each part is
a handful of batched products:

        constants -- trunk --+-- bundle        trunk: the live nodes above every leaf (causal among themselves)
        (start)     (context)+-- bundle        bundle: what is left below it of one prompt, or of several that
                             +-- bundle                share much, each node once

A node's ancestors are then three pieces of keys: the constants and the trunk (shared by all bundles), and those nodes
of its own bundle whose subtree it is in. A node in two bundles is a query in the first; the other only reads a copy
of its key and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.bundles import Bundle, bundle_paths, into_parts
from fastcoop.engine.rows import bmm
from fastcoop.prompts.tree import Tree

NONE = -1  # in place of a tree node: a position that only fills a part up


@dataclass(frozen=True, eq=False)
class Part:
    """``bundles`` bundles, padded at the end to ``length`` positions.

    ``positions``: this part's slice of the padded order. ``mask`` (bundles or 1, length, before + length) is 0 where a
    position may read a key of its bundle, else -inf. ``constants`` (bundles, before) are tree nodes read as keys before
    the bundle's own (class names, when they stand in front), or None. ``ends``
    (bundles, most end tokens of one): positions in each bundle of its end tokens and, where it has fewer, of others.
    """

    bundles: int
    length: int
    positions: slice
    mask: Tensor
    constants: np.ndarray | None
    ends: np.ndarray

    @property
    def before(self) -> int:
        return 0 if self.constants is None else self.constants.shape[1]


class SumBy:
    """Sums values (runs, n, width) into (runs, count, width) by ``index`` (n,), in which every number below
    ``count`` occurs.

    As a product with a 0/1 matrix the order of the sum is fixed, where a scatter with atomics is not reproducible.
    """

    def __init__(self, index: np.ndarray, device: torch.device | str, dtype: torch.dtype):
        count = int(index.max()) + 1 if len(index) else 0
        self._alone = count == len(index)  # one value each: nothing to add
        if self._alone:
            self._order = torch.as_tensor(np.argsort(index), device=device)
        else:
            onto = torch.zeros(count, len(index), dtype=dtype)
            onto[torch.as_tensor(index), torch.arange(len(index))] = 1.0
            self._onto = onto.to(device)

    def __call__(self, values: Tensor) -> Tensor:
        if self._alone:
            return values.index_select(1, self._order)
        return bmm(self._onto.expand(len(values), -1, -1), values)


@dataclass(frozen=True, eq=False)
class TreePlan:
    """A tree's rows, its parts, and indices (int64; tensors are on the device) from one to the other.

    ``rows``: live nodes, i.e. rows of one run. ``parts``: the trunk first, where there is one. ``padded``: positions of
    all parts. ``gather`` (padded,): the row at each position. ``place`` (rows,): the position that owns each row.
    ``copies``, ``copied_rows``: positions holding further copies of shared rows, and those rows; ``sum_copies`` adds
    the former up to the latter. ``leaf_rows`` (leaves,): rows of the end tokens, ``leaf_place`` their positions;
    ``class_leaf`` (classes,) into them, ``sum_classes`` back. ``learned_rows`` and ``slots`` (equal length): which
    context vector stands at which row; ``sum_slots`` adds rows up to vectors. ``frozen_rows``, ``frozen_tokens``;
    ``depth`` (rows,). ``shared_constants``: tree nodes above every path.
    """

    tree: Tree
    rows: int
    padded: int
    trunk: Part | None
    parts: tuple[Part, ...]
    gather: np.ndarray
    place: np.ndarray
    copies: np.ndarray
    sum_copies: SumBy
    copied_rows: Tensor
    leaf_rows: Tensor
    leaf_place: np.ndarray
    class_leaf: Tensor
    sum_classes: SumBy
    learned_rows: Tensor
    slots: Tensor
    slot_count: int
    sum_slots: SumBy
    frozen_rows: Tensor
    frozen_tokens: Tensor
    depth: Tensor
    shared_constants: np.ndarray

    @property
    def leaves(self) -> int:
        return len(self.leaf_rows)


class TreeLayout(NamedTuple):
    """How a tree's nodes stand in attention.

    Attributes:
        constants: Constant nodes above every end token.
        has_trunk: Whether live nodes stand above every end token; they are then the first part, a single bundle.
        parts: Bundles of about equal size.
    """

    constants: list[int]
    has_trunk: bool
    parts: list[list[Bundle]]

    @staticmethod
    def lengths(part: Sequence[Bundle]) -> tuple[int, int]:
        """Constants and live nodes of a part's largest bundles, to which the others are padded."""
        return max(len(bundle.constants) for bundle in part), max(len(bundle.live) for bundle in part)


def lay_out(tree: Tree) -> TreeLayout:
    """Cut ``tree`` into a trunk and bundles of paths, and those into parts."""
    paths = [tree.path(int(leaf)) for leaf in np.unique(tree.leaf)]
    common = _common_prefix(paths)
    trunk = Bundle([], [node for node in common if tree.live[node]])
    parts = into_parts(bundle_paths(tree, [path[len(common) :] for path in paths], len(common)), len(common))
    constants = [node for node in common if not tree.live[node]]
    return TreeLayout(constants, bool(trunk.live), [[trunk], *parts] if trunk.live else parts)


def plan_tree(tree: Tree, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TreePlan:
    """Lay ``tree`` out for ``device``; ``dtype`` is that of the masks."""
    leaves, class_leaf = np.unique(tree.leaf, return_inverse=True)
    layout = lay_out(tree)
    groups = layout.parts
    shared_constants = np.array(layout.constants, np.int64)
    parts, order, start = [], [], 0
    for group in groups:
        before, length = layout.lengths(group)
        keys = np.full((len(group), before + length), NONE, np.int64)
        for row, bundle in zip(keys, group, strict=True):
            row[: len(bundle.constants)] = bundle.constants
            row[before : before + len(bundle.live)] = bundle.live
        constants, nodes = np.split(keys, [before], axis=1)
        is_end = np.isin(nodes, tree.leaf)
        ends = np.argsort(~is_end, axis=1, kind="stable")[:, : is_end.sum(1).max()]
        parts.append(
            Part(
                bundles=len(group),
                length=length,
                positions=slice(start, start := start + nodes.size),
                mask=_mask(tree, nodes, keys, dtype).to(device),
                constants=np.where(constants == NONE, 0, constants) if before else None,
                ends=ends,
            )
        )
        order.append(nodes.ravel())

    live_nodes = np.flatnonzero(tree.live)
    row_of = np.full(tree.nodes, NONE, np.int64)
    row_of[live_nodes] = np.arange(len(live_nodes))
    nodes = np.concatenate(order)
    padding = nodes == NONE
    gather = np.where(padding, 0, row_of[nodes])
    distinct, first = np.unique(nodes, return_index=True)
    place = first[distinct != NONE]
    owned = np.isin(np.arange(len(nodes)), place)
    copies = np.flatnonzero(~owned & ~padding)
    copied_rows, copied = np.unique(gather[copies], return_inverse=True)
    learned = tree.learned[live_nodes]
    slots = tree.index[live_nodes][learned]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=device)

    return TreePlan(
        tree=tree,
        rows=len(live_nodes),
        padded=len(nodes),
        trunk=parts[0] if layout.has_trunk else None,
        parts=tuple(parts),
        gather=gather,
        place=place,
        copies=copies,
        sum_copies=SumBy(copied, device, dtype),
        copied_rows=tensor(copied_rows),
        leaf_rows=tensor(row_of[leaves]),
        leaf_place=place[row_of[leaves]],
        class_leaf=tensor(class_leaf),
        sum_classes=SumBy(class_leaf, device, dtype),
        learned_rows=tensor(np.flatnonzero(learned)),
        slots=tensor(slots),
        slot_count=int(slots.max()) + 1,
        sum_slots=SumBy(slots, device, dtype),
        frozen_rows=tensor(np.flatnonzero(~learned)),
        frozen_tokens=tensor(tree.index[live_nodes][~learned]),
        depth=tensor(tree.depth[live_nodes]),
        shared_constants=shared_constants,
    )


def _common_prefix(paths: Sequence[list[int]]) -> list[int]:
    """Nodes above every leaf, the leaves themselves left out."""
    shortest = min(len(path) for path in paths) - 1
    first = paths[0]
    n = 0
    while n < shortest and all(path[n] == first[n] for path in paths):
        n += 1
    return first[:n]


def _mask(tree: Tree, queries: np.ndarray, keys: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Additive mask (bundles or 1, queries, keys): a node reads those whose subtree it is in.

    ``queries`` (bundles, queries) and ``keys`` (bundles, keys) are tree nodes or NONE. One mask where all are alike.
    """
    key, query = keys[:, None, :], queries[:, :, None]
    allowed = (key != NONE) & (key <= query) & (query < tree.subtree_end[key])
    if (allowed == allowed[:1]).all():
        allowed = allowed[:1]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(torch.as_tensor(~allowed), -torch.inf)
