"""Attention over the forest: rows gathered into the packs of each tree, the packs attended, and back.

A position's keys are of two kinds: those that all bundles share (constants and trunk) and those of its own bundle.
Scores against both go into one softmax, so nothing is approximated and nothing is merged afterwards.

Shapes: R runs, H heads, d = width / H, P bundles of T positions, of which Tq have queries, S shared keys, K own keys
(the constants before the bundle, and its T positions). Queries arrive scaled (the weights are folded).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.forest import Forest, PackKey, Workspace
from fastcoop.engine.tree_layout import TreeLayout


@dataclass(eq=False)
class Saved:
    """What a pack's backward pass reads."""

    q: Tensor  # (R, H, P, Tq, d)
    k: Tensor  # (R, H, P, K, d)
    v: Tensor
    shared_k: Tensor  # (R, H, S, d)
    shared_v: Tensor
    probabilities: Tensor  # (R, H, P, Tq, S + K)


def attend(saved: Saved, mask: Tensor, memory: Workspace, out: Tensor) -> None:
    """Fill ``saved.probabilities`` and write the outputs into ``out`` (R, H, P, Tq, d), contiguous.

    ``mask`` (P or 1, Tq, K) is added to the scores against the bundle's own keys.
    """
    q, k, v, probabilities = saved.q, saved.k, saved.v, saved.probabilities
    (R, H, P, T, d), S, K = q.shape, saved.shared_k.shape[2], k.shape[3]
    by_run, by_bundle = (R * H, P * T), (R * H * P, T)
    shared, own = memory.scores_shared(*by_run, S), memory.scores_own(*by_bundle, K)
    torch.bmm(q.view(*by_run, d), saved.shared_k.reshape(R * H, S, d).transpose(1, 2), out=shared)
    torch.bmm(q.view(*by_bundle, d), k.view(R * H * P, K, d).transpose(1, 2), out=own)
    own.view(R * H, P, T, K).add_(mask)
    scores = _side_by_side(shared, own, memory.scores(*probabilities.shape))
    torch.softmax(scores, -1, out=probabilities)
    to_shared, to_own = (
        probabilities.view(*by_run, S + K)[..., :S],
        probabilities.view(*by_bundle, S + K)[..., S:],
    )
    torch.bmm(to_shared, saved.shared_v.reshape(R * H, S, d), out=out.view(*by_run, d))
    out.view(*by_bundle, d).baddbmm_(to_own, v.view(R * H * P, K, d))


def attend_backward(
    grad: Tensor,
    saved: Saved,
    memory: Workspace,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_shared: Tensor | None,
) -> None:
    """Write the gradients of q, k and v, and add those of the shared keys and values.

    Args:
        grad: Of the outputs, (R, H, P, Tq, d), contiguous.
        saved: What `attend` kept.
        memory: For the scores.
        grads: Of q (R, H, P, Tq, d), and of k and v (R, H, P, T, d), without the constants; contiguous.
        grad_shared: (2, R, H, S, d); None where nothing reads it.
    """
    grad_q, grad_k, grad_v = grads
    q, k, v, probabilities = saved.q, saved.k, saved.v, saved.probabilities
    (R, H, P, T, d), S, K, own_keys = q.shape, saved.shared_k.shape[2], k.shape[3], grad_k.shape[3]
    by_run, by_bundle = (R * H, P * T), (R * H * P, T)
    grad_run, grad_bundle = grad.view(*by_run, d), grad.view(*by_bundle, d)

    shared, own = memory.scores_shared(*by_run, S), memory.scores_own(*by_bundle, K)
    torch.bmm(grad_run, saved.shared_v.reshape(R * H, S, d).transpose(1, 2), out=shared)
    torch.bmm(grad_bundle, v.view(R * H * P, K, d).transpose(1, 2), out=own)
    grad_probabilities = _side_by_side(shared, own, memory.scores(*probabilities.shape))
    scores = memory.grad_scores(*probabilities.shape)
    softmax_backward(grad_probabilities, probabilities, scores)

    scores_shared, scores_bundle = scores.view(*by_run, S + K)[..., :S], scores.view(*by_bundle, S + K)
    probs_bundle, q_bundle = probabilities.view(*by_bundle, S + K), q.view(*by_bundle, d)
    torch.bmm(scores_shared, saved.shared_k.reshape(R * H, S, d), out=grad_q.view(*by_run, d))
    grad_q.view(*by_bundle, d).baddbmm_(scores_bundle[..., S:], k.view(R * H * P, K, d))
    of_keys = (R * H * P, own_keys, d)
    torch.bmm(scores_bundle[..., -own_keys:].transpose(1, 2), q_bundle, out=grad_k.view(of_keys))
    torch.bmm(probs_bundle[..., -own_keys:].transpose(1, 2), grad_bundle, out=grad_v.view(of_keys))
    if grad_shared is not None:
        probs_shared = probabilities.view(*by_run, S + K)[..., :S]
        grad_shared[0].view(R * H, S, d).baddbmm_(scores_shared.transpose(1, 2), q.view(*by_run, d))
        grad_shared[1].view(R * H, S, d).baddbmm_(probs_shared.transpose(1, 2), grad_run)


