"""The forest: the trees of all runs that train together, side by side, and the memory that a step of them writes.

Runs with equal class names and prompt layout have the same tree, so they are a batch dimension over one tree: a
`Group`. The rows of all groups follow one another; the dense products see only (rows, width). A forest holds indices
and constants, which never change; a `Workspace` holds everything that a step writes.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone, PlainTower, TextTower
from fastcoop.backbones.precision import disable_autocast
from fastcoop.engine.plain import PlainLayout, prompts_of
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.engine.weights import ANY_ROWS, CPU_CHUNK, FoldedTower, RowRule, fold
from fastcoop.prompts.tree import TreeKey, class_tree


class Trees:
    """The tower of a backbone, folded if causal, and the layouts of its runs: ``trees[class_names, prompt_layout]``.

    Prompts are laid out at their first use, as a tree or plainly, which raises UserError where one does not fit the
    text tower.
    """

    tower: Any  # FoldedTower or PlainTower

    def __init__(self, backbone: Backbone, dtype: torch.dtype | None = None):
        self._text, self._tokenizer = backbone.text, backbone.tokenizer
        if isinstance(self._text, TextTower):
            self.tower = fold(self._text, dtype)
        else:
            _ = self._text.token_embedding  # raises if there is none
            self.tower = self._text
            if dtype not in (None, self._text.dtype):
                self.tower = self._text.map(lambda w: w.to(dtype) if w.is_floating_point() else w)
        self._known: dict[TreeKey, Any] = {}

    @disable_autocast
    def __getitem__(self, key: TreeKey) -> Any:
        """Return the `TreeLayout` or `PlainLayout`."""
        if key not in self._known:
            tokenizer, text = self._tokenizer, self._text
            if isinstance(text, TextTower):
                tree = class_tree(tokenizer, *key, text.context_length, text.end_id)
                self._known[key] = TreeLayout(tree, self.tower)
            else:
                self._known[key] = PlainLayout(prompts_of(tokenizer, *key, text.context_length), self.tower)
        return self._known[key]

    def replace_tower(self, tower: FoldedTower | PlainTower) -> None:
        """Use ``tower``, on another device or in another precision, from now on."""
        self.tower = tower
        self._known.clear()


@dataclass(frozen=True, eq=False)
class Group:
    """``runs`` runs of one tree, and where the first one begins among the forest's rows and leaves."""

    tree_layout: TreeLayout
    runs: int
    first_row: int
    first_leaf: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.runs * self.tree_layout.rows)

    @property
    def leaves(self) -> slice:
        return slice(self.first_leaf, self.first_leaf + self.runs * self.tree_layout.leaves)

    def rows_of(self, index: Tensor) -> Tensor:
        """Return the forest's rows (runs n,) for the rows ``index`` (n,) of one run."""
        starts = self.first_row + self.tree_layout.rows * torch.arange(self.runs, device=index.device)
        return (starts[:, None] + index).reshape(-1)

    def split(self, most: int) -> Iterator[Group]:
        """Yield the runs as groups of at most ``most``."""
        layout = self.tree_layout
        for run in range(0, self.runs, most):
            first = self.first_row + run * layout.rows, self.first_leaf + run * layout.leaves
            yield Group(layout, min(most, self.runs - run), *first)


