"""Train many runs together: one step of all of them, which runs are in it, and the progress of each.

A step reads and writes device memory only: each run's next images and learning rates, its losses and whether it
diverged are tables there, read at a step counter that is on the device too. So nothing in a step waits for the host,
no Python loop goes over the runs, and on a GPU the whole step is recorded once and replayed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.checks import whole_number
from fastcoop.engine.fit import BatchBudget, is_out_of_memory, plan_training
from fastcoop.engine.forest import Forest, Trees, Workspace
from fastcoop.engine.runs import Run, Trained, draw_batches, learning_rates
from fastcoop.engine.tower import ForestPass, build_pass
from fastcoop.engine.tree_layout import tree_key
from fastcoop.engine.weights import bmm, disable_autocast, limit_threads, row_rule, warn_if_dtype_is_slow
from fastcoop.errors import UserError

SYNC_EVERY = 16  # steps, or an epoch, between host syncs that check for divergence
DIVERGED = (
    10.0  # a loss this many times above the first epoch's, and an untrained classifier's, is divergence
)
WARM_UP = 3  # plain steps before one is recorded: libraries allocate their workspaces
WORTH_RECORDING = 16  # steps; recording costs about as much as one or two
MAX_ESTIMATE_ERROR = 0.25  # a batch that takes this share more than estimated is warned of

log = logging.getLogger("fastcoop")
State = dict[str, Tensor]  # the progress of a training, as named tensors on the CPU
OnDevice = MutableMapping[int, Tensor]  # features and labels by the id of their source; runs share them


@disable_autocast
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

    Runs that finish leave, and waiting runs join. If memory runs out, half as many go on from the same step.

    Args:
        backbone: Its text tower, tokenizer and logit scale are used.
        runs: May differ in everything but the backbone.
        memory_budget: Bytes that the runs in training may take; by default a fraction of the free memory.
        precision: Of the tower's weights and activations, in place of the backbone's own. Contexts, loss and optimizer
            state stay float32. bfloat16 is not exact.
        on_done: Called with a run's place in ``runs`` and its result as it ends.
        on_progress: Called after every step with the work done, in units of ``RunCost.row_steps``.
        state: From ``on_step`` of an earlier training of the same runs, which goes on from there, with the same bits
            where all runs fit together.
        on_step: Called after every step with a function that returns the state.

    Returns:
        The results, in the order of ``runs``.

    Raises:
        UserError: Before the first step, for a prompt, contexts or features that do not fit the backbone.
    """
    if memory_budget is not None:
        whole_number(memory_budget, "the memory_budget of training in bytes", 0, 2**63)
    trees = Trees(backbone, precision)
    tower = trees.tower
    warn_if_dtype_is_slow(tower.dtype, tower.device.type)
    for run in runs:
        given = run.contexts.shape[-1], run.features.shape[-1]
        if given != (tower.width, tower.dim):
            raise UserError(
                f"Expected context vectors of {tower.width} numbers and features of {tower.dim}, got "
                f"{given[0]} and {given[1]}: were the features computed by another backbone?"
            )
    dtype = torch.float64 if tower.dtype == torch.float64 else torch.float32
    shapes = [run.shape for run in runs]
    plan = plan_training(backbone, shapes, memory_budget=memory_budget, precision=precision)
    budget, memory = plan.budget(), Workspace(tower)
    state = state or {}
    results = _ended_runs(state, runs)
    waiting = deque(n for n in plan.order() if n not in results)  # some started before memory ran out
    started: dict[int, ActiveRun] = {}
    active: list[ActiveRun] = []
    batch: Batch | None = None
    on_device: OnDevice = WeakValueDictionary()

    def fill() -> None:
        """Fill the batch with the runs in training, then with waiting ones."""
        budget.clear()
        waiting.extendleft(a.index for a in reversed(active))
        active.clear()
        while waiting and budget.try_add(plan.runs[waiting[0]]):
            n = waiting.popleft()
            if n not in started:
                started[n] = ActiveRun.start(n, runs[n], dtype, tower.device, on_device)
                _restore_run(started[n], state)
            active.append(started[n])

    def sync() -> None:
        """Read the runs' progress from the device. If runs ended, remove them and drop the batch."""
        nonlocal batch
        if batch is None:
            return
        batch.sync()
        ended = [a for a in active if a.ended]
        for a in ended:
            results[a.index] = a.result()
            active.remove(started.pop(a.index))
            batch = None
        for a in ended:
            if on_done is not None:
                on_done(a.index, results[a.index])

    def current_state() -> State:
        sync()
        return _state_of(started.values(), results)

    if on_done is not None:
        for index, trained in results.items():
            on_done(index, trained)
    while waiting or active:
        try:
            with limit_threads(tower.heads):
                if batch is None:
                    fill()
                    batch = Batch(trees, active, backbone.logit_scale, memory)
                batch.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sync()  # the steps that were done count
            batch = None
            if not budget.shrink():
                raise
            log.warning("Out of memory with %d runs together; continuing with fewer.", len(active))
            memory = Workspace(tower)
            if tower.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if batch.done == 1:
            memory.trim()
            _check_estimate(budget, memory.nbytes)
        if on_progress is not None:
            on_progress(float(sum(plan.runs[a.index].tree.rows for a in active)))
        sync_every = max(SYNC_EVERY, *(a.run.steps_per_epoch for a in active))
        if batch.done == batch.steps or batch.done % sync_every == 0:
            sync()
        if on_step is not None:
            on_step(current_state)
    return [results[n] for n in range(len(runs))]


