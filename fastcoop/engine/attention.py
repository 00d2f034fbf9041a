"""Attention over the forest, prompt by prompt: the plain way, for every device and precision.

A row reads itself and its ancestors. Here the keys of each prompt are gathered, those that it shares with others too,
and the rows that no earlier prompt has are its queries. `kernels.cpu` and `kernels.attention` compute the same on the
rows where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.forest import Forest, Group, Workspace
from fastcoop.engine.tree_layout import NONE, TreeLayout, padded

GATHERED = {"cpu": 2048, "cuda": 65536}  # keys at a time: on a CPU they stay in its cache


class Paths(NamedTuple):
    """P prompts of a tree with equally many queries.

    Example: the classes "cat" and "dog" behind one vector, so the rows v, cat, end, dog, end, and behind them the start
    token as place 5. The first prompt has the queries 0, 1, 2 and the keys 5, 0, 1, 2; the second one the queries 3, 4
    and the keys 5, 0, 3, 4. In the last layer they have the queries 2 and 4, whose outputs are 0 and 1.
    """

    queries: Tensor  # (P, Q) rows
    outputs: Tensor  # (P Q,) their places in the output
    keys: Tensor  # (P, T) places among a run's rows and, behind them, its constants; at the end 0 as padding
    mask: Tensor  # (P, 1, Q, T) added to scores: 0 where a query reads a key, else -inf


def paths_of(layout: TreeLayout, leaves_only: bool, dtype: torch.dtype) -> list[Paths]:
    """Return the prompts of a tree, by their numbers of queries; with ``leaves_only`` each has one, its end token."""
    tree, device = layout.tree, layout.leaf_rows.device
    place = np.where(tree.live, np.cumsum(tree.live) - 1, layout.rows + np.cumsum(~tree.live) - 1)
    output = np.searchsorted(np.unique(tree.leaf), np.arange(tree.nodes)) if leaves_only else place
    asked, prompts = ~tree.live, []  # nodes that are no queries, or of an earlier prompt
    for leaf in np.unique(tree.leaf):
        nodes = np.array(tree.path(int(leaf)))
        prompts.append((nodes[-1:] if leaves_only else nodes[~asked[nodes]], nodes))
        asked[nodes] = True

    def number(prompt: tuple[np.ndarray, np.ndarray]) -> int:
        return len(prompt[0])

    groups = [list(equal) for _, equal in groupby(sorted(prompts, key=number), key=number)]
    found, most = [], max(1, _keys_at_once(device) // (int(tree.depth.max()) + 1))
    for part in (group[i : i + most] for group in groups for i in range(0, len(group), most)):
        own, nodes = zip(*part, strict=True)
        queries, keys = np.stack(own), padded(nodes)
        is_read = np.arange(keys.shape[1]) <= tree.depth[queries][..., None]
        mask = torch.zeros(is_read.shape, dtype=dtype).masked_fill_(torch.as_tensor(~is_read), -torch.inf)
        indices = place[queries], output[queries].ravel(), np.where(keys == NONE, 0, place[keys])
        rows, outputs, sources = (torch.as_tensor(index, device=device) for index in indices)
        found.append(Paths(rows, outputs, sources, mask[:, None].to(device)))
    return found


def _keys_at_once(device: torch.device) -> int:
    return GATHERED.get(device.type, GATHERED["cpu"])


def constant_rows(layout: TreeLayout) -> list[Tensor]:
    """Return each layer's keys and values of the constants, (constants, 2 width)."""
    return [kv.permute(2, 0, 1, 3).flatten(1).contiguous() for kv in layout.constants]


