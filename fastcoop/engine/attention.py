"""Attention over the forest: rows gathered into the packs of each tree, the packs attended, and back.

A position's keys are of two kinds: those that all bundles share (constants and trunk) and those of its own bundle.
Scores against both go into one softmax, so nothing is approximated and, unlike in flash-attention,
no partial softmaxes are merged afterwards.

Shapes: R runs, H heads, d = width / H, P bundles of T positions, of which Tq have queries, S shared keys
(constants; below the trunk, the trunk's positions too), K own keys (the constants before the bundle, and its T
positions). Queries arrive scaled (the weights are folded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcoop.engine.forest import Forest, PackKey, Workspace
from fastcoop.engine.tree_layout import Routes


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


class ForestAttention:
    """Attention of every layer of a forest, group by group and in chunks of runs, so that scores stay in cache.

    With ``leaves_only``, only end tokens have queries, as in the last layer. With ``keep``, what backward reads is
    kept.
    """

    def __init__(self, forest: Forest, memory: Workspace, keep: bool):
        self.forest, self.memory, self.keep = forest, memory, keep
        self.saved: dict[PackKey, Saved] = {}

    def forward(self, layer: int, qkv: Tensor, leaves_only: bool) -> Tensor:
        """Return the outputs (rows, width) for ``qkv`` (rows, 3 width); (leaves, width) with ``leaves_only``."""
        forest, memory, width = self.forest, self.memory, self.forest.tower.width
        d = width // forest.tower.heads
        result = memory.attended(forest.leaves if leaves_only else forest.rows, width)
        for i, g in enumerate(forest.groups):
            rows = qkv[g.rows].view(g.runs, -1, d)
            queried = result[g.leaves if leaves_only else g.rows].view(g.runs, -1, d)
            for runs in forest.chunks(g):
                routes = forest.routes[i, runs.stop - runs.start, leaves_only]
                key = (layer, i, runs.start) if self.keep else (0, 0, 0)
                slices = memory.slices[key](routes.slices, d)
                torch.index_select(rows[runs].view(-1, d), 0, routes.rows_to_packs, out=slices)
                outputs = memory.attended_slices(routes.queries, d)
                self._packs_forward(layer, i, runs, routes, slices, outputs)
                torch.index_select(outputs, 0, routes.output_index, out=queried[runs].view(-1, d))
        result[forest.used_leaves if leaves_only else forest.used_rows :].zero_()
        return result

    def backward(self, layer: int, grad: Tensor, leaves_only: bool) -> Tensor:
        """Return the gradient of ``qkv`` (rows, 3 width) from that of the outputs.

        With ``leaves_only``, the queries' gradient is defined at the leaves only.
        """
        forest, memory, width = self.forest, self.memory, self.forest.tower.width
        d = width // forest.tower.heads
        result = memory.grad_qkv(forest.rows, 3 * width)
        for i, g in enumerate(forest.groups):
            rows = result[g.rows].view(g.runs, -1, d)
            queried = grad[g.leaves if leaves_only else g.rows].view(g.runs, -1, d)
            for runs in forest.chunks(g):
                routes = forest.routes[i, runs.stop - runs.start, leaves_only]
                outputs = memory.attended_slices(routes.queries, d)
                torch.index_select(queried[runs].view(-1, d), 0, routes.query_index, out=outputs)
                outputs.index_fill_(0, routes.unused_queries, 0.0)
                slices = memory.grad_slices(routes.slices, d)
                self._packs_backward(layer, i, runs, routes, outputs, slices)
                torch.index_select(slices, 0, routes.packs_to_rows, out=rows[runs].view(-1, d))
                if len(g.tree_layout.copies):
                    copies = slices.index_select(0, routes.copies).view(
                        -1, len(g.tree_layout.copies), 2 * width
                    )
                    whole = rows[runs].view(-1, g.tree_layout.rows, 3 * width)
                    whole[:, g.tree_layout.copied_rows, width:] += g.tree_layout.sum_copies(copies)
        result[forest.used_rows :].zero_()
        return result

    def _packs_forward(
        self, layer: int, i: int, runs: slice, routes: Routes, slices: Tensor, outputs: Tensor
    ) -> None:
        """Write the outputs of all queries in ``slices``; the trunk comes first, since all others read its keys."""
        tree_layout, constants = self.forest.groups[i].tree_layout, self.forest.groups[i].constants
        shared_k, shared_v = constants.shared[layer].expand(runs.stop - runs.start, -1, -1, -1, -1).unbind(1)
        packs = zip(tree_layout.packs, routes.qkv(slices), routes.outputs(outputs), strict=True)
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
            if pack is tree_layout.trunk:  # from here on all packs read the trunk, too: S grows by its length
                shared_k = torch.cat([shared_k, k[:, :, 0]], 2)
                shared_v = torch.cat([shared_v, v[:, :, 0]], 2)

    def _packs_backward(
        self, layer: int, i: int, runs: slice, routes: Routes, grad: Tensor, into: Tensor
    ) -> None:
        """Write the gradients of all slices ``into`` place from the outputs' ``grad``; the trunk comes last."""
        tree_layout, constants = (
            self.forest.groups[i].tree_layout,
            self.forest.groups[i].constants.shared[layer],
        )
        R, (_, H, C, d) = runs.stop - runs.start, constants.shape  # C constants
        trunk = tree_layout.trunk.length if tree_layout.trunk else 0
        # Gradients of the shared keys and values: the constants', then the trunk's.
        shared = grad.new_zeros(2, R, H, C + trunk, d)
        below = shared if trunk else None  # constants have no gradient
        grads, blocks = routes.outputs(grad), routes.qkv(into)
        for p in reversed(range(len(tree_layout.packs))):
            is_trunk, (_, grad_k, grad_v) = tree_layout.packs[p] is tree_layout.trunk, blocks[p]
            saved = self.saved.get((layer, i, runs.start, p))
            if saved is None:  # the pack had no queries
                grad_k.zero_()
                grad_v.zero_()
            else:
                attend_backward(grads[p], saved, self.memory, blocks[p], None if is_trunk else below)
            if is_trunk:
                grad_k[:, :, 0] += shared[0, :, :, C:]
                grad_v[:, :, 0] += shared[1, :, :, C:]