def _check_estimate(budget: BatchBudget, used: int) -> None:
    """Compare the bytes that a batch's activations take after its first step with the estimate."""
    estimate = budget.activation_bytes
    log.debug("%d runs take %.2f GB; the estimate is %.2f GB.", budget.runs, used / 1e9, estimate / 1e9)
    if used > (1 + MAX_ESTIMATE_ERROR) * estimate:
        message = "%d runs take %.2f GB, %.0f%% more than estimated; a smaller memory budget is safer."
        log.warning(message, budget.runs, used / 1e9, 100 * (used / estimate - 1))


@dataclass(eq=False)
class ActiveRun:
    """A run in training. ``step``, ``losses`` and ``diverged_at`` are up to date after ``Batch.sync``."""

    index: int  # in the list of runs
    run: Run
    contexts: Tensor  # (slots, width) on the device, as is the momentum
    momentum: Tensor
    images: Tensor  # (images * views, dim), normalized, on the device
    labels: Tensor  # (images,) on the device
    batches: Tensor  # (steps, batch size)
    rates: np.ndarray  # learning rate of each epoch
    losses: Tensor  # (steps,)
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    step: int = 0
    diverged_at: int | None = None

    @classmethod
    def start(
        cls, index: int, run: Run, dtype: torch.dtype, device: torch.device, known: OnDevice | None = None
    ) -> ActiveRun:
        contexts = run.contexts.detach().to(device, dtype).reshape(-1, run.contexts.shape[-1]).clone()
        known = WeakValueDictionary() if known is None else known
        images, labels = known.get(id(run.features)), known.get(id(run.labels))
        if images is None:
            normal = F.normalize(run.features.to(device, dtype), dim=-1, eps=0.0)
            images = known[id(run.features)] = normal.flatten(0, 1)
        if labels is None:
            labels = known[id(run.labels)] = run.labels.to(device)
        batches = torch.as_tensor(draw_batches(run))
        rates = learning_rates(run.epochs, run.learning_rate)
        losses = torch.zeros(len(batches), dtype=dtype)
        return cls(index, run, contexts, torch.zeros_like(contexts), images, labels, batches, rates, losses)

    @property
    def steps_left(self) -> int:
        return len(self.batches) - self.step

    @property
    def ended(self) -> bool:
        return self.diverged_at is not None or self.steps_left == 0

    def snapshot(self) -> Tensor:
        return self.contexts.view(self.run.contexts.shape).cpu().clone()

    def result(self) -> Trained:
        losses, per_epoch = self.losses[: self.step].double().numpy(), self.run.steps_per_epoch
        means = np.array([losses[i : i + per_epoch].mean() for i in range(0, len(losses), per_epoch)])
        status = "done" if self.diverged_at is None else "diverged"
        return Trained(self.snapshot(), means, status, self.diverged_at, self.snapshots)


