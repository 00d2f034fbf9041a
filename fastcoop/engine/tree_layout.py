"""Lay a tree out: rows for the dense products, and the constants of the frozen tower.

Only live nodes (with a context vector at or above them) get a row. The others are constants: they are only read, as
keys and values. A run's rows are its live nodes in depth-first order; a row reads itself and its ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.engine.weights import FoldedTower, bmm
from fastcoop.prompts.tree import Tree


def split_runs(rows: Tensor, groups: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut rows of all runs, (n, ...), into (runs, rows of a run, ...) of each group, given as these two numbers."""
    parts = rows.split([runs * count for runs, count in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


class OrderedSum:
    """Sums values (runs, n, width) with equal ``index`` (n,) into (runs, count, width), always in the same order.

    A product with a 0/1 matrix; a scatter with atomics is not reproducible. Every index below ``count`` occurs.
    """

    def __init__(self, index: np.ndarray, device: torch.device, dtype: torch.dtype):
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
    """A tree laid out for one tower: its rows, int64 indices of them, and its constants."""

    def __init__(self, tree: Tree, tower: FoldedTower):
        device, dtype = tower.device, tower.dtype

        def tensor(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, device=device)

        self.tree = tree
        live_nodes = np.flatnonzero(tree.live)
        row_of = np.cumsum(tree.live) - 1  # of each live node
        self.rows = len(live_nodes)  # of one run

        leaves, class_leaf = np.unique(tree.leaf, return_inverse=True)
        self.leaves = len(leaves)  # of one run
        self.leaf_rows = tensor(row_of[leaves])  # (leaves,)
        self.classes, self.class_leaf = len(class_leaf), class_leaf  # (classes,) each class's leaf
        self.sum_classes = OrderedSum(class_leaf, device, dtype)  # from classes to leaves

        learned = tree.learned[live_nodes]
        vectors = tree.index[live_nodes][learned]
        self.learned_rows = tensor(np.flatnonzero(learned))  # rows with a context vector
        self.vector_of_row = vectors  # (learned rows,) the vector there
        self.vectors = int(vectors.max()) + 1  # context vectors of one run
        self.sum_vectors = OrderedSum(vectors, device, tower.sum_dtype)  # from learned rows to vectors
        embeddings = tower.positional_embedding[tensor(tree.depth[live_nodes])]
        self.learned_positions = embeddings[self.learned_rows]  # (learned rows, width)

        # Rows with a token: what enters the first layer, and their queries, keys and values there.
        self.frozen_rows = tensor(np.flatnonzero(~learned))
        tokens = tower.token_embedding[tensor(tree.index[live_nodes][~learned])]
        self.frozen_input = (tokens + embeddings[self.frozen_rows]).to(dtype)  # (frozen rows, width)
        normal = tower.layer_norm(self.frozen_input, tower.blocks[0].eps_1)[0]
        self.frozen_qkv = normal @ tower.blocks[0].qkv  # (frozen rows, 3 width)
        self.constants = constants_of(tower, tree)  # per layer


NONE = -1  # in place of a node: padding


def padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Return lists of nodes as rows, padded at the end with NONE."""
    rows = np.full((len(lists), max(map(len, lists))), NONE, np.int64)
    for row, nodes in zip(rows, lists, strict=True):
        row[: len(nodes)] = nodes
    return rows


def constants_of(tower: FoldedTower, tree: Tree) -> tuple[Tensor, ...]:
    """Return the keys and values of a tree's constant nodes, per layer (2, H, constant nodes, d), in the nodes' order.

    Constant nodes form paths of their own (the start token; with the class in front, the class names). A plain causal
    pass over these paths gives their keys and values in every layer. Without a start token there may be none.
    """
    of_leaves = ([node for node in tree.path(int(leaf)) if not tree.live[node]] for leaf in tree.leaf)
    paths = [path for path in of_leaves if path]
    if not paths:
        d = tower.width // tower.heads
        return (tower.projection.new_empty(2, tower.heads, 0, d),) * len(tower.blocks)
    nodes = padded(paths)
    tokens = torch.as_tensor(tree.index[nodes]).to(tower.device)
    words = tower.token_embedding[tokens] + tower.positional_embedding[: nodes.shape[1]]
    x = words.to(tower.dtype).flatten(0, 1)
    place = np.zeros(tree.nodes, np.int64)  # of each node in a path; where several have it, all are alike
    place[nodes[nodes != NONE]] = np.flatnonzero(nodes != NONE)
    at = torch.as_tensor(place[~tree.live]).to(tower.device)

    constants = []
    for block in tower.blocks:
        qkv = (tower.layer_norm(x, block.eps_1)[0] @ block.qkv).view(*nodes.shape, 3, tower.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (paths, H, positions, d)
        kv = torch.stack([k, v]).transpose(1, 2).flatten(2, 3)  # (2, H, paths * positions, d)
        constants.append(kv[:, :, at].contiguous())
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        x = x + out.transpose(1, 2).reshape(x.shape) @ block.out + block.out_bias
        hidden = tower.layer_norm(x, block.eps_2)[0] @ block.fc
        x = x + tower.activate(hidden, torch.empty_like(hidden)) @ block.proj + block.proj_bias
    return tuple(constants)
