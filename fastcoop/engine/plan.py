"""A token tree laid out for the hardware: rows for the dense products, parts for the attention.

Only live nodes (those with a learned vector at or above them) get a row; the others are constants of the frozen
tower and are only ever read as keys and values. A run's rows are its live nodes in depth-first order.

For attention the tree is cut into parts of equal-length paths, so that each is a handful of batched products:

        constants -- trunk --+-- path          trunk: the live nodes above every leaf (causal among themselves)
        (start)     (context)+-- path          paths: what is left of each prompt below it, grouped by length
                             +-- path

A node's ancestors are then three pieces of keys: the constants and the trunk (shared by all paths), and the
earlier nodes of its own path. Where paths share nodes below the trunk (names that begin alike), the first
owns them as queries; the others only read copies of their keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcoop.prompts.tree import Tree

PAD_SHARE = 0.2  # padding a part may hold before a shorter length gets a part of its own
PART_POSITIONS = 4096  # a part is cut at this many positions, so that its scores stay in cache


@dataclass(frozen=True, eq=False)
class Part:
    """``paths`` paths padded on the left to ``length`` positions, so that each leaf is last.

    ``positions``: this part's slice of the padded order. ``mask`` (paths or 1, length, before + length) is 0 where a
    position may read a path key, else -inf; ``constants`` (paths, before) are tree nodes read as keys before
    the path's own (the class name, when it stands in front), or None.
    """

    paths: int
    length: int
    positions: slice
    mask: Tensor
    constants: np.ndarray | None

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
        return values.index_select(1, self._order) if self._alone else torch.matmul(self._onto, values)


@dataclass(frozen=True, eq=False)
class TreePlan:
    """Index tensors (int64, on the device) that carry a tree's rows into parts and back.

    ``rows``: live nodes, i.e. rows of one run. ``padded``: positions of all parts. ``gather`` (padded,): the row at
    each position. ``place`` (rows,): the position that owns each row. ``unowned``: positions that own none.
    ``copies``, ``copied_rows``: positions holding further copies of shared rows, and those rows; ``sum_copies`` adds
    the former up to the latter. ``leaf_rows`` (leaves,) in the order of the parts; ``class_leaf`` (classes,) into it,
    ``sum_classes`` back. ``learned_rows`` and ``slots`` (equal length): which context vector stands at which row;
    ``sum_slots`` adds rows up to vectors. ``frozen_rows``, ``frozen_tokens``;
    ``depth`` (rows,). ``shared_constants``: tree nodes above every path.
    """

    tree: Tree
    rows: int
    padded: int
    trunk: Part | None
    parts: tuple[Part, ...]
    gather: Tensor
    place: Tensor
    unowned: Tensor
    copies: Tensor
    sum_copies: SumBy
    copied_rows: Tensor
    leaf_rows: Tensor
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


def plan_tree(tree: Tree, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TreePlan:
    """Lay ``tree`` out for ``device``; ``dtype`` is that of the masks."""
    leaves = np.unique(tree.leaf)
    full_paths = {int(leaf): tree.path(int(leaf)) for leaf in leaves}
    common = _common_prefix(list(full_paths.values()))
    shared_constants = np.array([node for node in common if not tree.live[node]], np.int64)
    trunk = [node for node in common if tree.live[node]]
    below = {leaf: path[len(common) :] for leaf, path in full_paths.items()}

    live_nodes = np.flatnonzero(tree.live)
    row_of = np.full(tree.nodes, -1)
    row_of[live_nodes] = np.arange(len(live_nodes))

    order: list[int] = [int(row_of[node]) for node in trunk]
    owned = [True] * len(order)
    pads = [False] * len(order)
    trunk_part = None
    if trunk:
        mask = _causal(len(trunk), [len(trunk)], 0, [0], device, dtype)
        trunk_part = Part(1, len(trunk), slice(0, len(trunk)), mask, None)

    first_path: dict[int, int] = {}  # the depth-first first path through a node owns it
    for leaf in leaves:
        for node in below[int(leaf)]:
            first_path.setdefault(node, int(leaf))
    parts, leaf_order = [], []
    for length, group in _by_length({leaf: int(tree.live[path].sum()) for leaf, path in below.items()}):
        start = len(order)
        before = max(len(below[leaf]) - int(tree.live[below[leaf]].sum()) for leaf in group)
        constants = np.full((len(group), before), int(shared_constants[0]))
        lengths, befores = [], []
        for p, leaf in enumerate(group):
            path = below[leaf]
            live = [node for node in path if tree.live[node]]
            fixed = [node for node in path if not tree.live[node]]
            constants[p, : len(fixed)] = fixed
            lengths.append(len(live))
            befores.append(len(fixed))
            pad = length - len(live)
            order += [0] * pad + [int(row_of[node]) for node in live]
            owned += [False] * pad + [first_path[node] == leaf for node in live]
            pads += [True] * pad + [False] * len(live)
        mask = _causal(length, lengths, before, befores, device, dtype)
        positions = slice(start, len(order))
        parts.append(Part(len(group), length, positions, mask, constants if before else None))
        leaf_order += group

    gather, owner = np.array(order, np.int64), np.array(owned)
    place = np.empty(len(live_nodes), np.int64)
    place[gather[owner]] = np.flatnonzero(owner)
    copies = np.flatnonzero(~owner & ~np.array(pads))
    copied_rows, copied = np.unique(gather[copies], return_inverse=True)
    leaf_index = {leaf: i for i, leaf in enumerate(leaf_order)}
    class_leaf = np.array([leaf_index[int(leaf)] for leaf in tree.leaf])
    learned = tree.learned[live_nodes]
    slots = tree.index[live_nodes][learned]

    def tensor(values: np.ndarray | list[int]) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.int64), device=device)

    return TreePlan(
        tree=tree,
        rows=len(live_nodes),
        padded=len(order),
        trunk=trunk_part,
        parts=tuple(parts),
        gather=tensor(gather),
        place=tensor(place),
        unowned=tensor(np.flatnonzero(~owner)),
        copies=tensor(copies),
        sum_copies=SumBy(copied, device, dtype),
        copied_rows=tensor(copied_rows),
        leaf_rows=tensor(row_of[leaf_order]),
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


def _common_prefix(paths: list[list[int]]) -> list[int]:
    """Nodes above every leaf, the leaves themselves left out."""
    shortest = min(len(path) for path in paths) - 1
    first = paths[0]
    n = 0
    while n < shortest and all(path[n] == first[n] for path in paths):
        n += 1
    return first[:n]


def _by_length(lengths: dict[int, int]) -> list[tuple[int, list[int]]]:
    """Group leaves by path length, longest first; close lengths share a part until padding outgrows PAD_SHARE."""
    groups: list[tuple[int, list[int]]] = []
    padding = positions = 0
    for leaf in sorted(lengths, key=lambda leaf: (-lengths[leaf], leaf)):
        if groups:
            length = groups[-1][0]
            padding += length - lengths[leaf]
            positions += length
            if padding <= PAD_SHARE * positions and positions <= PART_POSITIONS:
                groups[-1][1].append(leaf)
                continue
        groups.append((lengths[leaf], [leaf]))
        padding, positions = 0, lengths[leaf]
    return groups


def _causal(
    length: int,
    lengths: list[int],
    before: int,
    befores: list[int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask (paths, length, before + length); one path's worth (1, ...) where all paths are alike."""
    uniform = len(set(lengths)) == 1 and len(set(befores)) == 1
    lens, fixed = np.array(lengths[:1] if uniform else lengths), np.array(befores[:1] if uniform else befores)
    key = np.arange(length)
    causal = (key[None, :] <= key[:, None])[None]
    real = (key[None, :] >= length - lens[:, None])[:, None, :]
    own = causal & real
    name = np.broadcast_to((np.arange(before) < fixed[:, None])[:, None, :], (len(lens), length, before))
    allowed = np.concatenate([name, own], -1)
    return (
        torch.zeros(allowed.shape, dtype=dtype).masked_fill_(torch.as_tensor(~allowed), -torch.inf).to(device)
    )
