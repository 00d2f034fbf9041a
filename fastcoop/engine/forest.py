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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcoop.backbones import Backbone, PlainTower, TextTower
from fastcoop.engine.plain import PlainLayout, prompts_of
from fastcoop.engine.tree_layout import TreeKey, TreeLayout, tree_of
from fastcoop.engine.weights import ANY_ROWS, CPU_CHUNK, FoldedTower, RowRule, fold


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

    def __getitem__(self, key: TreeKey) -> Any:
        """Return the `TreeLayout` or `PlainLayout`."""
        text = self._text
        if key not in self._known and isinstance(text, TextTower):
            tree = tree_of(self._tokenizer, *key, text.context_length, text.end_id)
            self._known[key] = TreeLayout(tree, self.tower)
        elif key not in self._known:
            self._known[key] = PlainLayout(prompts_of(self._tokenizer, *key, text.context_length), self.tower)
        return self._known[key]

    def replace_tower(self, tower: FoldedTower | PlainTower) -> None:
        """Use ``tower``, on another device or in another precision, from now on."""
        self.tower = tower
        self._known.clear()


@dataclass(frozen=True, eq=False)
class Group:
    """``runs`` runs of one tree, and their places among the forest's rows and leaves, run by run."""

    tree_layout: TreeLayout
    runs: int
    rows: slice
    leaves: slice

    def rows_of(self, index: Tensor) -> Tensor:
        """Return the forest's rows (runs n,) for the rows ``index`` (n,) of one run."""
        starts = self.rows.start + self.tree_layout.rows * torch.arange(self.runs, device=index.device)
        return (starts[:, None] + index).reshape(-1)


class Forest:
    """Groups side by side. Rows and leaves are padded at the end with spare ones, to numbers that ``rule`` allows."""

    def __init__(self, tower: FoldedTower, trees: Sequence[tuple[TreeLayout, int]], rule: RowRule = ANY_ROWS):
        self.tower, self.rule = tower, rule
        rows = leaves = 0
        self.groups: list[Group] = []
        for layout, runs in trees:
            of_rows = slice(rows, rows := rows + runs * layout.rows)
            of_leaves = slice(leaves, leaves := leaves + runs * layout.leaves)
            self.groups.append(Group(layout, runs, of_rows, of_leaves))
        self.used_rows, self.used_leaves = rows, leaves
        # Spare rows only bring a product to an allowed number of rows. No other row reads them.
        self.rows = rule.padded(self.used_rows)  # spare rows included
        self.learned_rows = torch.cat([g.rows_of(g.tree_layout.learned_rows) for g in self.groups])
        self.frozen_rows = torch.cat([g.rows_of(g.tree_layout.frozen_rows) for g in self.groups])
        self.leaf_rows = self._padded(torch.cat([g.rows_of(g.tree_layout.leaf_rows) for g in self.groups]))
        self.leaves = len(self.leaf_rows)  # spare leaves included
        self.first_rows = self._padded(self.learned_rows)  # rows that the first layer computes
        self.learned_positions, self.frozen_input, self.frozen_qkv = (
            torch.cat([getattr(g.tree_layout, name).repeat(g.runs, 1) for g in self.groups])
            for name in ("learned_positions", "frozen_input", "frozen_qkv")
        )
        # Rows that are worked on at a time, so that they stay in a CPU's cache. A GPU takes all at once.
        self.chunk = CPU_CHUNK if tower.device.type == "cpu" else sys.maxsize

    def chunks(self, rows: int) -> Iterator[slice]:
        """Cut ``rows`` rows into chunks."""
        return (slice(i, min(i + self.chunk, rows)) for i in range(0, rows, self.chunk))

    def _padded(self, index: Tensor) -> Tensor:
        """Repeat the first entry up to an allowed number of rows."""
        return torch.cat([index, index[:1].expand(self.rule.padded(len(index)) - len(index))])


class Buffer:
    """Memory of one tensor, allocated once and replaced where a larger view of it is asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.memory = torch.empty(0, dtype=dtype, device=device)
        self.used_bytes = 0
        self._views: dict[tuple[int, ...], Tensor] = {}  # a step needs the same few views, thousands of times

    def __call__(self, *shape: int) -> Tensor:
        """Return a view of this shape; its content is whatever was written last."""
        view = self._views.get(shape)
        if view is None:
            size = math.prod(shape)
            if self.memory.numel() < size:
                self.memory = self.memory.new_empty(size)
                self._views.clear()
            self.used_bytes = max(self.used_bytes, size * self.memory.element_size())
            view = self._views[shape] = self.memory[:size].view(shape)
        return view


class SavedPack(NamedTuple):
    """What the backward pass of a pack of attention reads: R runs, H heads, P bundles, S shared and K own keys."""

    q: Tensor  # (R, H, P, queries, d)
    k: Tensor  # (R, H, P, K, d)
    v: Tensor  # (R, H, P, K, d)
    shared_k: Tensor  # (R, H, S, d)
    shared_v: Tensor  # (R, H, S, d)
    probabilities: Tensor  # (R, H, P, queries, S + K)


PackKey = tuple[int, int]  # a chunk of the forest's attention, a pack of its trees


class LayerMemory:
    """What a layer's forward pass writes for its backward pass; in the last layer, the last three are of leaves."""

    def __init__(self, buffer: Callable[[], Buffer], stats: Callable[[], Buffer]):
        self.x = buffer()  # (rows, width): the residual stream that enters the layer
        self.x_stats = stats()  # (2, rows, 1): means and reciprocal deviations of x
        self.middle = buffer()  # (rows, width): the residual stream between attention and MLP
        self.middle_stats = stats()  # (2, rows, 1)
        self.hidden = buffer()  # (rows, hidden): the MLP before its activation


