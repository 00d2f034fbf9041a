"""Prompts: their layout, their tree of distinct tokens, where contexts start, and the words they end up near."""

from fastcoop.prompts.initial import initial_contexts, word_tokens
from fastcoop.prompts.layout import PromptLayout, class_prompts
from fastcoop.prompts.nearest import Metric, Nearest, chance_at_lengths, distance_by_chance, nearest_words
from fastcoop.prompts.tree import Tree, build_tree

__all__ = [
    "Metric",
    "Nearest",
    "PromptLayout",
    "Tree",
    "build_tree",
    "chance_at_lengths",
    "class_prompts",
    "distance_by_chance",
    "initial_contexts",
    "nearest_words",
    "word_tokens",
]
