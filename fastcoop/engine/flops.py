"""Floating-point operations of a training step: two per multiply-add of every matrix product, nothing else counted."""

from __future__ import annotations

from fastcoop.engine.forest import Forest, Group


def forest_flops(forest: Forest) -> float:
    """Operations that one forward and backward pass of the forest needs.

    Comparisons that attention makes and masks away (a few in a hundred of all operations) do not count.
    """
    return sum(_group_flops(group, forest) for group in forest.groups)


def official_text_flops(classes: int, tokens: int, width: int, hidden: int, layers: int, dim: int) -> float:
    """Operations of the plain way: ``classes`` prompts of ``tokens`` positions, weights frozen, forward and backward.

    Backward goes through every product once, for the gradient of its input; attention's four products twice.
    """
    dense = 2 * 2 * (4 * width * width + 2 * width * hidden)
    attention = 12 * width * tokens
    return classes * (tokens * layers * (dense + attention) + 2 * 2 * width * dim)


def _group_flops(group: Group, forest: Forest) -> float:
    tower, plan = forest.tower, group.plan
    width, hidden, layers = tower.width, tower.hidden, len(tower.blocks)
    keys = plan.depth + 1  # a node reads those above it and itself
    in_a_layer, in_the_last = int(keys.sum()), int(keys[plan.leaf_rows].sum())  # there, only end tokens ask
    attention = 12 * width * ((layers - 1) * in_a_layer + in_the_last)

    both = 2 * 2  # a multiply and an add, forward and backward
    branch = width * width + 2 * width * hidden
    first = (len(plan.learned_rows) * 3 * width * width + plan.rows * branch) if layers > 1 else 0
    middle = max(layers - 2, 0) * plan.rows * (3 * width * width + branch)
    last = plan.rows * 2 * width * width + plan.leaves * (width * width + branch)
    dense = both * (first + middle + last + plan.leaves * width * tower.dim)
    return group.runs * (dense + attention)
