"""A token tree laid out for the hardware: rows for the dense products, packs for attention.

Only live nodes (with a learned vector at or above them) get a row; the others are constants of the frozen tower and
are only read, as keys and values. A run's rows are its live nodes in depth-first order.

For attention the tree is cut into bundles of paths. Bundles of about equal size form a pack, one batched product:

        constants -- trunk --+-- bundle        trunk: the live nodes above every end token
        (start)     (context)+-- bundle        bundle: the nodes below the trunk of one prompt, or of several prompts
                             +-- bundle                that share many nodes, each node once

A node reads three kinds of keys: the constants and the trunk (shared by all bundles), and the nodes of its own bundle
whose subtree contains it. A node in two bundles is a query in the first; the second holds a copy of its key and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.weights import bmm
from fastcoop.errors import UserError
from fastcoop.prompts.layout import PromptLayout, Tokenizer, class_prompts
from fastcoop.prompts.tree import Tree, build_tree
from fastcoop.remember import remember

NONE = -1  # in place of a node: padding
# Costs of attention, in comparisons of a query with a key: about 0.4 microseconds with 8 heads of 64 on the CPU core
# where the other two were estimated.
POSITION_COST = 20  # carrying a position into attention and back
PACK_COST = 1000  # calling a pack's operations
PACK_POSITIONS = 4096  # a pack is cut at this many positions, so that its scores stay in cache

TreeKey = tuple[tuple[str, ...], PromptLayout]


def tree_key(class_names: Sequence[str], layout: PromptLayout) -> TreeKey:
    """Return what identifies a tree. Raises UserError for a single name in place of a list of names."""
    if isinstance(class_names, str):
        raise UserError(f'Expected a list of class names, got the single name "{class_names}".')
    return tuple(class_names), layout


@remember(64)
def tree_of(
    tokenizer: Tokenizer, names: tuple[str, ...], layout: PromptLayout, length: int, end_id: int | None
) -> Tree:
    """Return the tree of a run's prompts.

    ``length`` is the number of the tower's positions. ``end_id`` is the token that the tower reads its output at; None
    for the largest of a prompt.

    Raises UserError for a prompt that does not fit the tower, or that the tower reads elsewhere than at its end.
    """
    prompts = class_prompts(tokenizer, names, layout, length)
    for prompt in prompts:
        tokens = [slot.number for slot in prompt if not slot.learned]
        read = max(tokens) if end_id is None else end_id
        if read not in tokens or tokens.index(read) != len(tokens) - 1:
            raise UserError(
                f"This text tower reads its output at token {read}, but its tokenizer ends a prompt with token "
                f"{tokens[-1]}; choose a tokenizer that belongs to the tower."
            )
    return build_tree(prompts)


class Bundle(NamedTuple):
    """Nodes of some paths, each once, in depth-first order."""

    constants: list[int]
    live: list[int]


class Packing(NamedTuple):
    """A tree cut into packs of bundles. Where there is a trunk, it is the first pack, a single bundle."""

    constants: list[int]  # constant nodes above every end token
    has_trunk: bool
    packs: list[list[Bundle]]


def pack_tree(tree: Tree) -> Packing:
    """Cut ``tree`` into a trunk and bundles, and the bundles into packs."""
    paths = [tree.path(int(leaf)) for leaf in np.unique(tree.leaf)]
    shared = 0  # nodes above every end token
    while all(shared < len(path) - 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    common = paths[0][:shared]
    trunk = Bundle([], [node for node in common if tree.live[node]])
    packs = into_packs(bundle_paths(tree, [path[shared:] for path in paths], shared), shared)
    constants = [node for node in common if not tree.live[node]]
    return Packing(constants, bool(trunk.live), [[trunk], *packs] if trunk.live else packs)


def bundle_paths(tree: Tree, paths: Sequence[Sequence[int]], shared: int) -> list[Bundle]:
    """Bundle neighboring paths where sharing their common nodes saves more than the masked comparisons cost.

    ``paths`` holds each end token's nodes, in depth-first order, below the ``shared`` nodes that all positions read.
    """
    bundles: list[Bundle] = []
    for path in paths:
        constants, live = ([node for node in path if tree.live[node] == is_live] for is_live in (False, True))
        if bundles:
            last = bundles[-1]
            new = sorted(set(live).difference(last.live))
            together = _cost(1, len(last.live) + len(new), shared)
            apart = _cost(1, len(last.live), shared) + _cost(1, len(live), shared)
            if together <= apart:
                last.live.extend(new)
                last.constants.extend(sorted(set(constants).difference(last.constants)))
                continue
        bundles.append(Bundle(constants, live))
    return bundles


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
    cut = []
    for pack in best[-1][1]:
        step = max(1, PACK_POSITIONS // size(pack[0]))
        cut += [pack[i : i + step] for i in range(0, len(pack), step)]
    return cut


def _cost(bundles: int, length: int, shared: int) -> int:
    return bundles * length * (POSITION_COST + shared + length)


@dataclass(frozen=True, eq=False)
class Pack:
    """Bundles padded at the end to ``length`` positions each."""

    bundles: int
    length: int
    positions: slice  # among the positions of all packs
    mask: Tensor  # (bundles or 1, length, before + length): 0 where a position reads a key of its bundle, else -inf
    constants: np.ndarray | None  # (bundles, before) constant nodes read before the bundle's own keys
    leaf_places: np.ndarray  # (bundles, most leaves of one): places of leaves, filled up with other places

    @property
    def before(self) -> int:
        return 0 if self.constants is None else self.constants.shape[1]


class OrderedSum:
    """Sums values (runs, n, width) with equal ``index`` (n,) into (runs, count, width), always in the same order.

    A product with a 0/1 matrix; a scatter with atomics is not reproducible. Every index below ``count`` occurs.
    """

    def __init__(self, index: np.ndarray, device: torch.device | str, dtype: torch.dtype):
        count = int(index.max()) + 1 if len(index) else 0
        self._is_permutation = count == len(index)
        if self._is_permutation:
            self._order = torch.as_tensor(np.argsort(index), device=device)
        else:
            onto = torch.zeros(count, len(index), dtype=dtype)
            onto[torch.as_tensor(index), torch.arange(len(index))] = 1.0
            self._onto = onto.to(device)

    def __call__(self, values: Tensor) -> Tensor:
        if self._is_permutation:
            return values.index_select(1, self._order)
        return bmm(self._onto.expand(len(values), -1, -1), values)


class TreeLayout:
    """A tree's rows and packs, and the int64 indices between them; tensors are on ``device``, masks in ``dtype``."""

    def __init__(self, tree: Tree, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        def tensor(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, device=device)

        self.tree = tree
        packing = pack_tree(tree)
        self.shared_constants = np.array(
            packing.constants, np.int64
        )  # constant nodes that every position reads
        packs, order, start = [], [], 0
        for bundles in packing.packs:
            before, length = (max(len(nodes) for nodes in kind) for kind in zip(*bundles, strict=True))
            keys = np.full((len(bundles), before + length), NONE, np.int64)
            for row, bundle in zip(keys, bundles, strict=True):
                row[: len(bundle.constants)] = bundle.constants
                row[before : before + len(bundle.live)] = bundle.live
            constants, nodes = np.split(keys, [before], axis=1)
            is_leaf = np.isin(nodes, tree.leaf)
            leaf_places = np.argsort(~is_leaf, axis=1, kind="stable")[:, : is_leaf.sum(1).max()]
            mask = _mask(tree, nodes, keys, dtype).to(device)
            filled = np.where(constants == NONE, 0, constants) if before else None
            positions = slice(start, start := start + nodes.size)
            packs.append(Pack(len(bundles), length, positions, mask, filled, leaf_places))
            order.append(nodes.ravel())
        self.packs = tuple(packs)
        self.trunk = packs[0] if packing.has_trunk else None

        live_nodes = np.flatnonzero(tree.live)
        row_of = np.full(tree.nodes, NONE, np.int64)
        row_of[live_nodes] = np.arange(len(live_nodes))
        nodes = np.concatenate(order)
        padding = nodes == NONE
        self.rows = len(live_nodes)  # of one run
        self.positions = len(nodes)  # of all packs
        self.gather = np.where(
            padding, 0, row_of[nodes]
        )  # (positions,) the row at each position; row 0 as padding
        distinct, first = np.unique(nodes, return_index=True)
        self.query_positions = first[distinct != NONE]  # (rows,) the position where each row is a query
        is_query = np.isin(np.arange(len(nodes)), self.query_positions)
        self.copies = np.flatnonzero(~is_query & ~padding)  # positions that hold further copies of a row
        copied_rows, copied = np.unique(self.gather[self.copies], return_inverse=True)
        self.copied_rows = tensor(copied_rows)
        self.sum_copies = OrderedSum(copied, device, dtype)  # from copies to copied_rows

        leaves, class_leaf = np.unique(tree.leaf, return_inverse=True)
        self.leaves = len(leaves)  # distinct end tokens of one run
        self.leaf_rows = tensor(row_of[leaves])  # (leaves,)
        self.leaf_query_positions = self.query_positions[row_of[leaves]]  # (leaves,)
        self.class_leaf = tensor(class_leaf)  # (classes,) each class's leaf
        self.sum_classes = OrderedSum(class_leaf, device, dtype)  # from classes to leaves

        learned = tree.learned[live_nodes]
        slots = tree.index[live_nodes][learned]
        self.learned_rows = tensor(np.flatnonzero(learned))  # rows with a context vector
        self.slots = tensor(slots)  # the vector at each learned row
        self.slot_count = int(slots.max()) + 1  # context vectors of one run
        self.sum_slots = OrderedSum(slots, device, dtype)  # from learned rows to vectors
        self.frozen_rows = tensor(np.flatnonzero(~learned))  # rows with a token
        self.frozen_tokens = tensor(tree.index[live_nodes][~learned])
        self.depth = tensor(tree.depth[live_nodes])  # (rows,) the row's position in its prompt


def _mask(tree: Tree, queries: np.ndarray, keys: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of nodes (bundles, queries) reading (bundles, keys); one where all are equal."""
    key, query = keys[:, None, :], queries[:, :, None]
    allowed = (key != NONE) & (key <= query) & (query < tree.subtree_end[key])
    if (allowed == allowed[:1]).all():
        allowed = allowed[:1]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(torch.as_tensor(~allowed), -torch.inf)


class Routes:
    """Where each slice of a row is in the packs, for ``runs`` (R) runs of one tree at once.

    A slice is one head's part, d numbers, of a row's query, key or value: a row has 3 H. Dense products have the slices
    row by row; attention wants them pack by pack, each pack as queries, keys and values (R, H, P, T, d). With every
    slice numbered, gathering positions and transposing heads is one ``index_select`` instead of two passes over memory.

    Example: R = H = 1, the classes "cat" and "dog" behind one vector, so five live nodes: v, cat, end, dog, end. Row
    r has the slices 3r (query), 3r + 1 (key), 3r + 2 (value). The trunk [v] is the first pack; the bundles
    [cat, end] and [dog, end] are the second::

        slices in the packs    0 1 2 | 3 4 5 6 | 7 8 9 10 | 11 12 13 14
        their content          q k v | queries | keys     | values
        of the rows            0 0 0 | 1 2 3 4 | 1 2 3 4  | 1 2 3 4
        rows_to_packs          0 1 2 | 3 6 9 12| 4 7 10 13| 5 8 11 14     pack slice -> row slice
        packs_to_rows          0 1 2, 3 7 11, 4 8 12, 5 9 13, 6 10 14     row slice -> pack slice

    With H = 2, row r has the slices 6r (query of head 0), 6r + 1 (query of head 1), 6r + 2 (key of head 0) to 6r + 5,
    and each part of a pack holds head 0's positions, then head 1's: the queries of the second pack are the row
    slices 6 12 18 24, 7 13 19 25.

    Outputs are numbered like the queries alone, 0 to 4, so query_index and output_index are 0 1 2 3 4. With
    ``leaves_only``, only the end tokens (rows 2 and 4) have queries, as in the last layer: both are [0, 1].
    """

    rows_to_packs: Tensor  # (slices,) the row slice at each pack slice
    packs_to_rows: Tensor  # (R rows 3 H,) the pack slice of each row slice; any, where a row has no query
    query_index: Tensor  # (queries,) the row output (R queried rows H,) that belongs to each query
    output_index: Tensor  # (R queried rows H,) the query that belongs to each row output
    unused_queries: Tensor  # queries of padding and of copies: no row reads their output
    copies: Tensor  # (R copies 2 H,) pack slices of copied keys and values
    masks: list[Tensor]  # of each pack, for the queries that it has

    def __init__(self, tree_layout: TreeLayout, heads: int, runs: int, leaves_only: bool):
        device, R, H = tree_layout.copied_rows.device, runs, heads
        queried = tree_layout.leaf_query_positions if leaves_only else tree_layout.query_positions
        qkv = np.full((R, tree_layout.positions, 3, H), -1)  # the pack slices of each position
        outputs = np.full((R, tree_layout.positions, H), -1)  # the query of each position
        self.masks = []
        self._shapes: list[tuple[int, int, int]] = []  # bundles, queries and positions of each pack
        self.slices = self.queries = 0
        for pack in tree_layout.packs:
            P, T = pack.bundles, pack.length
            positions = pack.positions.start + np.arange(P * T).reshape(P, T)
            with_query = np.take_along_axis(positions, pack.leaf_places, 1) if leaves_only else positions
            for kind, at in enumerate((with_query, positions, positions)):
                numbers = np.arange(R * H * at.size).reshape(R, H, *at.shape).transpose(0, 2, 3, 1)
                qkv[:, at, kind] = self.slices + numbers
                self.slices += numbers.size
                if kind == 0:
                    outputs[:, at] = self.queries + numbers
                    self.queries += numbers.size
            self._shapes.append((P, with_query.shape[1], T))
            at_leaves = torch.as_tensor(pack.leaf_places, device=device)[..., None]
            self.masks.append(pack.mask.take_along_dim(at_leaves, 1) if leaves_only else pack.mask)

        run = np.arange(R)[:, None]
        row_slices = (
            (run * tree_layout.rows + tree_layout.gather)[..., None] * 3 * H + np.arange(3 * H)
        ).reshape(qkv.shape)
        number = np.zeros(tree_layout.positions, np.int64)
        number[queried] = np.arange(len(queried))
        row_outputs = (run * len(queried) + number)[..., None] * H + np.arange(H)

        def tensor(numbers: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(numbers.ravel()), device=device)

        self._runs, self._heads = R, H
        self.rows_to_packs = tensor(_inverse(qkv, row_slices, self.slices))
        self.packs_to_rows = tensor(np.maximum(qkv[:, tree_layout.query_positions], 0))
        self.query_index = tensor(_inverse(outputs, row_outputs, self.queries))
        self.output_index = tensor(outputs[:, queried])
        self.unused_queries = tensor(np.setdiff1d(np.arange(self.queries), outputs[:, queried]))
        self.copies = tensor(qkv[:, tree_layout.copies, 1:])

    def qkv(self, slices: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each pack's queries, keys and values (R, H, P, positions, d), views of ``slices`` (slices, d)."""
        blocks = iter(self._split(slices, [n for P, Q, T in self._shapes for n in ((P, Q), (P, T), (P, T))]))
        return list(zip(blocks, blocks, blocks, strict=True))

    def outputs(self, queries: Tensor) -> list[Tensor]:
        """Return each pack's outputs (R, H, P, queries, d), views of ``queries`` (queries, d)."""
        return self._split(queries, [(P, Q) for P, Q, _ in self._shapes])

    def _split(self, slices: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
        blocks = slices.split([self._runs * self._heads * P * T for P, T in shapes])
        return [
            block.view(self._runs, self._heads, *shape, slices.shape[1])
            for block, shape in zip(blocks, shapes, strict=True)
        ]


def _inverse(numbers: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Return the value at each number below ``size``, all of which occur; -1 is no number."""
    known = numbers >= 0
    inverse = np.empty(size, np.int64)
    inverse[numbers[known]] = values[known]
    return inverse