class AttentionMemory:
    """What attention's forward pass in one layer writes for its backward pass."""

    def __init__(self, buffer: Callable[[], Buffer]):
        # Per chunk (slices, d): queries, keys and values by pack.
        self.slices = defaultdict[int, Buffer](buffer)
        self.shared_kv = defaultdict[int, Buffer](buffer)  # per chunk (2, R, H, S, d): of constants and trunk
        # (2, R, H, P, K, d): own keys and values, with the constants before them.
        self.own_kv = defaultdict[PackKey, Buffer](buffer)
        self.probabilities = defaultdict[PackKey, Buffer](buffer)  # (R, H, P, queries, S + K)
        self.qkv = buffer()  # (rows, 3 width): with kernels, in place of the others
        self.saved: dict[PackKey, SavedPack] = {}  # views of the above, for packs with queries


class Workspace:
    """The memory that steps write, allocated once: no step allocates (and page-faults) a large tensor.

    Without ``keep``, no backward follows forward, and layers share their memory.
    """

    def __init__(self, tower: FoldedTower, keep: bool = True):
        # For bfloat16 rows, a GPU's layer norm returns means and deviations in float32, and its backward expects that.
        stats_dtype = tower.layer_norm(tower.gain, 1e-5)[1].dtype
        buffers: list[Buffer] = []  # the closures must not refer to self: a cycle would delay freeing

        def buffer(dtype: torch.dtype = tower.dtype) -> Buffer:
            buffers.append(Buffer(dtype, tower.device))
            return buffers[-1]

        self.keep, self._buffers = keep, buffers
        layers = len(tower.blocks)
        # Behind the last layer, the tower's output is one more x. Without keep, every other layer shares one memory.
        memory = [LayerMemory(buffer, lambda: buffer(stats_dtype)) for _ in range(layers + 1 if keep else 2)]
        self.layers = [memory[layer % len(memory)] for layer in range(layers + 1)]
        attention = [AttentionMemory(buffer) for _ in range(layers if keep else 1)]
        self.attention = [attention[layer % len(attention)] for layer in range(layers)]

        # Scratch memory. A gradient has the memory of the tensor that its computation no longer reads.
        self.qkv = self.grad_qkv = buffer()  # (rows, 3 width): the layer's queries, keys and values
        self.attended = self.grad_attended = buffer()  # (rows, width): attention's output
        self.grad_slices = buffer()  # (slices, d)
        self.attended_slices = buffer()  # (queries, d): attention's output by pack, or its gradient
        self.scores_shared = buffer()  # (R H, P queries, S): scores, or gradients of probabilities
        self.scores_own = buffer()  # (R H P, queries, K)
        self.scores = buffer()  # (R, H, P, queries, S + K): both side by side
        self.grad_scores = buffer()  # (R, H, P, queries, S + K)
        self.activation = buffer()  # (rows of a chunk, hidden): behind the activation, or the gradient there
        self.grad_x = buffer(tower.sum_dtype)  # (rows, width): gradient of the first or last layer's input

        # With kernels.
        self.learned_x = buffer()  # (learned rows, width): the first layer's input where it has a vector
        self.leaf_q = buffer()  # (leaves, width): the last layer's queries
        self.slots = buffer(tower.sum_dtype)  # (chain entries, 2 width)
        self.first_layer_of: object = None  # the pass that has written the tokens' rows of the first layer

    def begin(self) -> None:
        """Prepare for another forest: count what it uses from zero."""
        self.first_layer_of = None
        for memory in self.attention:
            memory.saved.clear()
        for buffer in self._buffers:
            buffer.used_bytes = 0
            buffer._views.clear()

    def trim(self) -> None:
        """Free memory that no forest has used since ``begin``."""
        for buffer in self._buffers:
            if not buffer.used_bytes:
                buffer.memory = buffer.memory.new_empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes used since ``begin``."""
        return sum(buffer.used_bytes for buffer in self._buffers)