class Forest:
    """Groups one after another. Rows and leaves are padded at the end with spare ones, to numbers ``rule`` allows."""

    def __init__(self, tower: FoldedTower, trees: Sequence[tuple[TreeLayout, int]], rule: RowRule = ANY_ROWS):
        self.tower, self.rule = tower, rule
        self.used_rows = self.used_leaves = self.vectors = 0
        self.groups: list[Group] = []
        vectors, leaves = [], []
        for layout, runs in trees:
            run = np.arange(runs)[:, None]
            vectors.append((self.vectors + run * layout.vectors + layout.vector_of_row).ravel())
            leaves.append((self.used_leaves + run * layout.leaves + layout.class_leaf).ravel())
            self.groups.append(Group(layout, runs, self.used_rows, self.used_leaves))
            self.used_rows += runs * layout.rows
            self.used_leaves += runs * layout.leaves
            self.vectors += runs * layout.vectors
        self.vector_of_row = np.concatenate(vectors)  # of all runs, for each row with a context vector
        self.leaf_of_class = np.concatenate(leaves)  # of all runs, for each of their classes
        # Spare rows only bring a product to an allowed number of rows. No other row reads them.
        self.rows = rule.padded(self.used_rows)  # spare rows included
        self.learned_rows, self.frozen_rows, leaf_rows = (
            torch.cat([g.rows_of(getattr(g.tree_layout, name)) for g in self.groups])
            for name in ("learned_rows", "frozen_rows", "leaf_rows")
        )
        self.learned_positions, self.frozen_input, self.frozen_qkv = (
            torch.cat([getattr(g.tree_layout, name).repeat(g.runs, 1) for g in self.groups])
            for name in ("learned_positions", "frozen_input", "frozen_qkv")
        )
        self.leaf_rows = self._padded(leaf_rows)
        self.leaves = len(self.leaf_rows)  # spare leaves included
        self.first_rows = self._padded(self.learned_rows)  # rows that the first layer computes
        # Rows that are worked on at a time, so that they stay in a CPU's cache. A GPU takes all at once.
        self.chunk = CPU_CHUNK if tower.device.type == "cpu" else sys.maxsize

    def chunks(self, rows: int) -> Iterator[slice]:
        """Cut ``rows`` rows into chunks."""
        return (slice(i, min(i + self.chunk, rows)) for i in range(0, rows, self.chunk))

    def _padded(self, index: Tensor) -> Tensor:
        """Repeat the first entry up to an allowed number of rows."""
        return torch.cat([index, index[:1].expand(self.rule.padded(len(index)) - len(index))])


class Buffer:
    """Memory of one tensor, replaced where a larger view of it is asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.memory = torch.empty(0, dtype=dtype, device=device)
        self._views: dict[tuple[int, ...], Tensor] = {}  # a step needs the same few views, thousands of times

    def __call__(self, *shape: int) -> Tensor:
        """Return a view of this shape; its content is whatever was written last."""
        view = self._views.get(shape)
        if view is None:
            size = math.prod(shape)
            if self.memory.numel() < size:
                self.memory = self.memory.new_empty(size)
                self._views.clear()
            view = self._views[shape] = self.memory[:size].view(shape)
        return view


class LayerMemory:
    """What a layer's forward pass writes for its backward pass, besides its input."""

    def __init__(self, buffer: Callable[[], Buffer]):
        # Of each chunk of rows, means and reciprocal deviations of the input and of ``middle``.
        self.x_stats: list[list[Tensor]] = []
        self.middle_stats: list[list[Tensor]] = []
        self.qkv = buffer()  # (rows, 3 width): queries, keys and values
        # Of each group, with the kernels for CPUs: (runs, heads, queries' keys). Nothing is kept for None.
        self.probabilities = defaultdict[Group | None, Buffer](buffer)
        # The MLP; in the last layer, of leaves.
        self.middle = buffer()  # (rows, width): the residual stream between attention and MLP
        self.hidden = buffer()  # (rows, hidden): the MLP before its activation


class Workspace:
    """The memory that passes of one forest write, allocated by the first: later steps page-fault no large tensor.

    Without ``keep``, no backward follows forward, and layers share their memory.
    """

    def __init__(self, tower: FoldedTower, keep: bool = True):
        buffers: list[Buffer] = []  # the closures must not refer to self: a cycle would delay freeing

        def buffer(dtype: torch.dtype = tower.dtype) -> Buffer:
            buffers.append(Buffer(dtype, tower.device))
            return buffers[-1]

        self.keep, self._buffers, count = keep, buffers, len(tower.blocks) + 1
        # The residual stream that enters each layer, (rows, width); behind the last, the tower's output at leaves.
        x = [buffer() for _ in range(count if keep else 2)]
        self.x = [x[layer % len(x)] for layer in range(count)]
        layers = [LayerMemory(buffer) for _ in range(count if keep else 1)]
        self.layers = [layers[layer % len(layers)] for layer in range(count)]

        # Scratch memory. A gradient has the memory of the tensor that its computation no longer reads.
        self.grad_qkv = buffer()  # (rows, 3 width)
        self.attended = self.grad_attended = buffer()  # (rows, width): attention's output
        self.activation = buffer()  # (rows of a chunk, hidden): behind the activation, or the gradient there
        self.grad_x = buffer(tower.sum_dtype)  # (rows, width): gradient of the first or last layer's input

        # With kernels.
        self.learned_x = buffer()  # (learned rows, width): the first layer's input where it has a vector
        self.leaf_q = buffer()  # (leaves, width): the last layer's queries
        self.slots = buffer(tower.sum_dtype)  # (chain entries, 2 width)
        self.first_layer_of: object = None  # the pass that has written the tokens' rows of the first layer

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)
