"""From class names and a layout to what the engine trains on, worked out once per tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcoop.backbones import Backbone
from fastcoop.engine.forest import Constants, constants_of
from fastcoop.engine.plan import TreePlan, plan_tree
from fastcoop.engine.weights import fold
from fastcoop.errors import UserError
from fastcoop.prompts.layout import Prompt, PromptLayout, Tokenizer, class_prompts
from fastcoop.prompts.tree import Tree, build_tree
from fastcoop.remember import remember

TreeKey = tuple[tuple[str, ...], PromptLayout]


class Trees:
    """The trees of one backbone's runs: ``trees[class_names, layout]`` is a plan and its constants.

    dtype: of the weights and activations, in place of the backbone's own.

    Raises UserError (on first use of a key) where a prompt does not fit the text tower.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype | None = None):
        self.tower = fold(backbone.text, dtype)
        self._tokenizer = backbone.tokenizer
        self._context_length, self._end_id = backbone.text.context_length, backbone.text.end_id
        self._known: dict[TreeKey, tuple[TreePlan, Constants]] = {}

    def __getitem__(self, key: TreeKey) -> tuple[TreePlan, Constants]:
        if key not in self._known:
            tree = tree_of(self._tokenizer, *key, self._context_length, self._end_id)
            plan = plan_tree(tree, self.tower.device, self.tower.dtype)
            self._known[key] = plan, constants_of(self.tower, plan)
        return self._known[key]


def tree_key(class_names: Sequence[str], layout: PromptLayout) -> TreeKey:
    """Runs with equal keys share a tree. Raises UserError for one name where a list of them was meant."""
    if isinstance(class_names, str):
        raise UserError(f'A list of class names was expected; the single name "{class_names}" came.')
    return tuple(class_names), layout


@remember(64)
def tree_of(
    tokenizer: Tokenizer,
    class_names: tuple[str, ...],
    layout: PromptLayout,
    context_length: int,
    end_id: int | None,
) -> Tree:
    """Return the tree of a run's prompts. Raises UserError where a prompt does not fit the text tower."""
    prompts = class_prompts(tokenizer, class_names, layout, context_length)
    _check_end(prompts, end_id)
    return build_tree(prompts)


def _check_end(prompts: Sequence[Prompt], end_id: int | None) -> None:
    """Refuse prompts that the tower would read elsewhere than at their last token, as the engine does.

    ``end_id``: the token that the tower reads at; None for the largest.
    """
    for prompt in prompts:
        tokens = [slot.number for slot in prompt if not slot.learned]
        read = max(tokens) if end_id is None else end_id
        if read not in tokens or tokens.index(read) != len(tokens) - 1:
            raise UserError(
                f"This text tower reads its output at token {read}, but its tokenizer ends a prompt with token "
                f"{tokens[-1]}; choose a tokenizer that belongs to the tower."
            )
