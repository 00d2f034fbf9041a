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

from fastcoop.prompts.layout import Prompt, Slot


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
    children: list[dict[Slot, int]] = [{}]  # entry 0 is above the root
    slots: list[Slot] = []
    ends = []
    for prompt in prompts:
        at = 0
        for slot in prompt:
            if slot not in children[at]:
                children.append({})
                slots.append(slot)
                children[at][slot] = len(slots)
            at = children[at][slot]
        ends.append(at)

    order: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    place = np.zeros(len(slots) + 1, np.int64)
    stack = [(child, -1, 0) for child in reversed(children[0].values())]
    while stack:
        node, above, level = stack.pop()
        here = place[node] = len(order)
        order.append(node)
        parent.append(above)
        depth.append(level)
        stack.extend((child, here, level + 1) for child in reversed(children[node].values()))

    learned = np.array([slots[node - 1].learned for node in order])
    subtree_end, live = np.arange(1, len(order) + 1), learned.copy()
    for node in range(len(order) - 1, 0, -1):
        if parent[node] >= 0:
            subtree_end[parent[node]] = max(subtree_end[parent[node]], subtree_end[node])
    for node, above in enumerate(parent):
        live[node] |= above >= 0 and live[above]
    index = np.array([slots[node - 1].number for node in order], np.int64)
    return Tree(np.array(parent), np.array(depth), subtree_end, learned, index, live, place[ends])