class Batch:
    """One forest over the ``active`` runs, and one tensor of all their contexts; valid until the first run ends."""

    def __init__(
        self, trees: Trees, active: list[ActiveRun], logit_scale: float, workspace: Workspace | None = None
    ):
        self.logit_scale = logit_scale
        groups: dict[object, list[ActiveRun]] = {}
        for a in active:
            # By batch size, too: a longer batch beside it would change the order of a run's sums.
            key = tree_key(a.run.class_names, a.run.layout), a.batches.shape[1]
            groups.setdefault(key, []).append(a)
        self.groups = list(groups.values())
        self.active = [a for group in self.groups for a in group]
        planned = [(trees[tree_key(g[0].run.class_names, g[0].run.layout)], len(g)) for g in self.groups]
        self.forest_pass = build_pass(Forest(trees.tower, planned, row_rule(trees.tower)))
        self.workspace = workspace or Workspace(trees.tower)
        self.workspace.begin()

        self.vectors = torch.cat([a.contexts for a in self.active])  # (vectors of all runs, width)
        self.momentum = torch.cat([a.momentum for a in self.active])
        self.sizes = [len(a.contexts) for a in self.active]
        parts = zip(self.active, self.vectors.split(self.sizes), self.momentum.split(self.sizes), strict=True)
        for a, contexts, momentum in parts:
            a.contexts, a.momentum = contexts, momentum  # views: a step of all runs is a step of each
        self._build_tables()
        self._kernel_step: Callable[[], None] | None = None
        if not isinstance(self.forest_pass, ForestPass):
            from fastcoop.engine.kernels.training_step import KernelStep

            self._kernel_step = KernelStep.of(self, self.forest_pass, DIVERGED)
        self.done = 0
        self._recorded = RecordedStep(self.steps, self.vectors.device)

    def step(self) -> None:
        """Do one step of every run: forward, each run's loss, backward, SGD."""
        self._recorded(self._step)
        self.done += 1
        for a, epoch in self.snapshot_steps.get(self.done, ()):
            a.snapshots[epoch] = a.snapshot()

    def sync(self) -> None:
        """Bring the runs' ``step``, ``losses`` and ``diverged_at`` up to date. Only this waits for the device."""
        if int(self.counter) != self.done:
            raise RuntimeError(f"The device did {int(self.counter)} of {self.done} steps.")
        losses, diverged = self.losses[: self.done].cpu(), self.diverged_at.tolist()
        for i, (a, start) in enumerate(zip(self.active, self.start_steps, strict=True)):
            a.losses[start : start + self.done] = losses[:, i]
            a.step = start + self.done
            if 0 <= diverged[i] < self.done:  # in a step that was completed
                a.diverged_at = start + diverged[i]
                a.step = a.diverged_at + 1
                kept = a.diverged_at // a.run.steps_per_epoch
                a.snapshots = {epoch: c for epoch, c in a.snapshots.items() if epoch <= kept}

    def _step(self) -> None:
        if self._kernel_step is not None:
            self._kernel_step()
            return
        rows = self.rows.index_select(0, self.counter)[0]
        rate = self.rates.index_select(0, self.counter)[0]
        at = rows.clamp(min=0)
        images, labels = self.images[at], torch.where(rows >= 0, self.labels[at], -1)
        features = self.forest_pass.forward(self._by_group(self.vectors), self.workspace)
        losses, grads, start = [], [], 0
        for group, class_features in zip(self.groups, features, strict=True):
            part = slice(start, start + len(group)), slice(group[0].batches.shape[1])
            start += len(group)
            class_features = class_features.to(images.dtype)
            loss, grad = cross_entropy(class_features, images[part], labels[part], self.logit_scale)
            losses.append(loss)
            grads.append(grad)
        self._check_divergence(torch.cat(losses))

        grad = torch.cat([g.flatten(0, 1) for g in self.forest_pass.backward(grads, self.workspace)]).to(
            self.vectors.dtype
        )
        grad += self.weight_decay * self.vectors
        momentum = (self.momentum_coef * self.momentum).add_(grad)
        change = rate[self.run_of_vector, None] * momentum
        is_frozen = self.diverged_at >= 0
        change.masked_fill_(is_frozen[self.run_of_vector, None], 0.0)  # diverged runs are frozen
        # Nothing is written before the last allocation: a step that runs out of memory is repeated from its start.
        self.momentum.copy_(momentum)
        self.vectors -= change
        self.counter += 1

    def _check_divergence(self, loss: Tensor) -> None:
        """Keep this step's losses (runs,), and mark runs whose loss is not finite or above its limit."""
        self.losses.index_copy_(0, self.counter, loss[None])
        first = DIVERGED * torch.maximum(loss, self.untrained_loss)
        in_first_epoch = self.counter < self.first_epoch_left
        self.limit.copy_(torch.where(in_first_epoch, torch.maximum(first, self.limit), self.limit))
        bad = ~(torch.isfinite(loss) & (loss <= self.limit)) & (self.diverged_at < 0)
        self.diverged_at.copy_(torch.where(bad, self.counter, self.diverged_at))

    def _build_tables(self) -> None:
        """Put everything that the steps of this batch read on the device."""
        device, dtype, active = self.vectors.device, self.vectors.dtype, self.active
        self.steps = min(a.steps_left for a in active)
        self.start_steps = [a.step for a in active]
        self.counter = torch.zeros(1, dtype=torch.long, device=device)

        starts: dict[tuple[int, int], int] = {}  # where a run's images begin among those of all runs
        images, labels, size = [], [], 0
        for a in active:
            if (id(a.images), id(a.labels)) not in starts:
                starts[id(a.images), id(a.labels)] = size
                images.append(a.images)
                labels.append(a.labels.repeat_interleave(a.run.features.shape[1]))
                size += len(a.images)
        self.images = images[0] if len(images) == 1 else torch.cat(images)
        self.labels = torch.cat(labels)
        longest = max(a.batches.shape[1] for a in active)
        rows = torch.full((self.steps, len(active), longest), -1, dtype=torch.int32)
        rates = np.empty((self.steps, len(active)))
        self.snapshot_steps: dict[int, list[tuple[ActiveRun, int]]] = {}
        for i, a in enumerate(active):
            own = a.batches[a.step : a.step + self.steps]
            start = starts[id(a.images), id(a.labels)]
            rows[:, i, : own.shape[1]] = torch.where(own >= 0, own + start, -1)
            per_epoch = a.run.steps_per_epoch
            rates[:, i] = a.rates[np.arange(a.step, a.step + self.steps) // per_epoch]
            for epoch in a.run.snapshots:
                if 0 < epoch * per_epoch - a.step <= self.steps:
                    self.snapshot_steps.setdefault(epoch * per_epoch - a.step, []).append((a, epoch))
        self.rows = rows.to(device)  # (steps, runs, batch size) of self.images, -1 where a batch is short
        self.rates = torch.as_tensor(rates, dtype=dtype).to(device)  # (steps, runs)

        self.losses = torch.zeros(self.steps, len(active), dtype=dtype, device=device)
        self.diverged_at = torch.full((len(active),), -1, device=device)
        # The whole first epoch, which hardly moves a run, sets its limit: one batch of few images may be far easier
        # than the next.
        left = [a.run.steps_per_epoch - a.step for a in active]
        self.first_epoch_left = torch.tensor(left, device=device)  # negative after it: no step is below it
        # log(classes) is the loss of equal logits; the + 1 keeps it above zero for a single class.
        untrained = torch.tensor([float(np.log(len(a.run.class_names) + 1)) for a in active], dtype=dtype)
        self.untrained_loss = untrained.to(device)
        first = [a.losses[: min(max(a.step, 1), a.run.steps_per_epoch)].max() for a in active]  # 0 before any
        self.limit = DIVERGED * torch.maximum(torch.stack(first).to(device), self.untrained_loss)

        self.run_of_vector = torch.as_tensor(np.repeat(np.arange(len(active)), self.sizes)).to(
            device
        )  # each vector's run
        self.weight_decay = self._per_vector([a.run.weight_decay for a in active])
        self.momentum_coef = self._per_vector([a.run.momentum for a in active])

    def _by_group(self, vectors: Tensor) -> list[Tensor]:
        parts = vectors.split([len(group) * len(group[0].contexts) for group in self.groups])
        groups = zip(parts, self.groups, strict=True)
        return [part.view(len(group), -1, vectors.shape[-1]) for part, group in groups]

    def _per_vector(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.vectors.dtype, device=self.vectors.device)[
            self.run_of_vector, None
        ]


def cross_entropy(
    features: Tensor, images: Tensor, labels: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Return each run's mean cross-entropy (equation 3), (runs,), and its gradient for the class features.

    Args:
        features: Class features (runs, classes, dim), not normalized.
        images: Image features (runs, batch, dim), normalized.
        labels: (runs, batch) int64, -1 where a batch is short.
        logit_scale: Logits are this times the cosine.
    """
    length = features.norm(dim=-1, keepdim=True)
    direction = features / length
    logits = logit_scale * bmm(images, direction.transpose(1, 2))
    real = (labels >= 0).to(features.dtype)
    weight = real / real.sum(1, keepdim=True)
    target = labels.clamp(min=0)[..., None]
    losses = -(torch.log_softmax(logits, -1).gather(-1, target)[..., 0] * weight).sum(1)

    # Not the exponential of the above: element by element, its rounding depends on a run's place in memory.
    grad_logits = torch.softmax(logits, -1)
    grad_logits.scatter_add_(-1, target, torch.full_like(grad_logits[..., :1], -1.0))
    grad_logits *= weight[..., None] * logit_scale
    grad = bmm(grad_logits.transpose(1, 2), images)
    grad -= direction * (grad * direction).sum(-1, keepdim=True)
    return losses, grad / length


class RecordedStep:
    """Replays a step from a CUDA graph, one launch for hundreds, after WARM_UP plain calls; on a CPU, just calls it.

    The step must do the same device work at every call: no shape, branch or number may come from the host. It is
    passed to each call and not kept: a cycle of references would hold a forest's memory until garbage collection.
    """

    def __init__(self, calls: int, device: torch.device):
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        record = device.type == "cuda" and calls >= WORTH_RECORDING
        self._plain_calls = WARM_UP if record else -1  # -1: all of them

    def __call__(self, step: Callable[[], None]) -> None:
        if self._plain_calls == 0 and self._graph is None:
            self._record(step)  # recording runs nothing
        if self._graph is not None:
            self._graph.replay()
            return
        self._plain_calls -= 1
        step()

    def _record(self, step: Callable[[], None]) -> None:
        graph, device = torch.cuda.CUDAGraph(), self._device
        try:
            # On the step's own GPU: work on another GPU than the recorded stream's would run, unrecorded.
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                step()
            self._graph = graph
        except RuntimeError as error:
            log.warning("The step could not be recorded (%s); continuing without, more slowly.", error)
            self._plain_calls = -1


# The state of a training. The order of images is drawn from each run's seed, so a run's step is its random state too.


def _state_of(active: Iterable[ActiveRun], ended: Mapping[int, Trained]) -> State:
    """Return the state of runs in training and of ended ones; runs not in it have not started."""
    state: State = {}
    for a in active:
        for name in ("contexts", "momentum", "losses"):
            state[f"{name}.{a.index}"] = getattr(a, name).detach().cpu().clone()
        state[f"step.{a.index}"] = torch.tensor(a.step)
        state |= {f"snapshot.{a.index}.{epoch}": kept for epoch, kept in a.snapshots.items()}
    for index, trained in ended.items():
        state[f"contexts.{index}"] = trained.contexts
        state[f"losses.{index}"] = torch.from_numpy(trained.losses)
        state[f"ended.{index}"] = torch.tensor(-1 if trained.diverged_at is None else trained.diverged_at)
        state |= {f"snapshot.{index}.{epoch}": kept for epoch, kept in trained.snapshots.items()}
    return state


def _ended_runs(state: State, runs: Sequence[Run]) -> dict[int, Trained]:
    """Return the results of runs that had ended in ``state``, by their place in ``runs``."""
    ended = {}
    for index, run in enumerate(runs):
        if f"ended.{index}" in state:
            at = int(state[f"ended.{index}"])
            status, diverged_at = ("done", None) if at < 0 else ("diverged", at)
            contexts = state[f"contexts.{index}"].view(run.contexts.shape)
            losses, snapshots = state[f"losses.{index}"].numpy(), _snapshots(state, index)
            ended[index] = Trained(contexts, losses, status, diverged_at, snapshots)
    return ended


def _restore_run(active: ActiveRun, state: State) -> None:
    """Bring a run that was just started to where it stood in ``state``, if it had started."""
    index = active.index
    if f"step.{index}" in state:
        for name in ("contexts", "momentum", "losses"):
            getattr(active, name).copy_(state[f"{name}.{index}"])
        active.step = int(state[f"step.{index}"])
        active.snapshots.update(_snapshots(state, index))


def _snapshots(state: State, index: int) -> dict[int, Tensor]:
    prefix = f"snapshot.{index}."
    return {int(name[len(prefix) :]): kept for name, kept in state.items() if name.startswith(prefix)}
