"""Training many runs together: which runs are in the batch, and one step of all of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.engine.forest import plant
from fastcoop.engine.loss import cross_entropy
from fastcoop.engine.memory import RoomFor, is_out_of_memory
from fastcoop.engine.run import Run, Trained, draw_batches, learning_rates, normalized
from fastcoop.engine.state import State, ended_runs, state_of, take_up
from fastcoop.engine.tower import Buffers, ForestPass
from fastcoop.engine.trees import TreeKey, Trees, tree_key
from fastcoop.prompts.layout import class_prompts
from fastcoop.prompts.tree import build_tree

DIVERGED = 10.0  # a loss this many times above where it could start marks a run as diverged

log = logging.getLogger("fastcoop")


@dataclass(eq=False)
class Active:
    """A run in training: its place in the list of runs, its state, and its plan for every step to come."""

    number: int
    run: Run
    contexts: Tensor  # (slots, width), on the device, with the momentum beside it
    momentum: Tensor
    images: Tensor  # (images * views, dim), normalised
    labels: Tensor  # (images,)
    batches: Tensor  # (steps, batch size) on the device
    rates: np.ndarray  # per epoch
    losses: Tensor  # (steps,) on the device
    snapshots: dict[int, Tensor]
    step: int = 0

    @classmethod
    def start(cls, number: int, run: Run, dtype: torch.dtype, device: torch.device) -> Active:
        contexts = run.contexts.detach().to(device, dtype).reshape(-1, run.contexts.shape[-1])
        batches = torch.as_tensor(draw_batches(run), device=device)
        return cls(
            number,
            run,
            contexts.clone(),
            torch.zeros_like(contexts),
            normalized(run.features.to(device, dtype)).flatten(0, 1),
            run.labels.to(device),
            batches,
            learning_rates(run.epochs, run.learning_rate),
            torch.zeros(len(batches), dtype=dtype, device=device),
            {},
        )

    @property
    def epoch(self) -> int:
        return self.step // self.run.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.step >= len(self.batches)

    def result(self, diverged_at: int | None = None) -> Trained:
        losses = self.losses[: self.step].cpu().double().numpy()
        per_epoch = self.run.steps_per_epoch
        means = np.array([losses[i : i + per_epoch].mean() for i in range(0, len(losses), per_epoch)])
        contexts = self.contexts.view(self.run.contexts.shape).cpu().clone()
        status = "done" if diverged_at is None else "diverged"
        return Trained(contexts, means, status, diverged_at, self.snapshots)


class Batch:
    """The runs that train together right now: one forest, one flat tensor of all their contexts."""

    def __init__(
        self, trees: Trees, active: list[Active], logit_scale: float, buffers: Buffers | None = None
    ):
        self.trees, self.logit_scale = trees, logit_scale
        groups: dict[object, list[Active]] = {}
        for a in active:
            groups.setdefault(tree_key(a.run.class_names, a.run.layout), []).append(a)
        self.groups = list(groups.values())
        self.active = [a for group in self.groups for a in group]
        planned = [
            (*trees[tree_key(group[0].run.class_names, group[0].run.layout)], len(group))
            for group in self.groups
        ]
        self.forest = plant(trees.tower, planned)
        self.forest_pass = ForestPass(self.forest, buffers)

        self.vectors = torch.cat([a.contexts for a in self.active])
        self.momentum = torch.cat([a.momentum for a in self.active])
        sizes = [len(a.contexts) for a in self.active]
        for a, contexts, momentum in zip(
            self.active, self.vectors.split(sizes), self.momentum.split(sizes), strict=True
        ):
            a.contexts, a.momentum = contexts, momentum  # views: a step of all is a step of each
        device = self.vectors.device
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
        self.decay = self._per_vector([a.run.weight_decay for a in self.active])
        self.keep = self._per_vector([a.run.momentum for a in self.active])
        self.rates: list[float] = []

    def step(self) -> None:
        """One step of every run: forward, each run's loss, backward, SGD."""
        contexts = self._by_group(self.vectors)
        features = self.forest_pass.forward(contexts)
        grads = []
        for group, class_features in zip(self.groups, features, strict=True):
            images, labels = self._batch(group)
            losses, grad = cross_entropy(class_features.to(images.dtype), images, labels, self.logit_scale)
            for a, loss in zip(group, losses, strict=True):
                a.losses[a.step] = loss
            grads.append(grad)
        grad = torch.cat([g.flatten(0, 1) for g in self.forest_pass.backward(grads)]).to(self.vectors.dtype)

        rates = [float(a.rates[a.epoch]) for a in self.active]
        if rates != self.rates:
            self.rates, self.rate = rates, self._per_vector(rates)
        grad.addcmul_(self.decay, self.vectors)
        self.momentum.mul_(self.keep).add_(grad)
        self.vectors.addcmul_(self.rate, self.momentum, value=-1.0)
        for a in self.active:
            a.step += 1
            if a.step % a.run.steps_per_epoch == 0 and a.epoch in a.run.snapshots:
                a.snapshots[a.epoch] = a.contexts.view(a.run.contexts.shape).cpu().clone()

    def diverged(self) -> list[Active]:
        """Runs whose last loss is not finite, or far above where an untrained classifier starts."""
        last = torch.stack([a.losses[a.step - 1] for a in self.active]).cpu().numpy()
        first = np.array([max(float(a.losses[0]), np.log(len(a.run.class_names) + 1)) for a in self.active])
        bad = ~np.isfinite(last) | ~(last <= DIVERGED * first)
        return [a for a, is_bad in zip(self.active, bad, strict=True) if is_bad]

    def _batch(self, group: list[Active]) -> tuple[Tensor, Tensor]:
        """This step's images (runs, batch, dim) and labels (runs, batch), -1 where a batch is short."""
        longest = max(a.batches.shape[1] for a in group)
        rows = [a.batches[a.step] for a in group]
        if any(len(r) < longest for r in rows):
            rows = [torch.nn.functional.pad(r, (0, longest - len(r)), value=-1) for r in rows]
        images, labels = [], []
        for a, r in zip(group, rows, strict=True):
            at = r.clamp(min=0)
            images.append(a.images[at])
            labels.append(torch.where(r >= 0, a.labels[at // a.run.features.shape[1]], -1))
        return torch.stack(images), torch.stack(labels)

    def _by_group(self, vectors: Tensor) -> list[Tensor]:
        sizes = [len(group) * len(group[0].contexts) for group in self.groups]
        return [
            v.view(len(group), -1, vectors.shape[-1])
            for v, group in zip(vectors.split(sizes), self.groups, strict=True)
        ]

    def _per_vector(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.vectors.dtype, device=self.vectors.device)[self.owner, None]


def train(
    backbone: Backbone,
    runs: Sequence[Run],
    *,
    memory_budget: int | None = None,
    precision: torch.dtype | None = None,
    on_done: Callable[[int, Trained], None] | None = None,
    on_progress: Callable[[float], None] | None = None,
    state: State | None = None,
    on_step: Callable[[Callable[[], State]], None] | None = None,
) -> list[Trained]:
    """Train ``runs``, as many at once as fit, each as if it were alone (section 4.1's recipe).

    Runs may differ in everything but the backbone. Those that finish leave, waiting ones join. ``memory_budget`` in
    bytes bounds what a batch of runs holds (by default, from the free memory); running out of memory halves it and
    goes on. ``on_done(number, trained)`` is called as each run ends, ``on_progress(cost)`` as work is done, in units
    of ``run_costs``. ``precision`` is that of the tower's weights and activations, in place of the backbone's own
    (bfloat16 is not exact; contexts, loss and optimiser state stay float32 in any case).
    ``on_step(get_state)`` is called after every step; what ``get_state()`` returned, given back as
    ``state`` with the same runs, makes the training go on from there, to the same bits where all runs fit together.

    Raises UserError, before the first step, for a prompt that does not fit the text tower.
    """
    trees = Trees(backbone, precision)
    plans = [trees[tree_key(run.class_names, run.layout)][0] for run in runs]
    dtype = torch.float64 if trees.tower.dtype == torch.float64 else torch.float32
    room = RoomFor(trees.tower, memory_budget)
    # Trees with the longest runs first, so that few long runs are left over at the end; equal trees side by side,
    # whatever their steps: many runs of one tree cost less than as many of different trees.
    trees_of = [tree_key(run.class_names, run.layout) for run in runs]
    longest: dict[TreeKey, int] = {}
    for tree, run in zip(trees_of, runs, strict=True):
        longest[tree] = max(run.steps, longest.get(tree, 0))
    order = sorted(
        range(len(runs)),
        key=lambda n: (-longest[trees_of[n]], repr(runs[n].layout), trees_of[n][0], -runs[n].steps, n),
    )
    state = state or {}
    results = ended_runs(state, runs)
    # Numbers not begun, and runs set aside for want of memory.
    waiting: deque[int | Active] = deque(n for n in order if n not in results)
    active: list[Active] = []

    def join() -> None:
        """Fill the room with runs: those in training, then those waiting."""
        room.clear()
        waiting.extendleft(reversed(active))
        active.clear()
        while waiting:
            head = waiting[0]
            if not room.take(plans[head.number if isinstance(head, Active) else head]):
                break
            waiting.popleft()
            if not isinstance(head, Active):
                head = Active.start(head, runs[head], dtype, trees.tower.device)
                take_up(head, state)
            active.append(head)

    def state_now() -> State:
        return state_of([*active, *(head for head in waiting if isinstance(head, Active))], results)

    if on_done is not None:
        for number, trained in results.items():
            on_done(number, trained)
    batch: Batch | None = None
    while waiting or active:
        try:
            if batch is None:
                join()
                batch = Batch(trees, active, backbone.logit_scale, room.buffers)
            batch.step()
        except (RuntimeError, MemoryError) as error:
            batch = None
            if not is_out_of_memory(error) or not room.halve():
                raise
            log.warning("Out of memory with %d runs together; going on with fewer.", len(active))
            continue
        if on_progress is not None:
            on_progress(float(sum(plans[a.number].rows for a in active)))
        lost = batch.diverged()
        ended = [a for a in active if a.finished or a in lost]
        for a in ended:
            results[a.number] = a.result(a.step - 1 if a in lost else None)
            if on_done is not None:
                on_done(a.number, results[a.number])
        if ended:
            active = [a for a in active if a not in ended]
            batch = None
        if on_step is not None:
            on_step(state_now)
    return [results[n] for n in range(len(runs))]


def run_costs(backbone: Backbone, runs: Sequence[Run]) -> list[float]:
    """The work of each run, in the units of ``on_progress``: rows of its tree times its steps."""
    rows: dict[TreeKey, int] = {}
    costs = []
    for run in runs:
        key = tree_key(run.class_names, run.layout)
        if key not in rows:
            prompts = class_prompts(backbone.tokenizer, *key, backbone.text.context_length)
            rows[key] = int(build_tree(prompts).live.sum())
        costs.append(float(rows[key] * run.steps))
    return costs
