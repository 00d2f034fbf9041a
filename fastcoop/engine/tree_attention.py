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


class TreeAttention:
    """Attention of every layer of ``forest``, ``chunk`` rows at a time; keeps what its backward pass reads.

    ``ends``: only end tokens ask, as in the last layer.
    """

    def __init__(self, forest: Forest, buffer: Buffers, chunk: int):
        self.forest, self.buffer, self.chunk = forest, buffer, chunk
        # By layer, group, first run of the chunk, and part (0 the trunk), with the shared keys and values it read.
        self.saved: dict[tuple[int, int, int, int], tuple[Saved, Tensor, Tensor]] = {}

    def forward(self, layer: int, qkv: Tensor, ends: bool) -> Tensor:
        """Return the attended values (rows, width) of ``qkv`` (rows, 3 width); (leaves, width) where only ends ask."""
        width, heads = self.forest.tower.width, self.forest.tower.heads
        d = width // heads
        attended = self.buffer("attended", self.forest.leaves if ends else self.forest.rows, width)
        for i, g in enumerate(self.forest.groups):
            plan, rows = g.plan, qkv[g.rows].view(g.runs, g.plan.rows, 3 * width)
            constant = g.constants.shared[layer]
            for runs in self._run_chunks(g):
                R = runs.stop - runs.start
                gathered = self.buffer("gathered", R, plan.padded, 3 * width)
                torch.index_select(rows[runs], 1, plan.gather, out=gathered)
                padded = self.buffer("padded", R, plan.padded, width)
                shared_k, shared_v = (c.expand(R, *c.shape) for c in constant)
                for p, part in enumerate((plan.trunk, *plan.parts)):
                    if part is None:
                        continue
                    P, T = part.bundles, part.length
                    by_head = gathered[:, part.positions].view(R, P, T, 3, heads, d).permute(3, 0, 4, 1, 2, 5)
                    q, k, v = self.buffer(("qkv", layer, i, runs.start, p), 3, R, heads, P, T, d).copy_(
                        by_head
                    )
                    if part is plan.trunk:
                        if not ends:
                            out, probs = attend(q, shared_k, shared_v, k, v, part.mask)
                            self.saved[layer, i, runs.start, p] = (Saved(q, k, v, probs), shared_k, shared_v)
                            padded[:, part.positions].view(R, T, heads, d).copy_(out[:, :, 0].transpose(1, 2))
                        shared_k = torch.cat([shared_k, k[:, :, 0]], 2)
                        shared_v = torch.cat([shared_v, v[:, :, 0]], 2)
                        continue
                    mask = part.mask
                    before = g.constants.parts[layer][p - 1]
                    if before is not None:
                        k, v = (
                            torch.cat([b.expand(R, *b.shape), t], 3)
                            for b, t in zip(before, (k, v), strict=True)
                        )
                    target = padded[:, part.positions].view(R, P, T, heads, d).permute(0, 3, 1, 2, 4)
                    at = part.ends.expand(R, heads, -1, -1, d)
                    if ends:
                        q, mask = q.gather(3, at), mask.take_along_dim(part.ends[0, 0], 1)
                    out, probs = attend(q, shared_k, shared_v, k, v, mask)
                    self.saved[layer, i, runs.start, p] = (Saved(q, k, v, probs), shared_k, shared_v)
                    target.scatter_(3, at, out) if ends else target.copy_(out)
                asking, place = (g.leaves, plan.leaf_place) if ends else (g.rows, plan.place)
                target = attended[asking].view(g.runs, len(place), width)[runs]
                torch.index_select(padded, 1, place, out=target)
        return attended

    def backward(self, layer: int, grad: Tensor, ends: bool) -> Tensor:
        """Return the gradient of q, k and v (rows, 3 width) from ``grad``, of what ``forward`` returned.

        Where only ends ask, q's is defined at the leaves only.
        """
        width, heads = self.forest.tower.width, self.forest.tower.heads
        d = width // heads
        dqkv = self.buffer("qkv", self.forest.rows, 3 * width)
        for i, g in enumerate(self.forest.groups):
            plan = g.plan
            constants = g.constants.shared[layer].shape[2]
            for runs in self._run_chunks(g):
                R = runs.stop - runs.start
                padded = self.buffer("gathered", R, plan.padded, 3 * width)
                incoming = self.buffer("padded", R, plan.padded, width)
                if ends:
                    source = grad[g.leaves].view(g.runs, plan.leaves, width)[runs]
                    incoming.zero_().index_copy_(1, plan.leaf_place, source)
                else:
                    source = grad[g.rows].view(g.runs, plan.rows, width)[runs]
                    torch.index_select(source, 1, plan.gather, out=incoming)
                    incoming.index_fill_(1, plan.unowned, 0.0)
                dshared_k = grad.new_zeros(R, heads, constants + (plan.trunk.length if plan.trunk else 0), d)
                dshared_v = torch.zeros_like(dshared_k)
                for p, part in enumerate(plan.parts, start=1):
                    P, T = part.bundles, part.length
                    dout = incoming[:, part.positions].view(R, P, T, heads, d).permute(0, 3, 1, 2, 4)
                    at = part.ends.expand(R, heads, -1, -1, d)
                    if ends:
                        dout = dout.gather(3, at)
                    saved, shared_k, shared_v = self.saved[layer, i, runs.start, p]
                    dq, dk, dv = attend_backward(
                        dout.contiguous(), saved, shared_k, shared_v, dshared_k, dshared_v
                    )
                    target = padded[:, part.positions].view(R, P, T, 3, heads, d).permute(3, 0, 4, 1, 2, 5)
                    target[0].scatter_(3, at, dq) if ends else target[0].copy_(dq)
                    target[1].copy_(dk[..., part.before :, :])
                    target[2].copy_(dv[..., part.before :, :])
                if plan.trunk is not None:
                    T = plan.trunk.length
                    target = padded[:, :T].view(R, 1, T, 3, heads, d).permute(3, 0, 4, 1, 2, 5)
                    dtrunk_k, dtrunk_v = (t[:, :, None, constants:] for t in (dshared_k, dshared_v))
                    if ends:
                        target[1].copy_(dtrunk_k)
                        target[2].copy_(dtrunk_v)
                    else:
                        dout = incoming[:, :T].view(R, 1, T, heads, d).permute(0, 3, 1, 2, 4)
                        saved, shared_k, shared_v = self.saved[layer, i, runs.start, 0]
                        unread = grad.new_zeros(2, R, heads, constants, d)
                        dq, dk, dv = attend_backward(dout.contiguous(), saved, shared_k, shared_v, *unread)
                        target[0].copy_(dq)
                        torch.add(dk, dtrunk_k, out=dk)
                        torch.add(dv, dtrunk_v, out=dv)
                        target[1].copy_(dk)
                        target[2].copy_(dv)
                rows = dqkv[g.rows].view(g.runs, plan.rows, 3 * width)[runs]
                torch.index_select(padded, 1, plan.place, out=rows)
                if len(plan.copies):
                    copies = padded[:, plan.copies, width:]
                    rows[:, plan.copied_rows, width:] += plan.sum_copies(copies)
        return dqkv

    def _run_chunks(self, group: Group) -> Iterator[slice]:
        step = max(1, self.chunk // group.plan.padded)
        return (slice(i, min(i + step, group.runs)) for i in range(0, group.runs, step))
