"""Prompts: their layout, their tree of distinct tokens, their first contexts, and the words nearest to learned ones."""

from typing import TYPE_CHECKING

from fastcoop.memo import late_names

if TYPE_CHECKING:
    from fastcoop.prompts.layout import PromptLayout, class_prompts, word_tokens
    from fastcoop.prompts.tree import Tree, build_tree
    from fastcoop.prompts.vectors import (
        Metric,
        Nearest,
        initial_contexts,
        mean_initial_distance,
        nearest_words,
        random_distances,
    )
else:
    __getattr__ = late_names(__name__)

__all__ = [
    "Metric", "Nearest", "PromptLayout", "Tree", "build_tree", "class_prompts", "initial_contexts",
    "mean_initial_distance", "nearest_words", "random_distances", "word_tokens",
]  # fmt: skip
