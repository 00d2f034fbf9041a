"""The token tree: every distinct prefix of a set of prompts, once.

CLIP's text tower is causal, so what a position computes depends on the slots before it and nothing else. Two
prompts that share a prefix share it in every layer: one node each is enough. A tree holds one run's prompts;
the trees of all the runs that train together are the forest.

        start -- v1 -- v2 -+- cat -- . -- end          5 prompts of 6 slots would be 30 positions;
                           +- dog -+- . -- end         the tree has 3 + 3 + 3 + ...
                                   +- house -- . -- end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastcoop.prompts.layout import Prompt, Slot


@dataclass(frozen=True, eq=False)
class Tree:
    """Nodes in depth-first order; node ``k`` is ``q`` or an ancestor of it iff ``k <= q < subtree_end[k]``.

    All arrays are int64 or bool of shape (nodes,) unless said otherwise:
    ``parent`` (-1 at the root), ``depth`` (the position in the prompt), ``subtree_end``; ``learned`` and ``index``
    are the node's slot; ``live`` marks nodes with a learned vector at or above them. The others are constants
    of the frozen tower. ``leaf`` (classes,) is the node of each class's end token.
    """

    parent: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray
    learned: np.ndarray
    index: np.ndarray
    live: np.ndarray
    leaf: np.ndarray

    @property
    def nodes(self) -> int:
        return len(self.parent)

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to ``node``, both included."""
        path = [node]
        while self.parent[path[-1]] >= 0:
            path.append(int(self.parent[path[-1]]))
        return path[::-1]

    def attends(self) -> np.ndarray:
        """Return the tree's attention mask, bool (nodes, nodes): query q reads key k where it is true.

        The plain statement of the mask, for references and tests; quadratic in the nodes.
        """
        key, query = np.arange(self.nodes)[None, :], np.arange(self.nodes)[:, None]
        return (key <= query) & (query < self.subtree_end[None, :])


def build_tree(prompts: Sequence[Prompt]) -> Tree:
    """Return the tree of ``prompts`` (one per class; equal prompts share a leaf)."""
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

    parents = np.array(parent, np.int64)
    learned = np.array([slots[node - 1].learned for node in order])
    subtree_end = np.arange(1, len(order) + 1)
    live = learned.copy()
    for node in range(len(order) - 1, 0, -1):
        above = parents[node]
        if above >= 0:
            subtree_end[above] = max(subtree_end[above], subtree_end[node])
    for node in range(len(order)):
        live[node] |= parents[node] >= 0 and live[parents[node]]
    return Tree(
        parent=parents,
        depth=np.array(depth, np.int64),
        subtree_end=subtree_end,
        learned=learned,
        index=np.array([slots[node - 1].number for node in order], np.int64),
        live=live,
        leaf=place[ends],
    )