class PathAttention:
    """Attention of all layers of one forest. Queries arrive scaled (the weights are folded).

    Shapes: R runs, P prompts, H heads of d numbers, Q queries, T keys.
    """

    def __init__(self, forest: Forest):
        self.forest, self.width, self.heads = forest, forest.tower.width, forest.tower.heads
        self.last = len(forest.tower.blocks) - 1
        layouts, dtype = {g.tree_layout: None for g in forest.groups}, forest.tower.dtype
        self._paths = {(one, last): paths_of(one, last, dtype) for one in layouts for last in (False, True)}
        self._constants = {layout: constant_rows(layout) for layout in layouts}

    def qkv(self, layer: int, workspace: Workspace) -> Tensor:
        """Return the memory (rows, 3 width) into which the tower writes a layer's queries, keys and values."""
        return workspace.layers[layer].qkv(self.forest.rows, 3 * self.width)

    def forward(self, layer: int, workspace: Workspace) -> Tensor:
        """Return the outputs (rows, width) for what is in ``qkv``; in the last layer (leaves, width)."""
        forest, is_last = self.forest, layer == self.last
        result = workspace.attended(forest.leaves if is_last else forest.rows, self.width)
        for group, all_paths in self._chunks(is_last):
            own, kv = _by_run(result, group, is_last), self._kv(layer, group, workspace)
            for paths in all_paths:
                _, _, v, probabilities = self._read(layer, group, paths, kv, workspace)
                own.index_copy_(1, paths.outputs, _join_heads(probabilities @ v))
        result[forest.used_leaves if is_last else forest.used_rows :].zero_()
        return result

    def backward(self, layer: int, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of ``qkv`` (rows, 3 width) from that of the outputs. It computes the scores again.

        In the last layer, the queries' gradient is defined at leaves only.
        """
        forest, width, is_last = self.forest, self.width, layer == self.last
        result = workspace.grad_qkv(forest.rows, 3 * width)
        for group, all_paths in self._chunks(is_last):
            own, kv = _by_run(grad, group, is_last), self._kv(layer, group, workspace)
            of_qkv = _by_run(result, group, False)
            of_kv = torch.zeros_like(kv, dtype=forest.tower.sum_dtype)
            for paths in all_paths:
                q, k, v, probabilities = self._read(layer, group, paths, kv, workspace)
                of_output = self._gather(own, paths.outputs.view_as(paths.queries), 1)[0]
                scores = of_output @ v.mT
                scores = probabilities * (scores - (scores * probabilities).sum(-1, keepdim=True))
                of_qkv[..., :width].index_copy_(1, paths.queries.flatten(), _join_heads(scores @ k))
                of_keys = _join_heads(scores.mT @ q), _join_heads(probabilities.mT @ of_output)
                at = (
                    of_kv.shape[1] * torch.arange(group.runs, device=grad.device)[:, None]
                    + paths.keys.flatten()
                )
                joined = torch.cat(of_keys, -1).to(of_kv.dtype)
                of_kv.flatten(0, 1).index_add_(0, at.flatten(), joined.flatten(0, 1))
            of_qkv[..., width:] = of_kv[:, : of_qkv.shape[1]]
        result[forest.used_rows :].zero_()
        return result

    def _chunks(self, is_last: bool) -> Iterator[tuple[Group, list[Paths]]]:
        """Yield as many runs of a group as are gathered at a time."""
        for group in self.forest.groups:
            paths = self._paths[group.tree_layout, is_last]
            gathered = max(one.keys.numel() for one in paths)
            for chunk in group.split(max(1, _keys_at_once(self.forest.tower.device) // gathered)):
                yield chunk, paths

    def _kv(self, layer: int, group: Group, workspace: Workspace) -> Tensor:
        """Return the keys and values of a run's rows and of its constants, (R, rows + constants, 2 width)."""
        rows = _by_run(self.qkv(layer, workspace), group, False)[..., self.width :]
        return torch.cat([rows, self._constants[group.tree_layout][layer].expand(group.runs, -1, -1)], 1)

    def _read(
        self, layer: int, group: Group, paths: Paths, kv: Tensor, workspace: Workspace
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries (R, P, H, Q, d), keys and values (R, P, H, T, d), and probabilities (R, P, H, Q, T)."""
        rows = _by_run(self.qkv(layer, workspace), group, False)
        q, (k, v) = self._gather(rows, paths.queries, 1)[0], self._gather(kv, paths.keys, 2)
        return q, k, v, torch.softmax(q @ k.mT + paths.mask, -1)

    def _gather(self, rows: Tensor, index: Tensor, kinds: int) -> Tensor:
        """Return the first ``kinds`` of queries, keys and values in ``rows`` (R, rows, n width) at ``index`` (P, m).

        The result is (kinds, R, P, H, m, d), gathered in one pass: the parts of heads, of d numbers, are numbered.
        """
        runs, count, numbers = rows.shape
        parts = torch.arange(kinds * self.heads, device=index.device).view(kinds, 1, 1, self.heads, 1)
        starts = count * torch.arange(runs, device=index.device)[:, None, None, None] + index[:, None]
        d = self.width // self.heads
        at = starts * (numbers // d) + parts
        return rows.reshape(-1, d).index_select(0, at.flatten()).view(*at.shape, d)


def _by_run(rows: Tensor, group: Group, is_last: bool) -> Tensor:
    """Return a view of a group's rows, or of its leaves in the last layer, (R, rows of a run, ...)."""
    return rows[group.leaves if is_last else group.rows].unflatten(0, (group.runs, -1))


def _join_heads(x: Tensor) -> Tensor:
    """Return (R, P, H, n, d) as (R, P n, width)."""
    return x.transpose(2, 3).flatten(3).flatten(1, 2)
