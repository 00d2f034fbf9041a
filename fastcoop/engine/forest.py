"""The forest: the trees of all runs that train together, side by side, and what one step of them needs.

Runs with equal class names and prompt layout have the same tree, so they are a batch dimension over one tree: a
`Group`. The rows of all groups follow one another; the dense products see only (rows, width). A forest holds indices
and constants, which never change; the memory that a step writes is in a `Workspace`.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.engine.tree_layout import Routes, TreeKey, TreeLayout, tree_of
from fastcoop.engine.weights import ANY_ROWS, CPU_CHUNK, FoldedTower, RowRule, disable_autocast, fold


@dataclass(frozen=True, eq=False)
class Constants:
    """What never changes while a tree trains: keys and values of its constant nodes, and the input of its tokens."""

    shared: list[Tensor]  # per layer (2, H, S, d): keys and values of the constants above every path
    packs: list[list[Tensor | None]]  # per layer and pack (2, H, bundles, before, d)
    first_qkv: Tensor  # (frozen rows, 3 width): the first layer's queries, keys and values of tokens
    first_input: Tensor  # (frozen rows, width)


class Trees:
    """The trees of one tower's runs.

    ``trees[class_names, prompt_layout]`` is a `TreeLayout` and its constants, made once.

    Raises UserError, on first use of a key, where a prompt does not fit the text tower.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype | None = None):
        self.tower = fold(backbone.text, dtype)
        self._tokenizer = backbone.tokenizer
        self._context_length, self._end_id = backbone.text.context_length, backbone.text.end_id
        self._known: dict[TreeKey, tuple[TreeLayout, Constants]] = {}

    def __getitem__(self, key: TreeKey) -> tuple[TreeLayout, Constants]:
        if key not in self._known:
            tree = tree_of(self._tokenizer, *key, self._context_length, self._end_id)
            tree_layout = TreeLayout(tree, self.tower.device, self.tower.dtype)
            self._known[key] = tree_layout, constants_of(self.tower, tree_layout)
        return self._known[key]

    def replace_tower(self, tower: FoldedTower) -> None:
        """Use ``tower``, on another device or in another precision, from now on."""
        self.tower = tower
        self._known.clear()


@dataclass(frozen=True, eq=False)
class Group:
    """``runs`` runs of one tree, and their places among the forest's rows and leaves, run by run."""

    tree_layout: TreeLayout
    constants: Constants
    runs: int
    rows: slice
    leaves: slice


