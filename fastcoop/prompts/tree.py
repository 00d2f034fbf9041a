"""The token tree: every distinct prefix of a set of prompts, once.

CLIP's text tower is causal: what a position computes depends on the slots up to it alone. Prompts that share a prefix
share its activations in every layer, so one node for each distinct prefix is enough:

        start -- v1 -- v2 -+- cat -- . -- end
                           +- dog -+- . -- end
                                   +- house -- . -- end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastcoop.errors import UserError
from fastcoop.memo import memoize
from fastcoop.prompts.layout import Prompt, PromptLayout, Slot, Tokenizer, class_prompts

TreeKey = tuple[tuple[str, ...], PromptLayout]


@dataclass(frozen=True, eq=False)
class Tree:
    """Nodes in depth-first order: node k is q or an ancestor of q if and only if ``k <= q < subtree_end[k]``."""

    parent: np.ndarray  # (nodes,) int64; -1 at the root
    depth: np.ndarray  # (nodes,) int64, the position in the prompt
    subtree_end: np.ndarray  # (nodes,) int64
    learned: np.ndarray  # (nodes,) bool: the slot is a learned vector
    index: np.ndarray  # (nodes,) int64: the token or vector
    live: np.ndarray  # (nodes,) bool: a learned vector is at or above the node; other nodes are constants
    leaf: np.ndarray  # (classes,) int64: the node of each class's end token

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.parent)

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to ``node``, both included."""
        path = [node]
        while self.parent[path[-1]] >= 0:
            path.append(int(self.parent[path[-1]]))
        return path[::-1]


def build_tree(prompts: Sequence[Prompt]) -> Tree:
    """Return the tree of ``prompts``, one per class; equal prompts share a leaf."""
    nodes: list[tuple[int, int, bool, int, bool]] = []  # parent, depth, learned, index, live
    subtree_end: list[int] = []
    leaf = np.zeros(len(prompts), np.int64)

    def add(group: Sequence[int], above: int, level: int, live: bool) -> None:
        """Add the nodes below ``above``, at this level and deeper, of the prompts in ``group``."""
        members: dict[Slot, list[int]] = {}
        for k in group:
            if level == len(prompts[k]):
                leaf[k] = above
            else:
                members.setdefault(prompts[k][level], []).append(k)
        for slot, below in members.items():
            node, is_live = len(nodes), live or slot.learned
            nodes.append((above, level, *slot, is_live))
            subtree_end.append(node)
            add(below, node, level + 1, is_live)
            subtree_end[node] = len(nodes)

    add(range(len(prompts)), -1, 0, False)
    parent, depth, learned, index, live = (np.array(column) for column in zip(*nodes, strict=True))
    return Tree(parent, depth, np.array(subtree_end), learned, index, live, leaf)


def tree_key(class_names: Sequence[str], layout: PromptLayout) -> TreeKey:
    """Return what identifies a tree. Raises UserError for a single name in place of a list of names."""
    if isinstance(class_names, str):
        raise UserError(f'Expected a list of class names, got the single name "{class_names}".')
    return tuple(class_names), layout


@memoize(64)
def class_tree(
    tokenizer: Tokenizer, names: tuple[str, ...], layout: PromptLayout, length: int, end_id: int | None
) -> Tree:
    """Return the tree of a run's prompts for a tower of ``length`` positions.

    The tower reads its output at the token ``end_id``, or at the largest token where that is None.

    Raises:
        UserError: For a prompt that does not fit the tower, or that the tower does not read at its last token.
    """
    prompts = class_prompts(tokenizer, names, layout, length)
    for prompt in prompts:
        tokens = [slot.number for slot in prompt if not slot.learned]
        read = max(tokens) if end_id is None else end_id
        if read not in tokens or tokens.index(read) != len(tokens) - 1:
            raise UserError(
                f"This text tower reads its output at token {read}, but its tokenizer ends a prompt with token "
                f"{tokens[-1]}; choose a tokenizer that belongs to the tower."
            )
    return build_tree(prompts)
