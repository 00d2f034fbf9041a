"""Attention over the forest: rows gathered into the packs of each tree, the packs attended, and back.

A query's keys are of two kinds: those that all bundles share (constants and trunk) and those of its own bundle. Scores
against both go into one softmax, so nothing is approximated and, unlike in flash-attention, no partial softmaxes are
merged afterwards.

Shapes: R runs, H heads, d = width / H, P bundles of T positions, of which Q have queries, S shared keys (constants;
below the trunk, the trunk's positions too), K own keys (the constants before the bundle, and its T positions).
Queries arrive scaled (the weights are folded).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.forest import Forest, Group, Workspace
from fastcoop.engine.tree_layout import TreeLayout


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

    Attributes (int64 on the tree's device):
        rows_to_packs: (slices,) the row slice at each pack slice.
        packs_to_rows: (R rows 3 H,) the pack slice of each row slice; any, where a row has no query.
        query_index: (queries,) the row output (R queried rows H,) that belongs to each query.
        output_index: (R queried rows H,) the query that belongs to each row output.
        unused_queries: Queries of padding and of copies: no row reads their output.
        copies: (R copies 2 H,) pack slices of copied keys and values.
        masks: Of each pack, for the queries that it has: (P or 1, Q, K), added to the scores.
    """

    def __init__(self, tree_layout: TreeLayout, heads: int, runs: int, leaves_only: bool):
        layout, device = tree_layout, tree_layout.copied_rows.device
        parts: list[np.ndarray] = []  # positions of the queries, keys and values of each pack
        # Of each pack's queries, and of its keys with its values.
        self._shapes: list[tuple[int, ...]] = []
        self.masks: list[Tensor] = []
        for positions, mask, _, places in layout.packs:
            queries = np.take_along_axis(positions, places, 1) if leaves_only else positions
            parts += [queries, positions, positions]
            self._shapes += [(runs, heads, *queries.shape), (2, runs, heads, *positions.shape)]
            at = torch.as_tensor(places, device=device)[..., None]
            self.masks.append(mask.take_along_dim(at, 1) if leaves_only else mask)
        slice_at, slice_of = _number(parts, runs, layout.positions, 3, heads)
        query_at, query_of = _number(parts[::3], runs, layout.positions, 1, heads)
        self.slices, self.queries = len(slice_at), len(query_at)

        queried = layout.leaf_query_positions if leaves_only else layout.query_positions
        place = np.zeros(layout.positions, np.int64)  # of each queried position among its run's outputs
        place[queried] = np.arange(len(queried))
        row_slices = _count(runs, layout.rows, 3 * heads)[:, layout.gather]
        row_outputs = _count(runs, len(queried), heads)[:, place]
        read = query_of[:, queried]

        def tensor(numbers: np.ndarray) -> Tensor:
            return torch.as_tensor(numbers.ravel(), device=device)

        self.rows_to_packs = tensor(row_slices.ravel()[slice_at])
        self.packs_to_rows = tensor(slice_of[:, layout.query_positions])
        self.query_index = tensor(row_outputs.ravel()[query_at])
        self.output_index = tensor(read)
        self.unused_queries = tensor(np.setdiff1d(np.arange(self.queries), read))
        self.copies = tensor(slice_of[:, layout.copies, 1:])

    def qkv(self, slices: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each pack's queries (R, H, P, Q, d), and keys with values (2, R, H, P, T, d): views of ``slices``."""
        views = iter(_views(slices, self._shapes))
        return list(zip(views, views, strict=True))

    def outputs(self, queries: Tensor) -> list[Tensor]:
        """Return each pack's outputs (R, H, P, Q, d), views of ``queries`` (queries, d)."""
        return _views(queries, self._shapes[::2])


def _views(slices: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return parts of ``slices`` (n, d), one after another, in these shapes."""
    parts = slices.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape, slices.shape[1]) for part, shape in zip(parts, shapes, strict=True)]


def _count(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def _number(parts: Sequence[np.ndarray], *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Number (R, positions, kinds, H), and return the numbers in the order of ``parts``, and where each one is there.

    Parts are positions of each kind in turn; the numbers of a part are in the order (R, H, *positions).
    """
    number, kinds = _count(*shape), shape[2]
    ordered = [number[:, part, n % kinds].transpose(0, 3, 1, 2).ravel() for n, part in enumerate(parts)]
    at = np.concatenate(ordered)
    place = np.zeros(number.size, np.int64)
    place[at] = np.arange(len(at))
    return at, place.reshape(shape)


class PackAttention:
    """Attention of all layers of one forest, by batched products, chunk by chunk and pack by pack.

    A chunk is so few runs of a group that their scores stay in a CPU's cache. In the last layer only leaves have
    queries and outputs. Spare rows get zeros, which nothing reads.
    """

    def __init__(self, forest: Forest):
        self.forest, self.width, heads = forest, forest.tower.width, forest.tower.heads
        self.last, self.d = len(forest.tower.blocks) - 1, self.width // heads
        routes = cache(partial(Routes, heads=heads))  # chunks of equal trees and numbers of runs share them
        # The chunks, their routes and the places of their outputs, in all layers but the last, and in the last.
        self.chunks: tuple[list[tuple[Group, Routes, slice]], ...] = [], []
        for group in forest.groups:
            _ = group.tree_layout.packed_constants  # computed here, since a step may not wait for the host
            for chunk in group.split(max(1, forest.chunk // group.tree_layout.positions)):
                for chunks, leaves_only in zip(self.chunks, (False, True), strict=True):
                    own = routes(chunk.tree_layout, runs=chunk.runs, leaves_only=leaves_only)
                    chunks.append((chunk, own, chunk.leaves if leaves_only else chunk.rows))

    def qkv(self, layer: int, workspace: Workspace) -> Tensor:
        """Return the memory (rows, 3 width) into which the tower writes a layer's queries, keys and values."""
        qkv = workspace.qkv(self.forest.rows, 3 * self.width)
        # Packs are padded with queries of other rows, which must be finite. The last layer writes those of leaves only;
        # the others hold an earlier layer's, unless this is the only layer.
        if layer == self.last == 0:
            qkv[:, : self.width].zero_()
        return qkv

    def forward(self, layer: int, workspace: Workspace) -> Tensor:
        """Return the outputs (rows, width) for what is in ``qkv``; in the last layer (leaves, width)."""
        forest, is_last, d = self.forest, layer == self.last, self.d
        qkv = workspace.qkv(forest.rows, 3 * self.width)
        result = workspace.attended(forest.leaves if is_last else forest.rows, self.width)
        for chunk, routes, places in self.chunks[is_last]:
            products = workspace.layers[layer].products.get(chunk)
            if products is None:
                products = ChunkProducts(layer, chunk, routes, workspace)
            torch.index_select(qkv[chunk.rows].view(-1, d), 0, routes.rows_to_packs, out=products.slices)
            for call in products.forward:
                call()
            torch.index_select(products.outputs, 0, routes.output_index, out=result[places].view(-1, d))
        result[forest.used_leaves if is_last else forest.used_rows :].zero_()
        return result

    def backward(self, layer: int, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of ``qkv`` (rows, 3 width) from that of the outputs.

        In the last layer, the queries' gradient is defined at leaves only.
        """
        d, width = self.d, self.width
        result = workspace.grad_qkv(self.forest.rows, 3 * width)
        for chunk, routes, places in self.chunks[layer == self.last]:
            products = workspace.layers[layer].products[chunk]
            torch.index_select(grad[places].view(-1, d), 0, routes.query_index, out=products.outputs)
            products.outputs.index_fill_(0, routes.unused_queries, 0.0)
            for call in products.backward:
                call()
            layout, rows, slices = chunk.tree_layout, result[chunk.rows], products.grad_slices
            torch.index_select(slices, 0, routes.packs_to_rows, out=rows.view(-1, d))
            if len(layout.copies):
                copies = slices.index_select(0, routes.copies).view(chunk.runs, -1, 2 * width)
                of_run = rows.view(chunk.runs, layout.rows, 3 * width)
                of_run[:, layout.copied_rows, width:] += layout.sum_copies(copies)
        result[self.forest.used_rows :].zero_()
        return result


Calls = list[Callable[[], object]]  # of operations on fixed memory, in their order


class ChunkProducts:
    """The attention of one chunk in one layer, as lists of operations that every step repeats on the same memory.

    Slicing and reshaping the tensors in each step took 4 to 8 % of it in a tower of width 128.

    Attributes:
        slices: (slices, d), queries, keys and values by pack.
        outputs: (queries, d), the outputs by pack, or their gradient.
        forward: Writes the outputs.
        grad_slices, backward: The gradient of ``slices``, and what writes it from that in ``outputs``. They exist where
            the workspace keeps what a backward pass needs.
    """

    def __init__(self, layer: int, chunk: Group, routes: Routes, workspace: Workspace):
        layout, runs, memory = chunk.tree_layout, chunk.runs, workspace.layers[layer]
        key = chunk if workspace.keep else None
        constants, *befores = layout.packed_constants[layer]
        _, H, count, d = constants.shape
        self.slices = memory.slices[key](routes.slices, d)
        self.outputs = workspace.attended_slices(routes.queries, d)
        self.forward: Calls = []
        # Keys and values that all bundles share, (2, R, H, S, d): constants, which are written here, and the trunk's.
        trunk = layout.trunk.positions.size if layout.trunk else 0
        shared = memory.shared_kv[key](2, runs, H, count + trunk, d)
        shared[..., :count, :] = constants[:, None]
        if workspace.keep:
            self.grad_slices = workspace.grad_slices(routes.slices, d)
            grad_shared, grads = workspace.grad_shared(*shared.shape), routes.qkv(self.grad_slices)
            self.backward: Calls = [grad_shared.zero_] if trunk else []
            backwards: list[Calls] = []  # of the packs
        blocks = zip(
            routes.qkv(self.slices), routes.outputs(self.outputs), befores, routes.masks, strict=True
        )
        for p, ((q, kv), out, before, mask) in enumerate(blocks):
            read, own, length, is_trunk = shared, kv, before.shape[3], trunk > 0 and p == 0
            if is_trunk:  # all other packs read its keys
                read = shared[..., :count, :]
                self.forward.append(partial(shared[..., count:, :].copy_, kv[:, :, :, 0]))
            if before.numel():
                own = memory.own_kv[key, p](*kv.shape[:4], length + kv.shape[4], d)
                own[..., :length, :] = before[:, None]
                self.forward.append(partial(own[..., length:, :].copy_, kv))
            if out.numel():
                calls, scores = _scores(q, read[0], own[0], mask, workspace)
                probabilities = memory.probabilities[key, p](*scores.shape)
                softmax = partial(torch.softmax, scores, -1, out=probabilities)
                self.forward += [*calls, softmax, *_weighted_sum(probabilities, read[1], own[1], out)]
            if workspace.keep:
                grad_q, grad_kv = grads[p]
                calls = [grad_kv.zero_]  # where the pack has no queries
                if out.numel():
                    below = grad_shared if trunk and not is_trunk else None
                    pack = out, q, own, read, probabilities
                    calls = _attend_backward(*pack, workspace, grad_q, grad_kv, below)
                if is_trunk:
                    calls.append(partial(grad_kv[:, :, :, 0].add_, grad_shared[..., count:, :]))
                backwards.append(calls)
        if workspace.keep:
            memory.products[chunk] = self
            self.backward += chain.from_iterable(reversed(backwards))  # the trunk comes last


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    shared: Tensor,
    probabilities: Tensor,
    workspace: Workspace,
    grad_q: Tensor,
    grad_kv: Tensor,
    grad_shared: Tensor | None,
) -> Calls:
    """Return what writes the gradients of q, k and v, without the constants before them, from that of the outputs.

    Those of the shared keys and values are added to ``grad_shared`` (2, R, H, S, d), unless nothing reads them.
    """
    S, T = shared.shape[3], grad_kv.shape[4]
    calls, grad_probabilities = _scores(grad, shared[1], kv[1], None, workspace)
    grad_scores = workspace.grad_scores(*probabilities.shape)
    calls.append(partial(softmax_backward, grad_probabilities, probabilities, grad_scores))
    calls += _weighted_sum(grad_scores, shared[0], kv[0], grad_q)
    for n, (weights, x) in enumerate(((grad_scores, q), (probabilities, grad))):  # of keys, of values
        own = _by_bundle(weights[..., -T:]).mT
        calls.append(partial(torch.bmm, own, _by_bundle(x), out=_by_bundle(grad_kv[n])))
        if grad_shared is not None:
            of_shared = _by_head(weights[..., :S]).mT
            calls.append(partial(_by_head(grad_shared[n]).baddbmm_, of_shared, _by_head(x)))
    return calls


def _scores(
    x: Tensor, shared: Tensor, own: Tensor, mask: Tensor | None, workspace: Workspace
) -> tuple[Calls, Tensor]:
    """Return what writes the products of x (R, H, P, Q, d) with shared and own keys, side by side, and the products.

    Shared keys are (R, H, S, d), own ones (R, H, P, K, d).
    """
    dims, S, K = x.shape[:4], shared.shape[2], own.shape[3]
    with_shared, with_own = workspace.scores_shared(*dims, S), workspace.scores_own(*dims, K)
    both = workspace.scores(*dims, S + K)
    calls: Calls = [
        partial(torch.bmm, _by_head(x), _by_head(shared).mT, out=_by_head(with_shared)),
        partial(torch.bmm, _by_bundle(x), _by_bundle(own).mT, out=_by_bundle(with_own)),
        *([] if mask is None else [partial(with_own.add_, mask)]),
        partial(torch.cat, [with_shared, with_own], -1, out=both),
    ]
    return calls, both


def _weighted_sum(weights: Tensor, shared: Tensor, own: Tensor, out: Tensor) -> Calls:
    """Return what writes the sums of shared (R, H, S, d) and own (R, H, P, K, d) by weights into ``out``."""
    S = shared.shape[2]
    return [
        partial(torch.bmm, _by_head(weights[..., :S]), _by_head(shared), out=_by_head(out)),
        partial(_by_bundle(out).baddbmm_, _by_bundle(weights[..., S:]), _by_bundle(own)),
    ]


def _by_head(x: Tensor) -> Tensor:
    """Return a view of (R, H, ..., m) with one matrix per run and head."""
    return x.flatten(0, 1).flatten(1, -2)


def _by_bundle(x: Tensor) -> Tensor:
    """Return a view of (R, H, P, n, m) with one matrix per bundle."""
    return x.flatten(0, 2)


def softmax_backward(grad: Tensor, probabilities: Tensor, out: Tensor) -> None:
    """Write the gradient of the scores behind ``probabilities`` (softmax over the last axis) into ``out``."""
    fused = getattr(torch, "_softmax_backward_data", None)  # private to torch, in one pass
    if fused is not None:
        fused(grad, probabilities, -1, probabilities.dtype, grad_input=out)
    else:
        torch.mul(grad, probabilities, out=out)
        out.addcmul_(probabilities, out.sum(-1, keepdim=True), value=-1)