class Forest:
    """Groups side by side. Rows and leaves are padded at the end with spare ones, to numbers that ``rule`` allows.

    Args:
        tower: The folded tower.
        trees: For each group its tree layout, constants and number of runs.
        rule: Numbers of rows that products may have.
    """

    def __init__(
        self,
        tower: FoldedTower,
        trees: Sequence[tuple[TreeLayout, Constants, int]],
        rule: RowRule = ANY_ROWS,
    ):
        self.tower, self.rule = tower, rule
        row_starts, leaf_starts = [0], [0]
        for tree_layout, _, runs in trees:
            row_starts.append(row_starts[-1] + runs * tree_layout.rows)
            leaf_starts.append(leaf_starts[-1] + runs * tree_layout.leaves)
        places = zip(trees, pairwise(row_starts), pairwise(leaf_starts), strict=True)
        self.groups = tuple(Group(*tree, slice(*rows), slice(*leaves)) for tree, rows, leaves in places)
        self.used_rows, self.used_leaves = row_starts[-1], leaf_starts[-1]
        # Spare rows only bring a product to an allowed number of rows. A run's rows do not read them.
        self.rows = rule.padded(self.used_rows)  # spare rows included
        self.learned_rows = self._per_run("learned_rows")  # rows with a context vector
        self.frozen_rows = self._per_run("frozen_rows")  # rows with a token
        self.first_rows = self._padded(self.learned_rows)  # rows that the first layer computes
        self.leaf_rows = self._padded(self._per_run("leaf_rows"))  # (leaves,) rows of end tokens
        self.leaves = len(self.leaf_rows)  # spare leaves included
        position, groups = tower.positional_embedding, self.groups
        self.learned_positions = torch.cat(  # (learned rows, width): positional embeddings
            [position[g.tree_layout.depth[g.tree_layout.learned_rows]].repeat(g.runs, 1) for g in groups]
        ).to(tower.dtype)
        self.frozen_qkv = torch.cat([g.constants.first_qkv.repeat(g.runs, 1) for g in groups])
        self.frozen_input = torch.cat([g.constants.first_input.repeat(g.runs, 1) for g in groups])

        # Rows that are worked on at a time. A GPU has no cache to stay in: one large product each.
        self.chunk = CPU_CHUNK if tower.device.type == "cpu" else sys.maxsize
        self.routes = {  # by group, runs of a chunk, and whether only end tokens have queries
            (i, runs, leaves_only): Routes(group.tree_layout, tower.heads, runs, leaves_only)
            for i, group in enumerate(groups)
            for runs in {runs.stop - runs.start for runs in self.chunks(group)}
            for leaves_only in (False, True)
        }

    def chunks(self, group: Group) -> Iterator[slice]:
        """Cut a group's runs so that attention works on about ``chunk`` positions at a time."""
        step = max(1, self.chunk // group.tree_layout.positions)
        return (slice(i, min(i + step, group.runs)) for i in range(0, group.runs, step))

    def _padded(self, index: Tensor) -> Tensor:
        """Repeat the first entry up to an allowed number of rows."""
        return torch.cat([index, index[:1].expand(self.rule.padded(len(index)) - len(index))])

    def _per_run(self, name: str) -> Tensor:
        indices = []
        for g in self.groups:
            starts = g.rows.start + g.tree_layout.rows * torch.arange(g.runs, device=self.tower.device)
            indices.append((starts[:, None] + getattr(g.tree_layout, name)[None, :]).reshape(-1))
        return torch.cat(indices)


@torch.no_grad()
@disable_autocast
def constants_of(tower: FoldedTower, tree_layout: TreeLayout) -> Constants:
    """Compute the constants of a tree.

    Constant nodes form paths of their own (the start token; with the class in front, the class names). A plain causal
    pass over these paths gives their keys and values in every layer.
    """
    tree, heads = tree_layout.tree, tower.heads
    paths = [[node for node in tree.path(int(leaf)) if not tree.live[node]] for leaf in tree.leaf]
    longest = max(len(path) for path in paths)
    nodes = torch.tensor([path + [path[-1]] * (longest - len(path)) for path in paths])
    tokens = torch.as_tensor(tree.index)[nodes].to(tower.device)
    x = (tower.token_embedding[tokens] + tower.positional_embedding[:longest]).to(tower.dtype)

    where = torch.zeros(tree.nodes, dtype=torch.long)  # a (path, position) that holds each constant node
    # Padding repeats a path's last node at later, wrong positions. Flipped, a node's first position is written last
    # and is the one that stays. Several paths may hold a node; its position is the same in all of them.
    where[nodes.flip(1).reshape(-1)] = torch.arange(nodes.numel()).view_as(nodes).flip(1).reshape(-1)
    where = where.to(tower.device)
    shared_at = where[torch.as_tensor(tree_layout.shared_constants)]
    packs_at = [
        None if p.constants is None else where[torch.as_tensor(p.constants)] for p in tree_layout.packs
    ]

    shared: list[Tensor] = []
    packs: list[list[Tensor | None]] = []
    for block in tower.blocks:
        normal = tower.layer_norm(x, block.eps_1)[0]
        qkv = (normal @ block.qkv).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
        kv = torch.stack([k, v]).transpose(1, 2).flatten(2, 3)  # (2, H, paths * positions, d)
        shared.append(kv[:, :, shared_at].contiguous())
        packs.append([None if at is None else kv[:, :, at].contiguous() for at in packs_at])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        x = x + out.transpose(1, 2).flatten(2) @ block.out + block.out_bias
        hidden = tower.layer_norm(x, block.eps_2)[0] @ block.fc
        if tower.activation == "silu":
            active = F.silu(hidden)
        else:
            active = F.gelu(hidden, approximate="tanh" if tower.activation == "gelu_tanh" else "none")
        x = x + active @ block.proj + block.proj_bias

    positions = tower.positional_embedding[tree_layout.depth[tree_layout.frozen_rows]]
    first = (tower.token_embedding[tree_layout.frozen_tokens] + positions).to(tower.dtype)
    block = tower.blocks[0]
    return Constants(shared, packs, tower.layer_norm(first, block.eps_1)[0] @ block.qkv, first)


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


ATTENTION, MLP = 1, 2  # the two branches of a layer
BranchKey = tuple[int, int]  # layer, branch
ChunkKey = tuple[int, int, int]  # layer, group, first run of the chunk
PackKey = tuple[int, int, int, int]  # layer, group, first run of the chunk, pack


class Workspace:
    """The memory that a step writes, allocated once: no step allocates (and page-faults) a large tensor.

    Fields that backward reads exist once per layer, the others once. Names starting with ``grad`` are gradients.
    """

    residual: dict[BranchKey, Buffer]  # (rows, width): the residual stream before a branch
    hidden: dict[int, Buffer]  # (rows, hidden): the MLP before its activation
    norm_stats: dict[BranchKey, Buffer]  # (2, rows, 1): means and reciprocal deviations before a branch
    slices: dict[ChunkKey, Buffer]  # (slices, d): queries, keys and values by pack
    probabilities: dict[PackKey, Buffer]  # (R, H, bundles, queries, keys): of attention

    qkv: Buffer  # (rows, 3 width): the current layer's queries, keys and values
    grad_qkv: Buffer  # the same memory as qkv, of which backward reads only the slices
    attended: Buffer  # (rows, width): attention's output
    grad_attended: Buffer  # the same memory as attended, which backward does not read
    grad_slices: Buffer  # (slices, d)
    attended_slices: Buffer  # (queries, d): attention's output by pack, or its gradient
    scores_shared: Buffer  # (R H, bundles queries, shared keys): scores, or gradients of probabilities
    scores_own: Buffer  # (R H bundles, queries, own keys)
    scores: Buffer  # (R, H, bundles, queries, keys): both side by side
    grad_scores: Buffer
    activation: Buffer  # (rows of a chunk, hidden): the MLP behind its activation, or the gradient there
    grad_input: Buffer  # (rows, width): the gradient of the first or last layer's input

    def __init__(self, tower: FoldedTower):
        # For a bfloat16 row a GPU returns the mean and deviation in float32, and wants them back in it.
        stats_dtype = tower.layer_norm(tower.gain, 1e-5)[1].dtype
        buffers: list[Buffer] = []  # closures must not refer to self: a cycle would delay freeing
        self._buffers = buffers

        def buffer(dtype: torch.dtype = tower.dtype) -> Buffer:
            buffers.append(Buffer(dtype, tower.device))
            return buffers[-1]

        self.residual, self.hidden = defaultdict(buffer), defaultdict(buffer)
        self.norm_stats = defaultdict(lambda: buffer(stats_dtype))
        self.slices, self.probabilities = defaultdict(buffer), defaultdict(buffer)
        self.qkv = self.grad_qkv = buffer()
        self.attended = self.grad_attended = buffer()
        self.grad_slices, self.attended_slices = buffer(), buffer()
        self.scores_shared, self.scores_own, self.scores, self.grad_scores = (buffer() for _ in range(4))
        self.activation, self.grad_input = buffer(), buffer()

    def begin(self) -> None:
        """Count what the next forest uses from zero."""
        for buffer in self._buffers:
            buffer.used_bytes = 0
            buffer._views.clear()

    def trim(self) -> None:
        """Free memory that no forest has used since ``begin``."""
        for buffer in self._buffers:
            if not buffer.used_bytes:
                buffer.memory = buffer.memory.new_empty(0)

    @property
    def pointers(self) -> set[int]:
        """Where each buffer's memory starts."""
        return {buffer.memory.untyped_storage().data_ptr() for buffer in self._buffers}

    @property
    def nbytes(self) -> int:
        """Bytes used since ``begin``."""
        return sum(buffer.used_bytes for buffer in self._buffers)
