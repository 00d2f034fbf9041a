"""The forest through the frozen tower, forward and backward, written out.

Autograd would keep every intermediate and compute gradients that nothing reads. Here a layer keeps five things per
row (the residual stream before each branch, q, k, v and the attention probabilities, the MLP before its activation),
no weight has a gradient, and
- the first layer computes queries, keys and values, and their gradients, only for rows with a context vector;
- the last layer computes queries, outputs and the MLP only at end tokens.
Work per row is done in chunks of rows that stay in cache, in memory that every step reuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastcoop.engine.attention import ForestAttention
from fastcoop.engine.forest import ATTENTION, MLP, Forest, Workspace
from fastcoop.engine.weights import FoldedBlock, disable_autocast, even_slices


class ForestPass:
    """Forward and backward of one forest: ``forward``, then ``backward`` any number of times.

    Args:
        forest: The forest.
        memory: Written by every pass; what an earlier forest left in it is reused.
        keep: Whether to keep what ``backward`` reads; without, layers share their memory.
    """

    def __init__(self, forest: Forest, memory: Workspace | None = None, keep: bool = True):
        self.forest, self.tower, self.keep = forest, forest.tower, keep
        self.memory = memory or Workspace(self.tower)
        self.memory.begin()
        self.last = len(self.tower.blocks) - 1
        self.attention = ForestAttention(forest, self.memory, keep)

    @property
    def nbytes(self) -> int:
        """Bytes held between forward and backward, scratch memory included."""
        kept: dict[int, int] = {}
        for saved in self.attention.saved.values():
            for tensor in vars(saved).values():
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
        for pointer in self.memory.pointers:
            kept.pop(pointer, None)
        return self.memory.nbytes + sum(kept.values())

    @torch.no_grad()
    @disable_autocast
    def forward(self, contexts: Sequence[Tensor]) -> list[Tensor]:
        """Return each group's class features (runs, classes, dim), projected and not normalized.

        Args:
            contexts: Per group, (runs, slots, width), any float dtype.
        """
        forest, tower = self.forest, self.tower
        groups = zip(contexts, forest.groups, strict=True)
        vectors = torch.cat([c[:, g.tree_layout.slots].reshape(-1, tower.width) for c, g in groups])
        x = self._residual(0, ATTENTION)
        x[forest.used_rows :].zero_()
        x.index_copy_(0, forest.frozen_rows, forest.frozen_input)
        x.index_copy_(0, forest.learned_rows, (vectors + forest.learned_positions).to(tower.dtype))
        for layer, block in enumerate(tower.blocks):
            x = self._block(layer, block, x)
        normal, *self.final_stats = tower.layer_norm(x, tower.eps_final)
        self.final_input = x
        features = forest.rule.mm(normal, tower.projection)
        return [
            features[g.leaves].view(g.runs, g.tree_layout.leaves, -1)[:, g.tree_layout.class_leaf]
            for g in forest.groups
        ]

    @torch.no_grad()
    @disable_autocast
    def backward(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the contexts, per group (runs, slots, width) in the tower's dtype.

        Args:
            grads: Per group, of the class features (runs, classes, dim).
        """
        forest, tower = self.forest, self.tower
        leaves = torch.zeros(forest.leaves, tower.dim, dtype=tower.dtype, device=tower.device)
        for grad, g in zip(grads, forest.groups, strict=True):  # classes with equal prompts share a leaf
            leaves[g.leaves] = g.tree_layout.sum_classes(grad.to(tower.dtype)).flatten(0, 1)
        normal = forest.rule.mm(leaves, tower.projection.t())
        grad = _layer_norm_backward(normal, self.final_input, *self.final_stats)
        for layer in range(self.last, -1, -1):
            grad = self._block_backward(layer, tower.blocks[layer], grad)
        result, start = [], 0
        for g in forest.groups:
            rows = len(g.tree_layout.slots)
            of_group = grad[start : start + g.runs * rows].view(g.runs, rows, -1)
            result.append(g.tree_layout.sum_slots(of_group))
            start += g.runs * rows
        return result

    # One block. The residual stream enters as x (rows, width); the last block returns (leaves, width).

    def _block(self, layer: int, block: FoldedBlock, x: Tensor) -> Tensor:
        forest, tower, width, rule = self.forest, self.tower, self.tower.width, self.forest.rule
        leaves_only = layer == self.last
        qkv = self.memory.qkv(forest.rows, 3 * width)
        if layer == 0 and not leaves_only:
            qkv.index_copy_(0, forest.frozen_rows, forest.frozen_qkv)
            mean, rstd = self._stats(layer, ATTENTION, len(forest.first_rows))
            for c in self._chunks(len(forest.first_rows)):
                rows = forest.first_rows[c]
                normal, mean[c], rstd[c] = tower.layer_norm(x.index_select(0, rows), block.eps_1)
                qkv.index_copy_(0, rows, rule.mm(normal, block.qkv))
        else:
            used = (
                slice(width, None) if leaves_only else slice(None)
            )  # the last layer has queries at end tokens only
            mean, rstd = self._stats(layer, ATTENTION, forest.rows)
            for c in self._chunks(forest.rows):
                normal, mean[c], rstd[c] = tower.layer_norm(x[c], block.eps_1)
                rule.mm(normal, block.qkv[:, used], qkv[c, used])
        if leaves_only:
            at = forest.leaf_rows
            x = x[at]
            qkv[at, :width] = rule.mm(tower.layer_norm(x, block.eps_1)[0], block.qkv[:, :width])
        attended = self.attention.forward(layer, qkv, leaves_only)
        middle, out = self._residual(layer, MLP, len(x)), self._residual(layer + 1, ATTENTION, len(x))
        hidden = self._hidden(layer, len(x))
        mean, rstd = self._stats(layer, MLP, len(x))
        for c in self._chunks(len(x)):
            residual = torch.add(x[c], block.out_bias, out=middle[c])
            rule.addmm_(residual, attended[c], block.out)
            normal, mean[c], rstd[c] = tower.layer_norm(middle[c], block.eps_2)
            rule.mm(normal, block.fc, hidden[c])
            active = self._activate(hidden[c])
            residual = torch.add(middle[c], block.proj_bias, out=out[c])
            rule.addmm_(residual, active, block.proj)
        return out

    def _block_backward(self, layer: int, block: FoldedBlock, grad: Tensor) -> Tensor:
        forest, width, rule = self.forest, self.tower.width, self.forest.rule
        leaves_only = layer == self.last
        middle, hidden = self._residual(layer, MLP, len(grad)), self._hidden(layer, len(grad))
        mean, rstd = self._stats(layer, MLP, len(grad))
        grad_attended = self.memory.grad_attended(len(grad), width)
        for c in self._chunks(len(grad)):
            scratch = self.memory.activation(len(grad[c]), self.tower.hidden)
            rule.mm(grad[c], block.proj.t(), scratch)
            self._activate_backward(scratch, hidden[c])
            normal = rule.mm(scratch, block.fc.t())
            grad[c] += _layer_norm_backward(normal, middle[c], mean[c], rstd[c])
            rule.mm(grad[c], block.out.t(), grad_attended[c])
        grad_qkv = self.attention.backward(layer, grad_attended, leaves_only)

        x = self._residual(layer, ATTENTION)
        # The first layer, unless it is also the last. Nothing reads the gradient of a token's embedding.
        if layer == 0 and not leaves_only:
            grad_learned = self.memory.grad_input(len(forest.first_rows), width)
            mean, rstd = self._stats(layer, ATTENTION, len(grad_learned))
            for c in self._chunks(len(grad_learned)):
                rows = forest.first_rows[c]
                normal = rule.mm(grad_qkv.index_select(0, rows), block.qkv.t())
                through = _layer_norm_backward(normal, x.index_select(0, rows), mean[c], rstd[c])
                torch.add(through, grad.index_select(0, rows), out=grad_learned[c])
            return grad_learned
        mean, rstd = self._stats(layer, ATTENTION, forest.rows)
        if not leaves_only:  # a middle layer: ``grad`` becomes the gradient of its input, in place
            for c in self._chunks(forest.rows):
                normal = rule.mm(grad_qkv[c], block.qkv.t())
                grad[c] += _layer_norm_backward(normal, x[c], mean[c], rstd[c])
            return grad
        # The last layer: all rows have keys and values, only leaves have queries and a residual stream.
        at, grad_input = forest.leaf_rows, self.memory.grad_input(forest.rows, width)
        for c in self._chunks(forest.rows):
            rule.mm(grad_qkv[c, width:], block.qkv[:, width:].t(), grad_input[c])
        used_leaf_rows = at[: forest.used_leaves]
        through_queries = rule.mm(grad_qkv[at, :width], block.qkv[:, :width].t())
        grad_input[used_leaf_rows] += through_queries[: len(used_leaf_rows)]
        for c in self._chunks(forest.rows):
            grad_input[c] = _layer_norm_backward(grad_input[c], x[c], mean[c], rstd[c])
        grad_input[used_leaf_rows] += grad[: len(used_leaf_rows)]
        return grad_input[forest.learned_rows] if layer == 0 else grad_input

    # The memory of a layer. Without ``keep`` there are two sets, one for even and one for odd layers.

    def _turn(self, layer: int) -> int:
        return layer if self.keep else layer % 2

    def _residual(self, layer: int, branch: int, rows: int | None = None) -> Tensor:
        memory = self.memory.residual[self._turn(layer), branch]
        return memory(self.forest.rows if rows is None else rows, self.tower.width)

    def _hidden(self, layer: int, rows: int) -> Tensor:
        return self.memory.hidden[self._turn(layer)](rows, self.tower.hidden)

    def _stats(self, layer: int, branch: int, rows: int) -> tuple[Tensor, Tensor]:
        mean, rstd = self.memory.norm_stats[self._turn(layer), branch](2, rows, 1)
        return mean, rstd

    def _chunks(self, rows: int) -> Iterator[slice]:
        chunk = self.forest.chunk
        return (slice(i, min(i + chunk, rows)) for i in range(0, rows, chunk))

    def _activate(self, hidden: Tensor) -> Tensor:
        """Return the activation of ``hidden``, in scratch memory."""
        scratch, aten = self.memory.activation(*hidden.shape), torch.ops.aten
        approximate = "tanh" if self.tower.activation == "gelu_tanh" else "none"
        for c in even_slices(hidden):
            if self.tower.activation == "silu":
                aten.silu.out(hidden[c], out=scratch[c])
            else:
                aten.gelu.out(hidden[c], approximate=approximate, out=scratch[c])
        return scratch

    def _activate_backward(self, grad: Tensor, hidden: Tensor) -> None:
        """Multiply ``grad`` by the activation's derivative at ``hidden``, in place."""
        aten = torch.ops.aten
        approximate = "tanh" if self.tower.activation == "gelu_tanh" else "none"
        for c in even_slices(hidden):
            if self.tower.activation == "silu":
                aten.silu_backward.grad_input(grad[c], hidden[c], grad_input=grad[c])
            else:
                aten.gelu_backward.grad_input(grad[c], hidden[c], approximate=approximate, grad_input=grad[c])


def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of x through a layer norm without affine; ``mean`` and ``rstd`` are (rows, 1)."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, (x.shape[-1],), mean, rstd, None, None, (True, False, False)
    )[0]
