"""The forest that one step works on: trees side by side, each for several runs, and the constants they read.

Runs with equal class names, layout and M have the same tree, so they are a batch dimension over one tree: a
``Group``. The rows of all groups lie one after another; the dense products see only (rows, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.engine.plan import TreePlan
from fastcoop.engine.precision import own_precision
from fastcoop.engine.rows import ANY, RowRule
from fastcoop.engine.weights import FoldedTower


@dataclass(frozen=True, eq=False)
class Constants:
    """Keys and values of a tree's constant nodes, per layer.

    ``shared``: per layer (2, H, S, d), the constants above every path. ``parts``: per layer, per part,
    (2, H, P, B, d) or None. ``first_qkv`` (frozen rows, 3 width): the first layer's queries, keys and values of
    frozen tokens, which no context reaches before that layer's attention. ``first_input`` (frozen rows, width).
    """

    shared: list[Tensor]
    parts: list[list[Tensor | None]]
    first_qkv: Tensor
    first_input: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """``runs`` runs over one tree; its rows in the forest are ``rows``, run by run, its leaves ``leaves``."""

    plan: TreePlan
    constants: Constants
    runs: int
    rows: slice
    leaves: slice


@dataclass(frozen=True, eq=False)
class Forest:
    """Groups with their places in the forest's rows and leaves, and the index tensors over all of them.

    Behind the groups' rows and leaves stand spare ones, as many as ``rule`` asks for.
    """

    groups: tuple[Group, ...]
    tower: FoldedTower = field(repr=False)
    rule: RowRule = ANY

    @property
    def live_rows(self) -> int:
        return self.groups[-1].rows.stop

    @property
    def live_leaves(self) -> int:
        return self.groups[-1].leaves.stop

    @cached_property
    def rows(self) -> int:
        """Rows of the dense products, spare ones too."""
        return self.rule.padded(self.live_rows)

    @property
    def leaves(self) -> int:
        """Rows of the last layer's products, spare ones too."""
        return len(self.leaf_rows)

    @property
    def nodes(self) -> int:
        """Distinct nodes as the design counts them: every tree's, once per run."""
        return sum(group.plan.tree.nodes * group.runs for group in self.groups)

    @cached_property
    def leaf_rows(self) -> Tensor:
        """(leaves,) rows of the end tokens; the first one's at spare leaves."""
        return self._padded(self._per_run("leaf_rows"))

    @cached_property
    def learned_rows(self) -> Tensor:
        """Rows that hold a context vector, group by group, run by run."""
        return self._per_run("learned_rows")

    @cached_property
    def first_rows(self) -> Tensor:
        """``learned_rows``, and the first one's again up to a number of rows that the rule allows."""
        return self._padded(self.learned_rows)

    @cached_property
    def frozen_rows(self) -> Tensor:
        return self._per_run("frozen_rows")

    @cached_property
    def learned_positions(self) -> Tensor:
        """(learned rows, width): the positional embeddings at the learned rows."""
        return torch.cat(
            [
                self.tower.positional_embedding[g.plan.depth[g.plan.learned_rows]].repeat(g.runs, 1)
                for g in self.groups
            ]
        ).to(self.tower.dtype)

    def frozen(self, name: str) -> Tensor:
        """The constants ``first_qkv`` or ``first_input``, repeated for every run."""
        return torch.cat([getattr(g.constants, name).repeat(g.runs, 1) for g in self.groups])

    def _padded(self, index: Tensor) -> Tensor:
        return torch.cat([index, index[:1].expand(self.rule.padded(len(index)) - len(index))])

    def _per_run(self, name: str) -> Tensor:
        indices = []
        for g in self.groups:
            starts = g.rows.start + g.plan.rows * torch.arange(g.runs, device=self.tower.device)
            indices.append((starts[:, None] + getattr(g.plan, name)[None, :]).reshape(-1))
        return torch.cat(indices)


def plant(
    tower: FoldedTower, trees: Sequence[tuple[TreePlan, Constants, int]], rule: RowRule = ANY
) -> Forest:
    """Put trees side by side: each (plan, constants, runs) becomes a group."""
    groups, row, leaf = [], 0, 0
    for plan, constants, runs in trees:
        rows, leaves = runs * plan.rows, runs * plan.leaves
        groups.append(Group(plan, constants, runs, slice(row, row + rows), slice(leaf, leaf + leaves)))
        row, leaf = row + rows, leaf + leaves
    return Forest(tuple(groups), tower, rule)


@torch.no_grad()
@own_precision
def constants_of(tower: FoldedTower, plan: TreePlan) -> Constants:
    """Compute what never changes while a tree trains, once.

    The constant nodes form paths of their own (the start token; with the class in front, the class names): a
    plain causal pass over those paths gives their keys and values in every layer.
    """
    tree, heads = plan.tree, tower.heads
    paths = [[node for node in tree.path(int(leaf)) if not tree.live[node]] for leaf in plan.tree.leaf]
    longest = max(len(path) for path in paths)
    nodes = torch.tensor([path + [path[-1]] * (longest - len(path)) for path in paths])
    tokens = torch.as_tensor(tree.index)[nodes].to(tower.device)
    x = (tower.token_embedding[tokens] + tower.positional_embedding[:longest]).to(tower.dtype)

    where = torch.zeros(tree.nodes, dtype=torch.long)  # a (path, position) that holds each constant node
    where[nodes.flip(1).reshape(-1)] = torch.arange(nodes.numel()).view_as(nodes).flip(1).reshape(-1)
    where = where.to(tower.device)
    shared_at = where[torch.as_tensor(plan.shared_constants)]
    part_at = [
        None if part.constants is None else where[torch.as_tensor(part.constants)] for part in plan.parts
    ]

    shared: list[Tensor] = []
    parts: list[list[Tensor | None]] = []
    for block in tower.blocks:
        normal = tower.layer_norm(x, block.eps_1)[0]
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (normal @ block.qkv).chunk(3, dim=-1)
        )
        kv = torch.stack([k, v]).transpose(1, 2).flatten(2, 3)  # (2, H, paths * positions, d)
        shared.append(kv[:, :, shared_at].contiguous())
        parts.append([None if at is None else kv[:, :, at].contiguous() for at in part_at])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        x = x + out.transpose(1, 2).flatten(2) @ block.out + block.out_bias
        hidden = tower.layer_norm(x, block.eps_2)[0] @ block.fc
        x = x + activate(hidden, tower.activation) @ block.proj + block.proj_bias

    first = (
        tower.token_embedding[plan.frozen_tokens] + tower.positional_embedding[plan.depth[plan.frozen_rows]]
    )
    first = first.to(tower.dtype)
    block = tower.blocks[0]
    first_qkv = tower.layer_norm(first, block.eps_1)[0] @ block.qkv
    return Constants(shared, parts, first_qkv, first)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply a folded tower's activation."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
