"""Prompts whose context vectors are replaced, from a layer on, by vectors of each class, as TCP does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.engine.encoder import FORESTS, class_features, runs_at_once
from fastcoop.engine.forest import Forest, Trees, Workspace
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.tree_layout import OrderedSum, TreeLayout
from fastcoop.engine.weights import row_rule
from fastcoop.methods.prompt_nets import check_layer
from fastcoop.prompts.layout import PromptLayout
from fastcoop.prompts.tree import tree_key


class ClassTokenEncoder:
    """Class features of prompts whose context vectors are replaced, from a layer on, by vectors of each class.

        encoder = ClassTokenEncoder(backbone, ["cat", "dog"], PromptLayout(4), layer=8)
        features = encoder(contexts, tokens)   # (runs, M, width), (runs, classes, M, width) -> (runs, classes, dim)

    Args:
        backbone: Its text tower and tokenizer are used.
        class_names: Names of the classes.
        layout: The prompt layout.
        layer: The layer, counted from 0, at whose input the vectors are replaced.

    Raises:
        UserError: For a prompt that does not fit the text tower, or a layer that it does not have.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], layout: PromptLayout, layer: int):
        check_layer(backbone, layer)
        trees, both = Trees(backbone), [replace(layout, class_specific=own) for own in (False, True)]
        shared, own = (trees[tree_key(class_names, one)] for one in both)
        self.runs_at_once, self._device = runs_at_once(trees, own), trees.tower.device
        self._pass = lru_cache(FORESTS)(lambda runs: _TwoTrees(trees, shared, own, layer, runs))

    def __call__(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return class features (runs, classes, dim) as the tower projects them, not normalized.

        Args:
            contexts: (runs, M, width), which enter the first layer.
            tokens: (runs, classes, M, width), which replace them. Gradients flow to both.
        """
        given = [one.to(self._device).reshape(-1, one.shape[-1]) for one in (contexts, tokens)]
        runs = len(contexts)
        return class_features(self._pass(runs), torch.cat(given)).unflatten(0, (runs, -1))


class _TwoTrees:
    """The `Pass` of a `ClassTokenEncoder`.

    Below the layer all classes share the context vectors, so the trunk of their tree; from it on nothing of it is
    shared. So the layers below run over the tree of shared contexts, the others over the tree of class-specific ones,
    and between them each row of the second takes the row of the first at the same place of the same prompt. That is
    exact: a prompt has the same activations in both trees up to the replacement.
    """

    def __init__(self, trees: Trees, shared: TreeLayout, own: TreeLayout, layer: int, runs: int):
        self.tower, self.layer, self.own, device = trees.tower, layer, own, trees.tower.device
        self.runs = runs
        self.below, self.above = (
            ForestPass(Forest(trees.tower, [(tree, runs)], row_rule(trees.tower))) for tree in (shared, own)
        )
        row, own_row = (np.cumsum(tree.tree.live) - 1 for tree in (shared, own))  # of live nodes
        source = np.full(own.rows, -1)
        for leaf, own_leaf in zip(shared.tree.leaf, own.tree.leaf, strict=True):
            for node, own_node in zip(shared.tree.path(int(leaf)), own.tree.path(int(own_leaf)), strict=True):
                if own.tree.live[own_node] and not own.tree.learned[own_node]:
                    source[own_row[own_node]] = row[node]
        kept = np.flatnonzero(source >= 0)
        sources, position = np.unique(source[kept], return_inverse=True)
        self.kept, self.source, self.sources = (
            half.forest.groups[0].rows_of(torch.as_tensor(rows, device=device))
            for half, rows in ((self.above, kept), (self.below, source[kept]), (self.below, sources))
        )
        self.sum_sources = OrderedSum(position, device, trees.tower.sum_dtype)

    def forward(self, vectors: Tensor, workspace: Workspace) -> Tensor:
        """Return the class features of all runs, (classes, dim), of their contexts and behind them their tokens."""
        contexts, tokens = vectors.split([self.below.forest.vectors, self.above.forest.vectors])
        x = self.below.input(contexts, workspace)
        for layer in range(self.layer):
            x = self.below.layer(layer, x, workspace)
        x = x.clone()  # the next input has the same memory
        y = workspace.x[self.layer](self.above.forest.rows, self.tower.width)
        y[self.above.forest.used_rows :].zero_()
        y.index_copy_(0, self.kept, x.index_select(0, self.source))
        of_rows = tokens.index_select(0, self.above.vector_of_row)
        y.index_copy_(0, self.above.forest.learned_rows, of_rows.to(self.tower.dtype))
        for layer in range(self.layer, len(self.tower.blocks)):
            y = self.above.layer(layer, y, workspace)
        return self.above.output(y, workspace)

    def backward(self, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of the contexts and of the tokens."""
        grad = self.above.output_backward(grad, workspace)
        for layer in range(self.above.last, self.layer - 1, -1):
            grad = self.above.layer_backward(layer, grad, workspace)
        learned, kept = (
            grad[rows].unflatten(0, (self.runs, -1)) for rows in (self.above.forest.learned_rows, self.kept)
        )
        tokens = self.own.sum_vectors(learned).flatten(0, 1)
        below = grad.new_zeros(self.below.forest.rows, self.tower.width)
        below[self.sources] = self.sum_sources(kept).flatten(0, 1)
        for layer in range(self.layer - 1, -1, -1):
            below = self.below.layer_backward(layer, below, workspace)
        return torch.cat([self.below.input_backward(below), tokens])