def softmax_backward(grad: Tensor, probabilities: Tensor, out: Tensor) -> None:
    """Write the gradient of the scores behind ``probabilities`` (softmax over the last axis) into ``out``."""
    fused = getattr(torch, "_softmax_backward_data", None)  # private to torch, in one pass
    if fused is not None:
        fused(grad, probabilities, -1, probabilities.dtype, grad_input=out)
    else:
        torch.mul(grad, probabilities, out=out)
        out.addcmul_(probabilities, out.sum(-1, keepdim=True), value=-1)


def _side_by_side(shared: Tensor, own: Tensor, out: Tensor) -> Tensor:
    """Concatenate both kinds of scores in ``out`` (R, H, P, Tq, S + K), for one softmax."""
    pieces = [piece.view(*out.shape[:-1], piece.shape[-1]) for piece in (shared, own)]
    return torch.cat(pieces, -1, out=out)


class Routes:
    """Where each slice of a row stands in the packs, for ``runs`` (R) runs of one tree at once.

    A row's query, key and value are 3 H slices of d numbers, one of each per head. Dense products have the slices row
    by row; attention wants them pack by pack, each pack as queries, keys and values (R, H, P, T, d). With every slice
    numbered, gathering positions and transposing heads is one ``index_select`` instead of two passes over memory.

    Example: R = H = 1, the classes "cat" and "dog" behind one vector, so five live nodes: v, cat, end, dog, end. Row
    r has the slices 3r (query), 3r + 1 (key), 3r + 2 (value). The trunk [v] is the first pack; the bundles
    [cat, end] and [dog, end] are the second::

        slices in the packs    0 1 2 | 3 4 5 6 | 7 8 9 10 | 11 12 13 14
        their content          q k v | queries | keys     | values
        of the rows            0 0 0 | 1 2 3 4 | 1 2 3 4  | 1 2 3 4
        rows_to_packs          0 1 2 | 3 6 9 12| 4 7 10 13| 5 8 11 14     pack slice -> row slice
        packs_to_rows          0 1 2, 3 7 11, 4 8 12, 5 9 13, 6 10 14     row slice -> pack slice

    Outputs are numbered like the queries alone, 0 to 4, so query_index and output_index are 0 1 2 3 4. With
    ``ends``, only the end tokens (rows 2 and 4) have queries, as in the last layer: both are [0, 1].
    """

    rows_to_packs: Tensor  # (slices,) the row slice at each pack slice
    packs_to_rows: Tensor  # (R rows 3 H,) the pack slice of each row slice; any, where a row has no query
    query_index: (
        Tensor  # (queries,) for each query of the packs, the row (R queried rows H,) that its output goes to
    )
    output_index: Tensor  # (R queried rows H,) the query that computes each row's output
    unused_queries: Tensor  # queries of padding and of copies: no row reads their output
    copies: Tensor  # (R copies 2 H,) pack slices of copied keys and values
    masks: list[Tensor]  # of each pack, for the queries that it has

    def __init__(self, layout: TreeLayout, heads: int, runs: int, ends: bool):
        device, R, H = layout.copied_rows.device, runs, heads
        queried = layout.leaf_owner if ends else layout.owner
        qkv = np.full((R, layout.positions, 3, H), -1)  # the pack slices of each position
        outputs = np.full((R, layout.positions, H), -1)  # the query of each position
        self.masks = []
        self._shapes: list[tuple[int, int, int]] = []  # bundles, queries and positions of each pack
        self.slices = self.queries = 0
        for pack in layout.packs:
            P, T = pack.bundles, pack.length
            positions = pack.positions.start + np.arange(P * T).reshape(P, T)
            with_query = np.take_along_axis(positions, pack.ends, 1) if ends else positions
            for kind, at in enumerate((with_query, positions, positions)):
                numbers = np.arange(R * H * at.size).reshape(R, H, *at.shape).transpose(0, 2, 3, 1)
                qkv[:, at, kind] = self.slices + numbers
                self.slices += numbers.size
                if kind == 0:
                    outputs[:, at] = self.queries + numbers
                    self.queries += numbers.size
            self._shapes.append((P, with_query.shape[1], T))
            at_ends = torch.as_tensor(pack.ends, device=device)[..., None]
            self.masks.append(pack.mask.take_along_dim(at_ends, 1) if ends else pack.mask)

        run = np.arange(R)[:, None]
        row_slices = ((run * layout.rows + layout.gather)[..., None] * 3 * H + np.arange(3 * H)).reshape(
            qkv.shape
        )
        number = np.zeros(layout.positions, np.int64)
        number[queried] = np.arange(len(queried))
        row_outputs = (run * len(queried) + number)[..., None] * H + np.arange(H)

        def tensor(numbers: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(numbers.ravel()), device=device)

        self._runs, self._heads = R, H
        self.rows_to_packs = tensor(_inverse(qkv, row_slices, self.slices))
        self.packs_to_rows = tensor(np.maximum(qkv[:, layout.owner], 0))
        self.query_index = tensor(_inverse(outputs, row_outputs, self.queries))
        self.output_index = tensor(outputs[:, queried])
        self.unused_queries = tensor(np.setdiff1d(np.arange(self.queries), outputs[:, queried]))
        self.copies = tensor(qkv[:, layout.copies, 1:])

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


