"""The forest through the frozen tower, forward and backward, written out.

Autograd would keep every intermediate and compute gradients that nothing reads. Here a layer keeps five things per
row (the residual stream before each branch, q, k, v and the attention probabilities, the MLP before its activation),
no weight has a gradient, and
- the first layer computes queries, keys and values, and their gradients, only for rows with a context vector;
- the last layer computes queries, outputs and the MLP only at leaves.
Work per row is done in chunks of rows that stay in cache, in memory that every step reuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcoop.backbones import PlainTower
from fastcoop.engine.fit import usable_bytes
from fastcoop.engine.forest import Forest, Workspace
from fastcoop.engine.kernels import are_usable
from fastcoop.engine.kernels.cpu import attention_of
from fastcoop.engine.plain import PlainPass, PlainWorkspace
from fastcoop.engine.tree_layout import split_runs
from fastcoop.engine.weights import ANY_ROWS, RowRule


class Pass(Protocol):
    """Forward and backward of runs that are encoded together. All that backward reads is in a workspace."""

    tower: Any

    def forward(self, vectors: Tensor, workspace: Any) -> Tensor:
        """Return the class features of all runs, (classes, dim), projected and not normalized.

        ``vectors`` are the context vectors of all runs, (vectors, width), in any float dtype.
        """

    def backward(self, grad: Tensor, workspace: Any) -> Tensor:
        """Return the gradient of the vectors from that of the class features.

        It may follow any number of times, until another ``forward`` uses the same workspace.
        """


def build_pass(tower: Any, groups: Sequence[tuple[Any, int]], rule: RowRule = ANY_ROWS) -> Pass:
    """Return the pass of runs, for the tower's kind, device and precision.

    ``groups`` are layouts of the tower's `Trees`, each with its number of runs.
    """
    if isinstance(tower, PlainTower):
        return PlainPass(tower, groups)
    forest = Forest(tower, groups, rule)
    if are_usable(forest.tower.device, forest.tower.dtype):
        from fastcoop.engine.kernels.forest_pass import KernelPass

        return KernelPass(forest)
    return ForestPass(forest)


def new_workspace(tower: Any, keep: bool = True, memory_bytes: int | None = None) -> Any:
    """Return memory for the passes of a tower; with ``keep``, backward follows forward.

    The plain path keeps ``memory_bytes`` at most, by default a fraction of the free memory.
    """
    if isinstance(tower, PlainTower):
        return PlainWorkspace(keep, usable_bytes(tower.device) if memory_bytes is None else memory_bytes)
    return Workspace(tower, keep)


class ForestPass:
    """The `Pass` of one forest. All that it writes is in the workspace."""

    def __init__(self, forest: Forest):
        self.forest, self.tower = forest, forest.tower
        self.attention = attention_of(forest)
        self.vector_of_row, self.leaf_of_class = (
            torch.as_tensor(index, device=forest.tower.device)
            for index in (forest.vector_of_row, forest.leaf_of_class)
        )
        self.last = len(self.tower.blocks) - 1

    def forward(self, vectors: Tensor, workspace: Workspace) -> Tensor:
        """Return the class features (classes, dim) of the context vectors (vectors, width)."""
        x = self.input(vectors, workspace)
        for layer in range(len(self.tower.blocks)):
            x = self.layer(layer, x, workspace)
        return self.output(x, workspace)

    def backward(self, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of the vectors, in float32 at least."""
        grad = self.output_backward(grad, workspace)
        for layer in range(self.last, -1, -1):
            grad = self.layer_backward(layer, grad, workspace)
        return self.input_backward(grad)

    # What enters the first layer, one layer, and what leaves the last one, forward and backward.

    def input(self, vectors: Tensor, workspace: Workspace) -> Tensor:
        """Return the first layer's input (rows, width)."""
        forest, tower = self.forest, self.tower
        learned = vectors.index_select(0, self.vector_of_row) + forest.learned_positions
        x = workspace.x[0](forest.rows, tower.width)
        x[forest.used_rows :].zero_()
        x.index_copy_(0, forest.frozen_rows, forest.frozen_input)
        x.index_copy_(0, forest.learned_rows, learned.to(tower.dtype))
        return x

    def layer(self, layer: int, x: Tensor, workspace: Workspace) -> Tensor:
        """Return a layer's output (rows, width) of its input; in the last layer, of leaves."""
        x = self._project_qkv(layer, x, workspace)
        attended = self.attention.forward(layer, workspace)
        return self._out_and_mlp(layer, x, attended, workspace)

    def output(self, x: Tensor, workspace: Workspace) -> Tensor:
        """Return the class features of the last layer's output (leaves, width)."""
        normal, *stats = self.tower.layer_norm(x, self.tower.eps_final)
        workspace.layers[-1].x_stats = [stats]
        return self.forest.rule.mm(normal, self.tower.projection).index_select(0, self.leaf_of_class)

    def output_backward(self, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of the last layer's output (leaves, width), in float32 at least."""
        forest, tower = self.forest, self.tower
        leaves = torch.zeros(forest.leaves, tower.dim, dtype=tower.dtype, device=tower.device)
        of_groups = split_runs(grad.to(tower.dtype), [(g.runs, g.tree_layout.classes) for g in forest.groups])
        for of_classes, g in zip(of_groups, forest.groups, strict=True):  # equal prompts share a leaf
            leaves[g.leaves] = g.tree_layout.sum_classes(of_classes).flatten(0, 1)
        normal = forest.rule.mm(leaves, tower.projection.t())
        x, (stats,) = workspace.x[-1](*normal.shape), workspace.layers[-1].x_stats
        return tower.layer_norm_backward(normal, x, *stats).to(tower.sum_dtype)

    def layer_backward(self, layer: int, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of a layer's input; ``grad``, of its output, is overwritten."""
        grad_attended = self._out_and_mlp_backward(layer, grad, workspace)
        grad_qkv = self.attention.backward(layer, grad_attended, workspace)
        qkv_backward = self._last_qkv_backward if layer == self.last else self._qkv_backward
        return qkv_backward(layer, grad, grad_qkv, workspace)

    def input_backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of the vectors from that of the first layer's input."""
        if self.last == 0:
            grad = grad[self.forest.learned_rows]
        result, start = [], 0
        for g in self.forest.groups:
            rows = slice(start, start := start + g.runs * len(g.tree_layout.vector_of_row))
            result.append(g.tree_layout.sum_vectors(grad[rows].view(g.runs, -1, grad.shape[1])).flatten(0, 1))
        return torch.cat(result)

    # A layer's queries, keys and values, forward and backward.

    def _project_qkv(self, layer: int, x: Tensor, workspace: Workspace) -> Tensor:
        """Write q, k and v of the layer's input x (rows, width). Returns x; in the last layer, of leaves."""
        forest, tower, width, mm = self.forest, self.tower, self.tower.width, self.forest.rule.mm
        block, is_last = tower.blocks[layer], layer == self.last
        qkv = self.attention.qkv(layer, workspace)
        rows = forest.first_rows if layer == 0 and not is_last else None
        if rows is not None:
            qkv.index_copy_(0, forest.frozen_rows, forest.frozen_qkv)
        used = slice(width, None) if is_last else slice(None)
        count = forest.rows if rows is None else len(rows)
        workspace.layers[layer].x_stats = all_stats = []
        for c in forest.chunks(count):
            given = x[c] if rows is None else x.index_select(0, rows[c])
            normal, *stats = tower.layer_norm(given, block.eps_1)
            all_stats.append(stats)
            if rows is None:
                mm(normal, block.qkv[:, used], qkv[c, used])
            else:
                qkv.index_copy_(0, rows[c], mm(normal, block.qkv))
        if is_last:
            x = x[forest.leaf_rows]
            qkv[forest.leaf_rows, :width] = mm(tower.layer_norm(x, block.eps_1)[0], block.qkv[:, :width])
        return x

    def _qkv_backward(self, layer: int, grad: Tensor, grad_qkv: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of the layer's input from that of the residual stream behind attention.

        In the first layer it is that of context vectors (learned and spare rows, width): nothing reads a token's.
        """
        forest, qkv = self.forest, self.tower.blocks[layer].qkv
        rows = forest.first_rows if layer == 0 else None
        count = forest.rows if rows is None else len(rows)
        grad_x = grad if rows is None else workspace.grad_x(count, self.tower.width)
        x, all_stats = workspace.x[layer](*grad.shape), workspace.layers[layer].x_stats
        for c, stats in zip(forest.chunks(count), all_stats, strict=True):
            # grad_x may share grad's memory. This is safe: rows[n] >= n, so each row is read before it is overwritten.
            of_qkv, given, direct = (
                one[c] if rows is None else one.index_select(0, rows[c]) for one in (grad_qkv, x, grad)
            )
            normal = forest.rule.mm(of_qkv, qkv.t())
            through = self.tower.layer_norm_backward(normal, given, *stats)
            torch.add(through, direct, out=grad_x[c])
        return grad_x

    def _last_qkv_backward(self, layer: int, grad: Tensor, grad_qkv: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of the last layer's input: all rows have keys and values, only leaves queries."""
        forest, width, mm = self.forest, self.tower.width, self.forest.rule.mm
        shape, qkv = (forest.rows, width), self.tower.blocks[layer].qkv
        x, all_stats = workspace.x[layer](*shape), workspace.layers[layer].x_stats
        grad_x, leaf_rows = workspace.grad_x(*shape), forest.leaf_rows[: forest.used_leaves]
        normal = grad_x if grad_x.dtype == x.dtype else torch.empty_like(x)
        for c in forest.chunks(forest.rows):
            mm(grad_qkv[c, width:], qkv[:, width:].t(), normal[c])
        through_queries = mm(grad_qkv[forest.leaf_rows, :width], qkv[:, :width].t())
        normal[leaf_rows] += through_queries[: len(leaf_rows)]
        for c, stats in zip(forest.chunks(forest.rows), all_stats, strict=True):
            grad_x[c] = self.tower.layer_norm_backward(normal[c], x[c], *stats)
        grad_x[leaf_rows] += grad[: len(leaf_rows)]
        return grad_x

    # The rest of a layer, behind attention, forward and backward: rows are leaves in the last layer.

    def _out_and_mlp(self, layer: int, x: Tensor, attended: Tensor, workspace: Workspace) -> Tensor:
        """Return the layer's output (rows, width) from its input x and attention's output (rows, width)."""
        tower, rule, block = self.tower, self.forest.rule, self.tower.blocks[layer]
        memory, out = workspace.layers[layer], workspace.x[layer + 1](*x.shape)
        middle, hidden = memory.middle(*x.shape), memory.hidden(len(x), tower.hidden)
        memory.middle_stats = all_stats = []
        for c in self.forest.chunks(len(x)):
            rule.addmm_(torch.add(x[c], block.out_bias, out=middle[c]), attended[c], block.out)
            normal, *stats = tower.layer_norm(middle[c], block.eps_2)
            all_stats.append(stats)
            rule.mm(normal, block.fc, hidden[c])
            active = tower.activate(hidden[c], workspace.activation(*hidden[c].shape))
            rule.addmm_(torch.add(middle[c], block.proj_bias, out=out[c]), active, block.proj)
        return out

    def _out_and_mlp_backward(self, layer: int, grad: Tensor, workspace: Workspace) -> Tensor:
        """Turn ``grad``, of the layer's output, into that of ``middle``; return that of attention's output."""
        tower, rule, block = self.tower, self.forest.rule, self.tower.blocks[layer]
        memory, grad_attended = workspace.layers[layer], workspace.grad_attended(*grad.shape)
        middle, hidden = memory.middle(*grad.shape), memory.hidden(len(grad), tower.hidden)
        for c, stats in zip(self.forest.chunks(len(grad)), memory.middle_stats, strict=True):
            rounded = grad[c].to(tower.dtype)
            grad_hidden = rule.mm(rounded, block.proj.t(), workspace.activation(*hidden[c].shape))
            tower.activate_backward(grad_hidden, hidden[c])
            normal = rule.mm(grad_hidden, block.fc.t())
            grad[c].add_(tower.layer_norm_backward(normal, middle[c], *stats))
            rule.mm(grad[c].to(tower.dtype), block.out.t(), grad_attended[c])
        return grad_attended
