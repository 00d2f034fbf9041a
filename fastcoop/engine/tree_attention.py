"""A layer's attention over the whole forest: its rows into the parts of each tree, the parts attended, and back.

Group by group, and a group's runs in chunks, so that what is held at once is bounded and stays in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcoop.engine.attention import Saved, attend, attend_backward
from fastcoop.engine.buffers import Buffers
from fastcoop.engine.forest import Forest, Group
from fastcoop.engine.routes import Routes


class TreeAttention:
    """Attention of every layer of ``forest``, ``chunk`` rows at a time; keeps what its backward pass reads.

    ``ends``: only end tokens ask, as in the last layer.
    """

    def __init__(self, forest: Forest, buffer: Buffers, chunk: int):
        self.forest, self.buffer, self.chunk = forest, buffer, chunk
        # By layer, group, first run of the chunk, and part.
        self.saved: dict[tuple[int, int, int, int], Saved] = {}
        self._routes = {  # by group, runs of a chunk, and whether only ends ask
            (i, runs, ends): Routes(g.plan, forest.tower.heads, runs, ends)
            for i, g in enumerate(forest.groups)
            for runs in {chunk.stop - chunk.start for chunk in self._run_chunks(g)}
            for ends in (False, True)
        }

    def forward(self, layer: int, qkv: Tensor, ends: bool) -> Tensor:
        """Return the attended values (rows, width) of ``qkv`` (rows, 3 width); (leaves, width) where only ends ask."""
        width, d = self.forest.tower.width, self.forest.tower.width // self.forest.tower.heads
        result = self.buffer("attended", self.forest.leaves if ends else self.forest.rows, width)
        for i, g in enumerate(self.forest.groups):
            rows = qkv[g.rows].view(g.runs, -1, d)
            askers = result[g.leaves if ends else g.rows].view(g.runs, -1, d)
            for runs in self._run_chunks(g):
                routes = self._routes[i, runs.stop - runs.start, ends]
                slices = self.buffer(("slices", layer, i, runs.start), routes.slices, d)
                torch.index_select(rows[runs].view(-1, d), 0, routes.read, out=slices)
                attended = self.buffer("attended slices", routes.queries, d)
                self._parts_forward(layer, i, runs, routes, slices, attended)
                torch.index_select(attended, 0, routes.answer, out=askers[runs].view(-1, d))
        result[self.forest.live_leaves if ends else self.forest.live_rows :].zero_()
        return result

    def backward(self, layer: int, grad: Tensor, ends: bool) -> Tensor:
        """Return the gradient of q, k and v (rows, 3 width) from ``grad``, of what ``forward`` returned.

        Where only ends ask, q's is defined at the leaves only.
        """
        width, d = self.forest.tower.width, self.forest.tower.width // self.forest.tower.heads
        result = self.buffer("qkv", self.forest.rows, 3 * width)
        for i, g in enumerate(self.forest.groups):
            rows = result[g.rows].view(g.runs, -1, d)
            askers = grad[g.leaves if ends else g.rows].view(g.runs, -1, d)
            for runs in self._run_chunks(g):
                routes = self._routes[i, runs.stop - runs.start, ends]
                attended = self.buffer("attended slices", routes.queries, d)
                torch.index_select(askers[runs].view(-1, d), 0, routes.ask, out=attended)
                attended.index_fill_(0, routes.silent, 0.0)
                slices = self.buffer("slices", routes.slices, d)
                self._parts_backward(layer, i, runs, routes, attended, slices)
                torch.index_select(slices, 0, routes.write, out=rows[runs].view(-1, d))
                if len(g.plan.copies):
                    copies = slices.index_select(0, routes.copies).view(-1, len(g.plan.copies), 2 * width)
                    whole = rows[runs].view(-1, g.plan.rows, 3 * width)
                    whole[:, g.plan.copied_rows, width:] += g.plan.sum_copies(copies)
        result[self.forest.live_rows :].zero_()
        return result

    def _parts_forward(
        self, layer: int, i: int, runs: slice, routes: Routes, slices: Tensor, attended: Tensor
    ) -> None:
        """Write what the queries in ``slices`` get into ``attended``, the trunk's first: all others read its keys."""
        plan, constants = self.forest.groups[i].plan, self.forest.groups[i].constants
        shared_k, shared_v = constants.shared[layer].expand(runs.stop - runs.start, -1, -1, -1, -1).unbind(1)
        blocks = zip(plan.parts, routes.qkv(slices), routes.attended(attended), strict=True)
        for p, (part, (q, k, v), out) in enumerate(blocks):
            before = constants.parts[layer][p]
            if before is not None:
                before_k, before_v = before[:, None].expand(-1, len(k), -1, -1, -1, -1)
                k, v = torch.cat([before_k, k], 3), torch.cat([before_v, v], 3)
            if out.numel():
                key = (layer, i, runs.start, p)
                scores = (*q.shape[:4], shared_k.shape[2] + k.shape[3])
                probabilities = self.buffer(("probabilities", *key), *scores)
                self.saved[key] = Saved(q, k, v, shared_k, shared_v, probabilities)
                attend(self.saved[key], routes.masks[p], self.buffer, out)
            if part is plan.trunk:
                shared_k, shared_v = (
                    torch.cat([shared_k, k[:, :, 0]], 2),
                    torch.cat([shared_v, v[:, :, 0]], 2),
                )

    def _parts_backward(
        self, layer: int, i: int, runs: slice, routes: Routes, grad: Tensor, into: Tensor
    ) -> None:
        """Write the gradients of all slices ``into`` place from ``grad``, of what the queries got; the trunk's last."""
        plan, constants = self.forest.groups[i].plan, self.forest.groups[i].constants.shared[layer]
        R, H, d = runs.stop - runs.start, constants.shape[1], constants.shape[3]
        trunk = plan.trunk.length if plan.trunk else 0
        shared = grad.new_zeros(2, R, H, constants.shape[2] + trunk, d)
        below = (shared[0], shared[1]) if trunk else None  # constants have no gradient
        grads, blocks = routes.attended(grad), routes.qkv(into)
        for p in reversed(range(len(plan.parts))):
            is_trunk, (grad_q, grad_k, grad_v) = plan.parts[p] is plan.trunk, blocks[p]
            saved = self.saved.get((layer, i, runs.start, p))
            if saved is None:  # none of this part asked
                grad_k.zero_()
                grad_v.zero_()
            else:
                attend_backward(
                    grads[p], saved, self.buffer, grad_q, grad_k, grad_v, None if is_trunk else below
                )
            if is_trunk:
                grad_k[:, :, 0] += shared[0, :, :, constants.shape[2] :]
                grad_v[:, :, 0] += shared[1, :, :, constants.shape[2] :]

    def _run_chunks(self, group: Group) -> Iterator[slice]:
        step = max(1, self.chunk // group.plan.padded)
        return (slice(i, min(i + step, group.runs)) for i in range(0, group.runs, step))
