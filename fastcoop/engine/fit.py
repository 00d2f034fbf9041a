"""What fits: what a set of runs costs (rows, bytes, operations), and which of them train at once.

`plan_training` works on sizes alone: it folds no weights and needs no torch. `train` fills its batches by the same
rule, `BatchBudget`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from fastcoop.memo import memoize
from fastcoop.prompts.layout import PromptLayout
from fastcoop.prompts.tree import Tree, TreeKey, class_tree, tree_key

if TYPE_CHECKING:  # a plan needs no torch
    import torch

    from fastcoop.backbones import Backbone, TextTower
    from fastcoop.backbones.precision import Precision

FREE_FRACTION = 0.6  # of the free memory is used where no budget is given
# Most rows of a CPU's product: the MLP activations of 512-wide towers (15 MB) stay in the last-level cache.
CPU_CHUNK = 1920
CPU_ROWS = 4096  # a CPU's dense products are at full speed by then; more rows only take memory
GPU_ROWS = 131072  # chosen, not measured: twice the nodes that should fill a large GPU
SPARE_ROWS = 144  # rows that fill up CPU products (`RowRule`); measured in training, typical here
# Of a part of a fast schedule's loss: on a CPU (True), in its cache, and on a GPU.
LOSS_NUMBERS = {True: 2**21, False: 2**26}
# Of a float64 (width, width): statistics, root, their next values, eigenvectors and scratch.
SHAMPOO_COPIES = 6
STATE_COPIES = 5  # of the contexts: themselves, momentum, gradient, and the next step's momentum and change


@dataclass(frozen=True)
class RunShape:
    """A run described by its sizes. Runs with equal names and layout share a tree."""

    class_names: Sequence[str]
    layout: PromptLayout
    steps: int  # of the optimizer
    images: int = 0  # training images; 0 leaves their features out of the count
    views: int = 1  # cached views of each image
    batch_size: int = 32  # images of a step; of a fast schedule, all images and views
    features: Hashable = None  # runs of equal values share one copy of their features; None: it is not shared
    is_fast: bool = False  # whether the schedule is a fast one

    @property
    def tree(self) -> TreeKey:
        return tree_key(self.class_names, self.layout)


@dataclass(frozen=True)
class TreeCost:
    """What one step of one run of a tree takes. On the plain path, each position of each prompt is a node and a row."""

    nodes: int  # distinct token prefixes, constants included
    rows: int  # nodes that every step computes
    flops: float  # forward and backward: two operations per multiply-add of every matrix product
    activation_bytes: int  # activations and scratch memory, in the tower's precision
    shared_rows: int  # rows that the same prompts have, or would have, in a causal tower
    part_bytes: int = 0  # plain path: memory of the prompts that are computed at once


@dataclass(frozen=True, eq=False)
class RunCost:
    """What one run takes."""

    shape: RunShape
    tree: TreeCost
    state_bytes: int  # contexts, optimizer state, loss and tables
    feature_bytes: int  # training features, shared by runs of equal ``shape.features``
    loss_bytes: int = 0  # of a fast schedule's loss, up to ``LOSS_NUMBERS`` for all runs
    loss_flops: float = 0.0  # operations of a step of a fast schedule besides the tower's

    @property
    def row_steps(self) -> float:
        """Rows times steps: the unit in which `train` reports its progress."""
        return float(self.tree.rows * self.shape.steps)

    @property
    def step_flops(self) -> float:
        """Floating-point operations of a step; of the paper's schedule, those of the tower, which are nearly all."""
        return self.tree.flops + self.loss_flops

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training."""
        return self.step_flops * self.shape.steps


def loss_parts(images: int, classes: int, dim: int, on_cpu: bool) -> tuple[int, int]:
    """Return how many images (views counted) of how many runs a part of a fast schedule's loss has: `LOSS_NUMBERS`."""
    limit, per_row = LOSS_NUMBERS[on_cpu], 4 * classes + 2 * dim
    most = max(1, limit // per_row)
    rows = -(-images // -(-images // most))  # parts of about one size
    return rows, max(1, limit // (rows * per_row))


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """What a set of runs takes, and which of them start together."""

    runs: tuple[RunCost, ...]  # in the order given
    memory_bytes: int  # that a batch may take
    scratch_bytes: int  # memory of a batch of any size, beside what its runs take
    max_rows: int  # that train at once
    # About how many rows fit memory_bytes, by the tower's size alone: sweeps cut the same batches as earlier versions.
    rows_estimate: int
    max_loss_bytes: int  # memory of the losses of fast schedules, however many

    @property
    def flops(self) -> float:
        """Floating-point operations of all runs, every step counted."""
        return sum(run.flops for run in self.runs)

    def bytes_of(self, runs: Sequence[int]) -> int:
        """Return the memory of these runs (places in the plan, repeats allowed) when they train together."""
        unlimited = BatchBudget(replace(self, memory_bytes=2**63, max_rows=2**63))
        unlimited.fill(deque(runs))
        return unlimited.bytes

    def order(self) -> list[int]:
        """Return the order in which runs start: trees with the longest runs first, so that few long runs remain.

        Runs of one tree stand side by side: many runs of one tree cost less than as many of different trees.
        """
        longest: dict[TreeKey, int] = {}
        for run in self.runs:
            longest[run.shape.tree] = max(run.shape.steps, longest.get(run.shape.tree, 0))

        def place(n: int) -> tuple[object, ...]:
            shape = self.runs[n].shape
            names, layout = shape.tree
            return -longest[names, layout], repr(layout), names, -shape.steps, n

        return sorted(range(len(self.runs)), key=place)

    def first_batch(self) -> list[int]:
        """Return the runs, by their place in the plan, that train first."""
        return BatchBudget(self).fill(deque(self.order()))


class BatchBudget:
    """Decides which runs train at once: a run is added if bytes and rows allow it; a single run always is."""

    def __init__(self, plan: TrainingPlan):
        self.plan, self.max_rows = plan, plan.max_rows
        self.clear()

    def clear(self) -> None:
        """Start an empty batch."""
        self.runs = self.rows = self.other_bytes = self.loss_bytes = 0
        self.activation_bytes = self.plan.scratch_bytes
        self._features: set[Hashable] = {None}

    @property
    def bytes(self) -> int:
        """Memory of the batch: activations, scratch, optimizer state and features."""
        return self.activation_bytes + self.other_bytes + min(self.loss_bytes, self.plan.max_loss_bytes)

    def try_add(self, cost: RunCost) -> bool:
        """Add a run to the batch if it fits; return whether it was added."""
        is_shared = cost.shape.features is not None and cost.shape.features in self._features
        other = cost.state_bytes + (0 if is_shared else cost.feature_bytes)
        loss = min(cost.loss_bytes, max(0, self.plan.max_loss_bytes - self.loss_bytes))
        too_large = self.bytes + cost.tree.activation_bytes + other + loss > self.plan.memory_bytes
        if self.runs and (too_large or self.rows + cost.tree.rows > self.max_rows):
            return False
        self.runs, self.rows = self.runs + 1, self.rows + cost.tree.rows
        self.activation_bytes += cost.tree.activation_bytes
        self.other_bytes += other
        self.loss_bytes += cost.loss_bytes
        self._features.add(cost.shape.features)
        return True

    def fill(self, waiting: deque[int]) -> list[int]:
        """Fill an empty batch with the first ``waiting`` runs of the plan, as many as fit, which are removed there."""
        self.clear()
        batch = []
        while waiting and self.try_add(self.plan.runs[waiting[0]]):
            batch.append(waiting.popleft())
        return batch

    def shrink(self) -> bool:
        """Halve the rows after an allocation failed. Returns False where the batch was a single run."""
        self.max_rows = self.rows // 2
        return self.runs > 1


def plan_training(
    backbone: Backbone,
    runs: Sequence[RunShape],
    *,
    memory_budget: int | None = None,
    precision: Precision | None = None,
) -> TrainingPlan:
    """Return what `train` takes for ``runs``, without training.

    Args:
        backbone: Its text tower's sizes, precision and device, and its tokenizer, are used.
        runs: Sizes of the runs.
        memory_budget: Bytes that a batch may take; by default a fraction of the free memory.
        precision: Of the tower's weights and activations, in place of the backbone's own.

    Raises:
        UserError: For a prompt that does not fit the text tower.
    """
    text: Any = backbone.text
    on_cpu = backbone.device.type == "cpu"
    item_bytes = 4 if precision == "tf32" else (precision or text.dtype).itemsize
    memory = usable_bytes(backbone.device) if memory_budget is None else memory_budget
    costs = [_run_cost(backbone, run, item_bytes, on_cpu) for run in runs]
    if not text.is_shared:
        scratch = max((cost.tree.part_bytes for cost in costs), default=0)
        left = max(0, memory - scratch)  # what does not fit is computed again
        trees = (replace(c.tree, activation_bytes=min(c.tree.activation_bytes, left)) for c in costs)
        costs = [replace(cost, tree=tree) for cost, tree in zip(costs, trees, strict=True)]
    else:  # a chunk of rows and spare rows; a GPU takes all rows as one chunk, counted with them
        scratch = CPU_CHUNK * _chunk_numbers(text)
        scratch += SPARE_ROWS * text.layers * (2 * text.width + text.hidden + 4)
        scratch *= item_bytes if on_cpu else 0
    # A layer's residual stream, q, k, v, MLP and scores are about 12 widths, in float32.
    fit = max(1, memory // (max(1, text.layers) * 12 * text.width * 4))
    rows = (CPU_ROWS, min(CPU_ROWS, fit)) if on_cpu else (GPU_ROWS, fit)
    return TrainingPlan(tuple(costs), memory, scratch, *rows, LOSS_NUMBERS[on_cpu] * max(4, item_bytes))


def _run_cost(backbone: Backbone, run: RunShape, item_bytes: int, on_cpu: bool) -> RunCost:
    (names, layout), width, dim = run.tree, backbone.text.width, backbone.text.dim
    tree = _tree_cost(backbone, names, layout, item_bytes, on_cpu)
    state = max(4, item_bytes)  # contexts are float32 at least
    contexts = layout.context_length * width * (len(names) if layout.class_specific else 1)
    loss = run.batch_size * (4 * len(names) + 2 * dim)
    features = run.images * run.views * dim * state  # less where they are stored in float16
    own = (STATE_COPIES * contexts + 2 * run.steps) * state
    if not run.is_fast:
        return RunCost(run, tree, own + loss * state + 4 * run.batch_size * run.steps, features)
    own += 16 * contexts + SHAMPOO_COPIES * 8 * width**2
    flops = 4.0 * run.batch_size * len(names) * dim + 4.0 * contexts * width
    return RunCost(run, tree, own, features, min(loss, LOSS_NUMBERS[on_cpu]) * state, flops)


@memoize(1024)
def _tree_cost(
    backbone: Backbone, names: tuple[str, ...], layout: PromptLayout, item_bytes: int, on_cpu: bool
) -> TreeCost:
    text: Any = backbone.text
    if not text.is_shared:
        from fastcoop.engine.plain import PlainLayout, prompts_of

        prompts = prompts_of(backbone.tokenizer, names, layout, text.context_length)
        plain = PlainLayout(prompts, text)
        kept = plain.cost.kept_bytes * item_bytes // text.dtype.itemsize
        part, shared = kept * min(plain.at_once, len(names)), int(prompts.tree().live.sum())
        flops = plain.cost.flops * len(names)
        return TreeCost(plain.rows, plain.rows, flops, kept * len(names), shared, part)
    tree = class_tree(backbone.tokenizer, names, layout, text.context_length, text.end_id)
    rows = int(tree.live.sum())
    memory = _activation_numbers(tree, rows, text, item_bytes, on_cpu) * item_bytes
    return TreeCost(tree.nodes, rows, _flops(tree, rows, text), memory, rows)


def _activation_numbers(tree: Tree, rows: int, text: TextTower, item_bytes: int, on_cpu: bool) -> int:
    """Numbers that one run adds to a batch: what layers keep for backward, and scratch memory."""
    width, scores = text.width, text.heads * int((tree.depth[tree.live] + 1).sum())
    # Per layer: two residual streams, the MLP's hidden row, two means and two deviations, q, k and v, and the attention
    # probabilities.
    kept = rows * (5 * width + text.hidden + 4) + scores
    # Once: about 5 widths (the gradients of q, k and v 3, attended 1, grad_input 1); class features, leaf features and
    # their gradients (about 4). In numbers of two bytes, 2 more widths: residual gradients are in float32.
    widths = 7 if item_bytes == 2 else 5
    scratch = rows * widths * width + len(tree.leaf) * 4 * text.dim
    return text.layers * kept + scratch + (0 if on_cpu else rows * _chunk_numbers(text))


def _chunk_numbers(text: TextTower) -> int:
    """Numbers of scratch memory per row of a chunk."""
    return 2 * text.hidden + 16 * text.width


def _flops(tree: Tree, rows: int, text: TextTower) -> float:
    """Operations of one run's step, without the comparisons that attention's masks discard (a few percent)."""
    width, layers = text.width, text.layers
    leaves = sorted(set(tree.leaf.tolist()))
    keys = tree.depth + 1  # a node reads the nodes above it and itself
    attention = 12 * width * ((layers - 1) * int(keys[tree.live].sum()) + int(keys[leaves].sum()))

    qkv, branch = 3 * width * width, width * width + 2 * width * text.hidden
    first = (int(tree.learned.sum()) * qkv + rows * branch) if layers > 1 else 0
    middle = max(layers - 2, 0) * rows * (qkv + branch)
    last = rows * 2 * width * width + len(leaves) * (width * width + branch)  # only end tokens have queries
    both = 2 * 2  # a multiply and an add, forward and backward
    return attention + both * (first + middle + last + len(leaves) * width * text.dim)


def usable_bytes(device: torch.device | str) -> int:
    """Return the memory that training takes where no budget is given: a fraction of the free memory."""
    return int(FREE_FRACTION * free_bytes(device))


def free_bytes(device: torch.device | str) -> int:
    """Return the free memory of a device in bytes; on a GPU, with what torch caches for its own next tensors."""
    if str(device).startswith("cuda"):
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed, on a GPU or on the CPU."""
    import torch

    # Not every part of CUDA raises torch's error: "CUDA error: out of memory" comes from loading kernels and graphs.
    messages = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_memory_error = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_memory_error or any(message in str(error) for message in messages)
