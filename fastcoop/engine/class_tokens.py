"""Class features of prompts whose context vectors are replaced, from a layer on, by vectors of each class (TCP).

Below that layer all classes share the context vectors, so the trunk of their tree; from it on nothing of it is shared.
So the layers below run over the tree of shared contexts, the others over the tree of class-specific ones, and between
them each row of the second takes the row of the first at the same place of the same prompt. That is exact: a prompt
has the same activations in both trees up to the replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.engine.encoder import _class_features
from fastcoop.engine.forest import Forest, Trees, Workspace
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.tree_layout import OrderedSum, TreeLayout, tree_key
from fastcoop.engine.weights import disable_autocast, row_rule
from fastcoop.errors import UserError
from fastcoop.progress import counted
from fastcoop.prompts.layout import PromptLayout


def check_layer(backbone: Backbone, layer: int) -> None:
    """Raise UserError unless the text tower has the layer, counted from 0, and one before it."""
    layers = len(backbone.shared_text.blocks)
    if not 1 <= layer < layers:
        most = f"from 1 to {layers - 1}" if layers > 1 else "of a deeper text tower"
        raise UserError(
            f"Expected a layer {most}, at whose input context vectors are replaced, got {layer}: the text tower of "
            f"{backbone.name} has {counted(layers, 'layer')}, counted from 0."
        )


class ClassTokenEncoder:
    """The class features of one list of classes and one unified layout, with replaced vectors, differentiable.

        encoder = ClassTokenEncoder(backbone, ["cat", "dog"], PromptLayout(4), layer=8)
        features = encoder(contexts, tokens)   # (M, width), (classes, M, width) -> (classes, dim)

    Args:
        backbone: Its text tower and tokenizer are used.
        class_names: Names of the classes.
        layout: The prompt layout, not class-specific.
        layer: The layer, counted from 0, at whose input the vectors are replaced.

    Raises:
        UserError: For a prompt that does not fit the text tower, or a layer that it does not have.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], layout: PromptLayout, layer: int):
        check_layer(backbone, layer)
        trees = Trees(backbone)
        shared, own = (
            trees[tree_key(class_names, replace(layout, class_specific=specific))]
            for specific in (False, True)
        )
        self._pass = _TwoTrees(trees, shared, own, layer)

    def __call__(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return class features (classes, dim) as the tower projects them, not normalized.

        Args:
            contexts: (M, width), which enter the first layer.
            tokens: (classes, M, width), which replace them. Gradients flow to both.
        """
        device = self._pass.tower.device
        given = [contexts.to(device)[None], tokens.to(device).flatten(0, 1)[None]]
        return _class_features(self._pass, given)[0][0]


class _TwoTrees:
    """The forward and backward pass: `ForestPass` over one tree, then over the other. Interface of `ForestPass`."""

    def __init__(self, trees: Trees, shared: TreeLayout, own: TreeLayout, layer: int):
        self.tower, self.layer = trees.tower, layer
        rule = row_rule(trees.tower)
        self.below, self.above = (
            ForestPass(Forest(trees.tower, [(tree, 1)], rule)) for tree in (shared, own)
        )
        rows = [np.cumsum(tree.tree.live) - 1 for tree in (shared, own)]  # of live nodes
        source = np.full(own.rows, -1)
        for leaf, own_leaf in zip(shared.tree.leaf, own.tree.leaf, strict=True):
            for node, own_node in zip(shared.tree.path(int(leaf)), own.tree.path(int(own_leaf)), strict=True):
                if own.tree.live[own_node] and not own.tree.learned[own_node]:
                    source[rows[1][own_node]] = rows[0][node]
        kept = np.flatnonzero(source >= 0)
        sources, position = np.unique(source[kept], return_inverse=True)
        device = trees.tower.device
        self.own, self.kept = own, torch.as_tensor(kept, device=device)
        self.source = torch.as_tensor(source[kept], device=device)
        self.sources = torch.as_tensor(sources, device=device)
        self.sum_sources = OrderedSum(position, device, trees.tower.sum_dtype)

    @torch.no_grad()
    @disable_autocast
    def forward(self, given: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        """Return [class features (1, classes, dim)] of contexts (1, M, width) and tokens (1, classes M, width)."""
        contexts, tokens = given
        x = self.below.input([contexts], workspace)
        for layer in range(self.layer):
            x = self.below.layer(layer, x, workspace)
        x = x.clone()  # the next input has the same memory
        if self.layer == self.above.last:  # it writes queries of leaves only, and reads the others as padding
            workspace.qkv(self.above.forest.rows, 3 * self.tower.width).zero_()
        y = workspace.layers[self.layer].x(self.above.forest.rows, self.tower.width)
        y[self.above.forest.used_rows :].zero_()
        y.index_copy_(0, self.kept, x.index_select(0, self.source))
        y.index_copy_(0, self.own.learned_rows, tokens[0, self.own.slots].to(self.tower.dtype))
        for layer in range(self.layer, len(self.tower.blocks)):
            y = self.above.layer(layer, y, workspace)
        return self.above.output(y, workspace)

    @torch.no_grad()
    @disable_autocast
    def backward(self, grads: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
        """Return the gradients of the contexts and of the tokens."""
        grad = self.above.output_backward(grads, workspace)
        for layer in range(self.above.last, self.layer - 1, -1):
            grad = self.above.layer_backward(layer, grad, workspace)
        tokens = self.own.sum_slots(grad[self.own.learned_rows][None])
        below = grad.new_zeros(self.below.forest.rows, self.tower.width)
        below[self.sources] = self.sum_sources(grad[self.kept][None])[0]
        for layer in range(self.layer - 1, -1, -1):
            below = self.below.layer_backward(layer, below, workspace)
        return [*self.below.input_backward(below), tokens]
