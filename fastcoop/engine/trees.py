"""From class names and a layout to what the engine trains on, worked out once per tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcoop.backbones import Backbone
from fastcoop.engine.forest import Constants, constants_of
from fastcoop.engine.plan import TreePlan, plan_tree
from fastcoop.engine.weights import fold
from fastcoop.prompts.layout import PromptLayout, class_prompts
from fastcoop.prompts.tree import build_tree

TreeKey = tuple[tuple[str, ...], PromptLayout]


class Trees:
    """The trees of one backbone's runs: ``trees[class_names, layout]`` is a plan and its constants.

    dtype: of the weights and activations, in place of the backbone's own.

    Raises UserError (on first use of a key) where a prompt does not fit the text tower.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype | None = None):
        self.tower = fold(backbone.text, dtype)
        self._tokenizer, self._context_length = backbone.tokenizer, backbone.text.context_length
        self._known: dict[TreeKey, tuple[TreePlan, Constants]] = {}

    def __getitem__(self, key: TreeKey) -> tuple[TreePlan, Constants]:
        if key not in self._known:
            names, layout = key
            prompts = class_prompts(self._tokenizer, names, layout, self._context_length)
            plan = plan_tree(build_tree(prompts), self.tower.device, self.tower.dtype)
            self._known[key] = plan, constants_of(self.tower, plan)
        return self._known[key]


def tree_key(class_names: Sequence[str], layout: PromptLayout) -> TreeKey:
    """Runs with equal keys share a tree."""
    return tuple(class_names), layout
