"""The runs that train together right now, and one step of all of them.

A step reads and writes device memory only: which images come next, each run's learning rate, the losses and which
runs diverged are tables there, read at a step counter that is on the device too. So nothing in a step waits for
the host, no Python loop goes over the runs, and on a GPU the whole step is recorded once and replayed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.buffers import Buffers
from fastcoop.engine.forest import plant
from fastcoop.engine.graph import Replayed
from fastcoop.engine.loss import cross_entropy
from fastcoop.engine.rows import row_rule
from fastcoop.engine.run import Run, Trained, draw_batches, learning_rates, normalized
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees, tree_key

DIVERGED = 10.0  # a loss this many times above those of the first epoch, or an untrained one, marks a run as diverged

# Features and labels by the id of what they came from: runs share them.
OnDevice = MutableMapping[int, Tensor]


@dataclass(eq=False)
class Active:
    """A run in training: its place in the list of runs, its state, and its plan for every step to come.

    ``step``, ``losses`` and ``lost_at`` are what the host knows: up to date after ``Batch.settle``.
    """

    number: int
    run: Run
    contexts: Tensor  # (slots, width), on the device, with the momentum beside it
    momentum: Tensor
    images: Tensor  # (images * views, dim), normalised, on the device
    labels: Tensor  # (images,) on the device
    batches: Tensor  # (steps, batch size)
    rates: np.ndarray  # per epoch
    losses: Tensor  # (steps,)
    snapshots: dict[int, Tensor]
    step: int = 0
    lost_at: int | None = None

    @classmethod
    def start(
        cls, number: int, run: Run, dtype: torch.dtype, device: torch.device, known: OnDevice | None = None
    ) -> Active:
        contexts = run.contexts.detach().to(device, dtype).reshape(-1, run.contexts.shape[-1])
        known = WeakValueDictionary() if known is None else known
        images, labels = known.get(id(run.features)), known.get(id(run.labels))
        if images is None:
            images = known[id(run.features)] = normalized(run.features.to(device, dtype)).flatten(0, 1)
        if labels is None:
            labels = known[id(run.labels)] = run.labels.to(device)
        batches = torch.as_tensor(draw_batches(run))
        return cls(
            number,
            run,
            contexts.clone(),
            torch.zeros_like(contexts),
            images,
            labels,
            batches,
            learning_rates(run.epochs, run.learning_rate),
            torch.zeros(len(batches), dtype=dtype),
            {},
        )

    @property
    def steps_left(self) -> int:
        return len(self.batches) - self.step

    @property
    def ended(self) -> bool:
        return self.lost_at is not None or self.steps_left == 0

    def result(self) -> Trained:
        losses = self.losses[: self.step].double().numpy()
        per_epoch = self.run.steps_per_epoch
        means = np.array([losses[i : i + per_epoch].mean() for i in range(0, len(losses), per_epoch)])
        contexts = self.contexts.view(self.run.contexts.shape).cpu().clone()
        status = "done" if self.lost_at is None else "diverged"
        return Trained(contexts, means, status, self.lost_at, self.snapshots)


class Batch:
    """One forest over ``active`` runs, and one flat tensor of all their contexts.

    It is good for ``steps`` steps, until the first run ends. ``settle`` tells the runs where they are.
    """

    def __init__(
        self, trees: Trees, active: list[Active], logit_scale: float, buffers: Buffers | None = None
    ):
        self.logit_scale = logit_scale
        groups: dict[object, list[Active]] = {}
        for a in active:  # of one size of batch: a longer one beside it would change the order of its sums
            key = tree_key(a.run.class_names, a.run.layout), a.batches.shape[1]
            groups.setdefault(key, []).append(a)
        self.groups = list(groups.values())
        self.active = [a for group in self.groups for a in group]
        self.forest = plant(
            trees.tower,
            [(*trees[tree_key(g[0].run.class_names, g[0].run.layout)], len(g)) for g in self.groups],
            row_rule(trees.tower),
        )
        self.forest_pass = ForestPass(self.forest, buffers)

        self.vectors = torch.cat([a.contexts for a in self.active])
        self.momentum = torch.cat([a.momentum for a in self.active])
        self.sizes = [len(a.contexts) for a in self.active]
        for a, contexts, momentum in zip(
            self.active, self.vectors.split(self.sizes), self.momentum.split(self.sizes), strict=True
        ):
            a.contexts, a.momentum = contexts, momentum  # views: a step of all is a step of each
        self._lay_tables()
        self.done = 0
        self._replayed = Replayed(self.steps, self.vectors.device)

    def step(self) -> None:
        """One step of every run: forward, each run's loss, backward, SGD."""
        self._replayed(self._step)
        self.done += 1
        for a, epoch in self.due.get(self.done, ()):
            a.snapshots[epoch] = a.contexts.view(a.run.contexts.shape).cpu().clone()

    def settle(self) -> None:
        """Bring the runs' ``step``, ``losses`` and ``lost_at`` up to date: the only place that waits for the device."""
        if int(self.at) != self.done:
            raise RuntimeError(f"{self.done} steps were asked of the device, but it did {int(self.at)}.")
        losses, lost = self.losses[: self.done].cpu(), self.lost.tolist()
        for i, (a, begun) in enumerate(zip(self.active, self.begun, strict=True)):
            a.losses[begun : begun + self.done] = losses[:, i]
            a.step = begun + self.done
            if 0 <= lost[i] < self.done:  # in a step that ran to its end
                a.lost_at = begun + lost[i]
                a.step = a.lost_at + 1
                kept = a.lost_at // a.run.steps_per_epoch
                a.snapshots = {epoch: c for epoch, c in a.snapshots.items() if epoch <= kept}

    def _step(self) -> None:
        rows = self.rows.index_select(0, self.at)[0]
        rate = self.rates.index_select(0, self.at)[0]
        at = rows.clamp(min=0)
        images, labels = self.images[at], torch.where(rows >= 0, self.labels[at], -1)
        features = self.forest_pass.forward(self._by_group(self.vectors))
        losses, grads, start = [], [], 0
        for group, class_features in zip(self.groups, features, strict=True):
            part = slice(start, start + len(group)), slice(group[0].batches.shape[1])
            start += len(group)
            loss, grad = cross_entropy(
                class_features.to(images.dtype), images[part], labels[part], self.logit_scale
            )
            losses.append(loss)
            grads.append(grad)
        self._note(torch.cat(losses))

        grad = torch.cat([g.flatten(0, 1) for g in self.forest_pass.backward(grads)]).to(self.vectors.dtype)
        grad += self.decay * self.vectors
        momentum = (self.keep * self.momentum).add_(grad)
        change = rate[self.owner, None] * momentum
        change.masked_fill_((self.lost >= 0)[self.owner, None], 0.0)  # a lost run stays where it was lost
        # Nothing is written before the last allocation: a step that runs out of memory is done again from its start.
        self.momentum.copy_(momentum)
        self.vectors -= change
        self.at += 1

    def _note(self, loss: Tensor) -> None:
        """Keep this step's losses (runs,); mark runs whose loss is not finite or far above an untrained one's."""
        self.losses.index_copy_(0, self.at, loss[None])
        first = DIVERGED * torch.maximum(loss, self.untrained)
        self.limit.copy_(torch.where(self.at < self.warming, torch.maximum(first, self.limit), self.limit))
        bad = ~(torch.isfinite(loss) & (loss <= self.limit)) & (self.lost < 0)
        self.lost.copy_(torch.where(bad, self.at, self.lost))

    def _lay_tables(self) -> None:
        """Everything a step looks up, on the device, for all steps of this batch."""
        device, dtype, active = self.vectors.device, self.vectors.dtype, self.active
        self.steps = min(a.steps_left for a in active)
        self.begun = [a.step for a in active]
        self.at = torch.zeros(1, dtype=torch.long, device=device)

        starts: dict[tuple[int, int], int] = {}  # where a run's images begin in those of all
        images, labels, size = [], [], 0
        for a in active:
            if (id(a.images), id(a.labels)) not in starts:
                starts[id(a.images), id(a.labels)] = size
                images.append(a.images)
                labels.append(a.labels.repeat_interleave(a.run.features.shape[1]))
                size += len(a.images)
        self.images = images[0] if len(images) == 1 else torch.cat(images)
        self.labels = torch.cat(labels)
        rows = torch.full(
            (self.steps, len(active), max(a.batches.shape[1] for a in active)), -1, dtype=torch.int32
        )
        rates = np.empty((self.steps, len(active)))
        self.due: dict[int, list[tuple[Active, int]]] = {}
        for i, a in enumerate(active):
            own = a.batches[a.step : a.step + self.steps]
            start = starts[id(a.images), id(a.labels)]
            rows[:, i, : own.shape[1]] = torch.where(own >= 0, own + start, -1)
            per_epoch = a.run.steps_per_epoch
            rates[:, i] = a.rates[np.arange(a.step, a.step + self.steps) // per_epoch]
            for epoch in a.run.snapshots:
                if 0 < epoch * per_epoch - a.step <= self.steps:
                    self.due.setdefault(epoch * per_epoch - a.step, []).append((a, epoch))
        self.rows = rows.to(device)
        self.rates = torch.as_tensor(rates, dtype=dtype).to(device)

        self.losses = torch.zeros(self.steps, len(active), dtype=dtype, device=device)
        self.lost = torch.full((len(active),), -1, device=device)
        # A run's losses where it starts are those of its first epoch, which hardly moves it: one batch alone, of few
        # images or of one, may be far easier than the next.
        self.warming = torch.tensor([a.run.steps_per_epoch - a.step for a in active], device=device)
        untrained = torch.tensor([float(np.log(len(a.run.class_names) + 1)) for a in active], dtype=dtype)
        self.untrained = untrained.to(device)
        first = [a.losses[: min(max(a.step, 1), a.run.steps_per_epoch)].max() for a in active]  # 0 before any
        self.limit = DIVERGED * torch.maximum(torch.stack(first).to(device), self.untrained)

        self.owner = torch.as_tensor(np.repeat(np.arange(len(active)), self.sizes)).to(device)
        self.decay = self._per_vector([a.run.weight_decay for a in active])
        self.keep = self._per_vector([a.run.momentum for a in active])

    def _by_group(self, vectors: Tensor) -> list[Tensor]:
        sizes = [len(group) * len(group[0].contexts) for group in self.groups]
        return [
            v.view(len(group), -1, vectors.shape[-1])
            for v, group in zip(vectors.split(sizes), self.groups, strict=True)
        ]

    def _per_vector(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.vectors.dtype, device=self.vectors.device)[self.owner, None]
