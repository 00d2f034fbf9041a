"""The forest through the frozen tower, forward and backward, written out.

Autograd would keep every intermediate and compute what nobody reads. Here a layer keeps five things per row
(the residual stream before each branch, q, k, v and the attention probabilities, the MLP's pre-activation), no weight
has a gradient, and
- the first layer computes queries, keys and values, and their gradients, only where a context vector stands;
- the last layer computes queries, outputs and the MLP only at end tokens.
Per-row work goes in chunks of rows that stay in cache; buffers are made once and used for every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastcoop.engine.buffers import Buffers
from fastcoop.engine.forest import Forest
from fastcoop.engine.precision import own_precision
from fastcoop.engine.tree_attention import TreeAttention
from fastcoop.engine.weights import FoldedBlock

CPU_CHUNK = 2048  # rows: with 512-wide towers, a chunk's MLP activations (16 MB) stay in the last-level cache


class ForestPass:
    """Forward and backward of one forest; keeps what backward needs in its own buffers.

    ``forward`` then ``backward`` any number of times; a second forward overwrites what the first one kept.
    """

    def __init__(self, forest: Forest, buffers: Buffers | None = None):
        self.forest, self.tower = forest, forest.tower
        self.buffer = buffers or Buffers(self.tower.dtype, self.tower.device)
        self.buffer.begin()
        # A GPU has no cache to stay in: one large product each.
        self.chunk = CPU_CHUNK if self.tower.device.type == "cpu" else sys.maxsize
        # Of a bfloat16 row a GPU gives mean and deviation in float32, and wants them back so.
        self.stats_dtype = self.tower.layer_norm(self.tower.gain, 1e-5)[1].dtype
        self.last = len(self.tower.blocks) - 1
        self.frozen_qkv, self.frozen_input = forest.frozen("first_qkv"), forest.frozen("first_input")
        self.attention = TreeAttention(forest, self.buffer, self.chunk)

    @property
    def nbytes(self) -> int:
        """Bytes that the pass holds between forward and backward, scratch memory included."""
        kept: dict[int, int] = {}
        for saved in self.attention.saved.values():
            for tensor in vars(saved).values():
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
        for memory in self.buffer.storages:
            kept.pop(memory, None)
        return self.buffer.nbytes + sum(kept.values())

    @torch.no_grad()
    @own_precision
    def forward(self, contexts: Sequence[Tensor]) -> list[Tensor]:
        """Return each group's class features (runs, classes, dim), projected and not normalised.

        ``contexts``: per group, (runs, slots, width), any float dtype.
        """
        forest, tower = self.forest, self.tower
        vectors = [
            c[:, g.plan.slots].reshape(-1, tower.width) for c, g in zip(contexts, forest.groups, strict=True)
        ]
        x = self._residual(0)
        x.index_copy_(0, forest.frozen_rows, self.frozen_input)
        x.index_copy_(0, forest.learned_rows, (torch.cat(vectors) + forest.learned_positions).to(tower.dtype))
        for layer, block in enumerate(tower.blocks):
            x = self._block(layer, block, x)
        normal, *self.final_stats = tower.layer_norm(x, tower.eps_final)
        self.final_input = x
        features = normal @ tower.projection
        return [
            features[g.leaves].view(g.runs, g.plan.leaves, -1)[:, g.plan.class_leaf] for g in forest.groups
        ]

    @torch.no_grad()
    @own_precision
    def backward(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the contexts, per group (runs, slots, width) in the tower's dtype.

        ``grads``: per group, (runs, classes, dim).
        """
        forest, tower = self.forest, self.tower
        leaves = torch.cat(  # classes with equal prompts add up
            [
                g.plan.sum_classes(grad.to(tower.dtype)).flatten(0, 1)
                for grad, g in zip(grads, forest.groups, strict=True)
            ]
        )
        grad = _layer_norm_backward(leaves @ tower.projection.t(), self.final_input, *self.final_stats)
        for layer in range(self.last, -1, -1):
            grad = self._block_backward(layer, tower.blocks[layer], grad)
        result, start = [], 0
        for g in forest.groups:
            rows = len(g.plan.slots)
            part = grad[start : start + g.runs * rows].view(g.runs, rows, -1)
            result.append(g.plan.sum_slots(part))
            start += g.runs * rows
        return result

    # One block. The residual stream enters as x (rows, width); the last block returns (leaves, width).

    def _block(self, layer: int, block: FoldedBlock, x: Tensor) -> Tensor:
        forest, tower, width = self.forest, self.tower, self.tower.width
        ends = layer == self.last
        qkv = self.buffer("qkv", forest.rows, 3 * width)
        mean, rstd = self._stats(layer, 1, forest.rows)
        if layer == 0 and not ends:
            qkv.index_copy_(0, forest.frozen_rows, self.frozen_qkv)
            for c in self._chunks(len(forest.learned_rows)):
                rows = forest.learned_rows[c]
                normal, mean[c], rstd[c] = tower.layer_norm(x.index_select(0, rows), block.eps_1)
                qkv.index_copy_(0, rows, normal @ block.qkv)
        else:
            used = slice(width, None) if ends else slice(None)  # the last layer asks at the leaves only
            for c in self._chunks(forest.rows):
                normal, mean[c], rstd[c] = tower.layer_norm(x[c], block.eps_1)
                torch.mm(normal, block.qkv[:, used], out=qkv[c, used])
        if ends:
            at = forest.leaf_rows
            x = x[at]
            qkv[at, :width] = tower.layer_norm(x, block.eps_1)[0] @ block.qkv[:, :width]
        attended = self.attention.forward(layer, qkv, ends)
        middle, out = self._residual(layer + 0.5, len(x)), self._residual(layer + 1, len(x))
        hidden = self.buffer(("hidden", layer), len(x), tower.hidden)
        mean, rstd = self._stats(layer, 2, len(x))
        for c in self._chunks(len(x)):
            residual = torch.add(x[c], block.out_bias, out=middle[c])
            torch.addmm(residual, attended[c], block.out, out=residual)
            normal, mean[c], rstd[c] = tower.layer_norm(middle[c], block.eps_2)
            torch.mm(normal, block.fc, out=hidden[c])
            active = self._activate(hidden[c])
            residual = torch.add(middle[c], block.proj_bias, out=out[c])
            torch.addmm(residual, active, block.proj, out=residual)
        return out

    def _block_backward(self, layer: int, block: FoldedBlock, grad: Tensor) -> Tensor:
        forest, width = self.forest, self.tower.width
        ends = layer == self.last
        middle, hidden = (
            self._residual(layer + 0.5, len(grad)),
            self.buffer(("hidden", layer), len(grad), self.tower.hidden),
        )
        mean, rstd = self._stats(layer, 2, len(grad))
        attended = self.buffer("attended", len(grad), width)
        for c in self._chunks(len(grad)):
            scratch = self.buffer("mlp", len(grad[c]), self.tower.hidden)
            torch.mm(grad[c], block.proj.t(), out=scratch)
            self._activate_backward(scratch, hidden[c])
            grad[c] += _layer_norm_backward(scratch @ block.fc.t(), middle[c], mean[c], rstd[c])
            torch.mm(grad[c], block.out.t(), out=attended[c])
        dqkv = self.attention.backward(layer, attended, ends)

        x = self._residual(layer)
        mean, rstd = self._stats(layer, 1, forest.rows)
        if layer == 0 and not ends:  # nothing reads the gradient of a frozen token's embedding
            learned = self.buffer("gradient", len(forest.learned_rows), width)
            for c in self._chunks(len(learned)):
                rows = forest.learned_rows[c]
                normal = dqkv.index_select(0, rows) @ block.qkv.t()
                through = _layer_norm_backward(normal, x.index_select(0, rows), mean[c], rstd[c])
                torch.add(through, grad.index_select(0, rows), out=learned[c])
            return learned
        if not ends:
            for c in self._chunks(forest.rows):
                grad[c] += _layer_norm_backward(dqkv[c] @ block.qkv.t(), x[c], mean[c], rstd[c])
            return grad
        at, total = forest.leaf_rows, self.buffer("gradient", forest.rows, width)
        for c in self._chunks(forest.rows):
            torch.mm(dqkv[c, width:], block.qkv[:, width:].t(), out=total[c])
        total[at] += dqkv[at, :width] @ block.qkv[:, :width].t()
        for c in self._chunks(forest.rows):
            total[c] = _layer_norm_backward(total[c], x[c], mean[c], rstd[c])
        total[at] += grad
        return total[forest.learned_rows] if layer == 0 else total

    # Small things.

    def _residual(self, layer: float, rows: int | None = None) -> Tensor:
        return self.buffer(("residual", layer), self.forest.rows if rows is None else rows, self.tower.width)

    def _stats(self, layer: int, which: int, rows: int) -> tuple[Tensor, Tensor]:
        mean, rstd = self.buffer(("stats", layer, which), 2, rows, 1, dtype=self.stats_dtype)
        return mean, rstd

    def _chunks(self, rows: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, rows)) for i in range(0, rows, self.chunk))

    def _activate(self, hidden: Tensor) -> Tensor:
        """The activation of ``hidden``, in scratch memory."""
        scratch, aten = self.buffer("mlp", *hidden.shape), torch.ops.aten
        if self.tower.activation == "silu":
            return aten.silu.out(hidden, out=scratch)
        approximate = "tanh" if self.tower.activation == "gelu_tanh" else "none"
        return aten.gelu.out(hidden, approximate=approximate, out=scratch)

    def _activate_backward(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Multiply ``grad`` by the activation's derivative at ``hidden``, in place."""
        aten = torch.ops.aten
        if self.tower.activation == "silu":
            return aten.silu_backward.grad_input(grad, hidden, grad_input=grad)
        approximate = "tanh" if self.tower.activation == "gelu_tanh" else "none"
        return aten.gelu_backward.grad_input(grad, hidden, approximate=approximate, grad_input=grad)


def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of x through a layer norm without affine; ``mean`` and ``rstd`` (rows, 1)."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, (x.shape[-1],), mean, rstd, None, None, (True, False, False)
    )[0]
