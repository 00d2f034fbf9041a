"""A forest through the frozen tower on a GPU: what `tower.ForestPass` does elsewhere, in about 220 launches.

The products are torch's. Between two products there is one kernel, on all rows at once:

    forward    embed, then per layer: qkv | attention | out | add and norm | fc | activation | proj | add and norm
    backward   per layer: proj | activation | fc | norm and add | out | attention (2) | qkv | norm and add

All groups of the forest share every launch, so the number of launches depends on the layers alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.forest import Forest, Workspace
from fastcoop.engine.kernels.attention import TILE, WIDE_TILE, TiledAttention
from fastcoop.engine.kernels.rows import (
    Sums,
    activation,
    activation_backward,
    add_segments,
    layer_norm,
    layer_norm_backward,
)
from fastcoop.engine.kernels.tiles import Segments, plan_tiles
from fastcoop.engine.weights import LN_OFFSET


class KernelPass:
    """The `tower.Pass` of one forest, which has no spare rows: on a GPU, products take any number of rows."""

    def __init__(self, forest: Forest):
        self.forest, self.tower = forest, forest.tower
        tower, groups, device = forest.tower, forest.groups, forest.tower.device
        self.last = len(tower.blocks) - 1
        tile = TILE if tower.dtype.itemsize == 2 else WIDE_TILE
        trees = [(g.tree_layout.tree, g.runs) for g in groups]
        self.attention = TiledAttention(plan_tiles(trees, device, tile), tower.heads, tile)
        self.constants = [  # per layer (constants, 2 width)
            torch.cat([g.tree_layout.constants[layer].permute(2, 0, 1, 3).flatten(1) for g in groups])
            for layer in range(len(tower.blocks))
        ]
        self.learned_rows = forest.learned_rows.int()
        self.all_rows = torch.arange(forest.rows, dtype=torch.int32, device=device)
        self.row_of_leaf = forest.leaf_rows.int()
        self.leaf_of_row = torch.full((forest.rows,), -1, dtype=torch.int32, device=device)
        self.leaf_of_row[forest.leaf_rows] = torch.arange(forest.leaves, dtype=torch.int32, device=device)

        self.vector_of_row = torch.as_tensor(forest.vector_of_row.astype(np.int32), device=device)
        self.leaf_of_class = torch.as_tensor(forest.leaf_of_class, device=device)
        self.sum_vectors = Segments.of(forest.vector_of_row, device)  # from learned rows to vectors
        self.sum_classes = Segments.of(forest.leaf_of_class, device)  # from classes to leaves

    def forward(self, vectors: Tensor, workspace: Workspace) -> Tensor:
        """Return the class features (classes, dim) of the context vectors (vectors, width)."""
        tower, last = self.tower, self.last
        x = workspace.x[0](self.forest.rows, tower.width)
        normal = self._embed(vectors.contiguous(), x, workspace)
        for layer, (block, constants) in enumerate(zip(tower.blocks, self.constants, strict=True)):
            memory, is_last = workspace.layers[layer], layer == last
            q, kv = self._project_qkv(layer, normal, workspace)
            attended = workspace.attended(*q.shape)
            self.attention.forward(q, kv, constants, attended, self.leaf_of_row if is_last else self.all_rows)
            rows = len(attended)
            middle, normal = memory.middle(rows, tower.width), torch.empty_like(attended)
            layer_norm(
                x, normal, block.eps_2, LN_OFFSET, branch=attended @ block.out, bias=block.out_bias,
                rows=self.row_of_leaf if is_last else None, sums=middle,
            )  # fmt: skip
            hidden = torch.mm(normal, block.fc, out=memory.hidden(rows, tower.hidden))
            active = workspace.activation(rows, tower.hidden)
            activation(hidden, tower.activation, active)
            x = workspace.x[layer + 1](rows, tower.width)
            eps = tower.eps_final if is_last else tower.blocks[layer + 1].eps_1
            layer_norm(
                middle, normal, eps, LN_OFFSET, branch=active @ block.proj, bias=block.proj_bias, sums=x
            )
        features: Tensor = (normal @ tower.projection).index_select(0, self.leaf_of_class)
        return features

    def backward(self, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of the vectors, in float32 at least."""
        forest, tower, width = self.forest, self.tower, self.tower.width
        grad_classes = grad.to(tower.dtype).contiguous()
        grad_leaves = grad_classes.new_empty(forest.leaves, tower.dim)
        add_segments(grad_leaves, grad_classes, self.sum_classes)
        normal = grad_leaves @ tower.projection.t()
        sums = Sums.like(normal)
        layer_norm_backward(normal, workspace.x[-1](*normal.shape), tower.eps_final, sums)
        for layer in range(self.last, -1, -1):
            sums = self._layer_backward(layer, sums, workspace)
        grad_vectors = torch.empty(forest.vectors, width, dtype=sums.high.dtype, device=tower.device)
        add_segments(grad_vectors, sums.high, self.sum_vectors)
        return grad_vectors

    def _embed(self, vectors: Tensor, x: Tensor, workspace: Workspace) -> Tensor:
        """Fill the first layer's input x; return the norm of rows with a vector, or of all in an only layer."""
        forest, block = self.forest, self.tower.blocks[0]
        count, width = len(self.learned_rows), x.shape[1]
        normal, learned = x.new_empty(count, width), workspace.learned_x(count, width)
        layer_norm(
            vectors, normal, block.eps_1, LN_OFFSET,
            branch=forest.learned_positions, rows=self.vector_of_row, sums=learned,
        )  # fmt: skip
        # Rows with a token enter the first layer with known numbers, which stay where nothing else is written.
        if workspace.first_layer_of is not self:
            x.index_copy_(0, forest.frozen_rows, forest.frozen_input)
            if self.last > 0:
                qkv = workspace.layers[0].qkv(forest.rows, 3 * width)
                qkv.index_copy_(0, forest.frozen_rows, forest.frozen_qkv)
            workspace.first_layer_of = self if workspace.keep else None
        x.index_copy_(0, forest.learned_rows, learned)
        if self.last == 0:
            normal = torch.empty_like(x)
            layer_norm(x, normal, block.eps_1, LN_OFFSET)
        return normal

    def _project_qkv(self, layer: int, normal: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """Return queries, and keys with values, of a layer; queries of leaves alone in the last layer."""
        forest, width, weight = self.forest, self.tower.width, self.tower.blocks[layer].qkv
        qkv = workspace.layers[layer].qkv(forest.rows, 3 * width)
        if layer == self.last:  # all rows have keys and values, only leaves have queries
            torch.mm(normal, weight[:, width:], out=qkv[:, width:])
            q = workspace.leaf_q(forest.leaves, width)
            torch.mm(normal.index_select(0, forest.leaf_rows), weight[:, :width], out=q)
            return q, qkv[:, width:]
        if layer == 0:  # only rows with a vector: `_embed` wrote the others
            qkv.index_copy_(0, forest.learned_rows, normal @ weight)
        else:
            torch.mm(normal, weight, out=qkv)
        return qkv[:, :width], qkv[:, width:]

    def _layer_backward(self, layer: int, grad: Sums, workspace: Workspace) -> Sums:
        """Return the gradient of a layer's input from that of its output, which is overwritten.

        In the first layer it is that of the rows with a vector, in float32 at least: nothing reads a token's.
        """
        forest, tower, width = self.forest, self.tower, self.tower.width
        block, memory = tower.blocks[layer], workspace.layers[layer]
        is_first, is_last, rows = layer == 0, layer == self.last, len(grad.high)
        grad_hidden = torch.mm(grad.high, block.proj.t(), out=workspace.activation(rows, tower.hidden))
        activation_backward(grad_hidden, memory.hidden(rows, tower.hidden), tower.activation)
        middle = memory.middle(rows, width)
        layer_norm_backward(grad_hidden @ block.fc.t(), middle, block.eps_2, grad, residual=grad)

        grad_attended = torch.mm(grad.high, block.out.t(), out=workspace.grad_attended(rows, width))
        qkv = memory.qkv(forest.rows, 3 * width)
        q = workspace.leaf_q(forest.leaves, width) if is_last else qkv[:, :width]
        grad_qkv = workspace.grad_qkv(len(self.learned_rows) if is_first else forest.rows, 3 * width)
        self.attention.backward(
            (q, qkv[:, width:], self.constants[layer]), grad_attended, grad_qkv,
            workspace.slots(len(self.attention.plan.chain), 2 * width),
            self.leaf_of_row if is_last else self.all_rows,
            self.attention.plan.learned if is_first else self.attention.plan.every,
        )  # fmt: skip

        used = slice(width, None) if is_last else slice(None)  # only leaves have queries in the last layer
        normal = grad_qkv[:, used] @ block.qkv[:, used].t()
        x, result, extra, place = workspace.x[layer](*normal.shape), grad, None, None
        if is_first:
            x, place = workspace.learned_x(*normal.shape), self.learned_rows
            result = Sums(torch.empty_like(normal, dtype=tower.sum_dtype), None)
        elif is_last:
            extra, place = grad_qkv[:, :width].index_select(0, forest.leaf_rows), self.leaf_of_row
            extra, result = extra @ block.qkv[:, :width].t(), Sums.like(normal)
        residual = None if is_first and is_last else grad  # leaves are tokens
        layer_norm_backward(normal, x, block.eps_1, result, residual=residual, extra=extra, place=place)
        return result