class ForestRoutes:
    """The routes of a forest, whose runs are attended in chunks of about ``chunk`` positions."""

    def __init__(self, forest: Forest, chunk: int):
        self.chunk = chunk
        self._routes = {
            (i, runs, ends): Routes(group.layout, forest.tower.heads, runs, ends)
            for i, group in enumerate(forest.groups)
            for runs in {runs.stop - runs.start for runs in group.chunks(chunk)}
            for ends in (False, True)
        }

    def __call__(self, group: int, runs: slice, ends: bool) -> Routes:
        return self._routes[group, runs.stop - runs.start, ends]


class ForestAttention:
    """Attention of every layer of a forest, group by group and in chunks of runs, so that scores stay in cache.

    With ``ends``, only end tokens have queries, as in the last layer. With ``keep``, what backward reads is kept.
    """

    def __init__(self, forest: Forest, routes: ForestRoutes, memory: Workspace, keep: bool):
        self.forest, self.routes, self.memory, self.keep = forest, routes, memory, keep
        self.saved: dict[PackKey, Saved] = {}

    def forward(self, layer: int, qkv: Tensor, ends: bool) -> Tensor:
        """Return the outputs (rows, width) for ``qkv`` (rows, 3 width); (leaves, width) with ``ends``."""
        forest, memory, width = self.forest, self.memory, self.forest.tower.width
        d = width // forest.tower.heads
        result = memory.attended(forest.leaves if ends else forest.rows, width)
        for i, g in enumerate(forest.groups):
            rows = qkv[g.rows].view(g.runs, -1, d)
            queried = result[g.leaves if ends else g.rows].view(g.runs, -1, d)
            for runs in g.chunks(self.routes.chunk):
                routes = self.routes(i, runs, ends)
                key = (layer, i, runs.start) if self.keep else (0, 0, 0)
                slices = memory.slices[key](routes.slices, d)
                torch.index_select(rows[runs].view(-1, d), 0, routes.rows_to_packs, out=slices)
                outputs = memory.attended_slices(routes.queries, d)
                self._packs_forward(layer, i, runs, routes, slices, outputs)
                torch.index_select(outputs, 0, routes.output_index, out=queried[runs].view(-1, d))
        result[forest.live_leaves if ends else forest.live_rows :].zero_()
        return result

    def backward(self, layer: int, grad: Tensor, ends: bool) -> Tensor:
        """Return the gradient of ``qkv`` (rows, 3 width) from that of the outputs.

        With ``ends``, the queries' gradient is defined at the leaves only.
        """
        forest, memory, width = self.forest, self.memory, self.forest.tower.width
        d = width // forest.tower.heads
        result = memory.grad_qkv(forest.rows, 3 * width)
        for i, g in enumerate(forest.groups):
            rows = result[g.rows].view(g.runs, -1, d)
            queried = grad[g.leaves if ends else g.rows].view(g.runs, -1, d)
            for runs in g.chunks(self.routes.chunk):
                routes = self.routes(i, runs, ends)
                outputs = memory.attended_slices(routes.queries, d)
                torch.index_select(queried[runs].view(-1, d), 0, routes.query_index, out=outputs)
                outputs.index_fill_(0, routes.unused_queries, 0.0)
                slices = memory.grad_slices(routes.slices, d)
                self._packs_backward(layer, i, runs, routes, outputs, slices)
                torch.index_select(slices, 0, routes.packs_to_rows, out=rows[runs].view(-1, d))
                if len(g.layout.copies):
                    copies = slices.index_select(0, routes.copies).view(-1, len(g.layout.copies), 2 * width)
                    whole = rows[runs].view(-1, g.layout.rows, 3 * width)
                    whole[:, g.layout.copied_rows, width:] += g.layout.sum_copies(copies)
        result[forest.live_rows :].zero_()
        return result

    def _packs_forward(
        self, layer: int, i: int, runs: slice, routes: Routes, slices: Tensor, outputs: Tensor
    ) -> None:
        """Write the outputs of all queries in ``slices``; the trunk comes first, since all others read its keys."""
        layout, constants = self.forest.groups[i].layout, self.forest.groups[i].constants
        shared_k, shared_v = constants.shared[layer].expand(runs.stop - runs.start, -1, -1, -1, -1).unbind(1)
        packs = zip(layout.packs, routes.qkv(slices), routes.outputs(outputs), strict=True)
        for p, (pack, (q, k, v), out) in enumerate(packs):
            before = constants.packs[layer][p]
            if before is not None:
                before_k, before_v = before[:, None].expand(-1, len(k), -1, -1, -1, -1)
                k, v = torch.cat([before_k, k], 3), torch.cat([before_v, v], 3)
            if out.numel():
                key = (layer, i, runs.start, p) if self.keep else (0, 0, 0, 0)
                scores = (*q.shape[:4], shared_k.shape[2] + k.shape[3])
                saved = Saved(q, k, v, shared_k, shared_v, self.memory.probabilities[key](*scores))
                attend(saved, routes.masks[p], self.memory, out)
                if self.keep:
                    self.saved[key] = saved
            if pack is layout.trunk:
                shared_k = torch.cat([shared_k, k[:, :, 0]], 2)
                shared_v = torch.cat([shared_v, v[:, :, 0]], 2)

    def _packs_backward(
        self, layer: int, i: int, runs: slice, routes: Routes, grad: Tensor, into: Tensor
    ) -> None:
        """Write the gradients of all slices ``into`` place from the outputs' ``grad``; the trunk comes last."""
        layout, constants = self.forest.groups[i].layout, self.forest.groups[i].constants.shared[layer]
        R, (_, H, S, d) = runs.stop - runs.start, constants.shape
        trunk = layout.trunk.length if layout.trunk else 0
        shared = grad.new_zeros(2, R, H, S + trunk, d)
        below = shared if trunk else None  # constants have no gradient
        grads, blocks = routes.outputs(grad), routes.qkv(into)
        for p in reversed(range(len(layout.packs))):
            is_trunk, (_, grad_k, grad_v) = layout.packs[p] is layout.trunk, blocks[p]
            saved = self.saved.get((layer, i, runs.start, p))
            if saved is None:  # the pack had no queries
                grad_k.zero_()
                grad_v.zero_()
            else:
                attend_backward(grads[p], saved, self.memory, blocks[p], None if is_trunk else below)
            if is_trunk:
                grad_k[:, :, 0] += shared[0, :, :, S:]
                grad_v[:, :, 0] += shared[1, :, :, S:]
