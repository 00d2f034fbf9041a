"""Train many runs together: one step of all of them, and which runs are in it.

A step reads and writes device memory only: each run's next images and learning rates, its losses and whether it
diverged are tables there, read at a step counter that is on the device too. So nothing in a step waits for the host,
no Python loop goes over the runs, and on a GPU the whole step is recorded once and replayed.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby, product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.backbones import Backbone, PlainTower
from fastcoop.backbones.precision import (
    Precision,
    disable_autocast,
    dtype_of,
    limit_threads,
    products_in_tf32,
    warn_if_dtype_is_slow,
)
from fastcoop.checks import whole_number
from fastcoop.engine.fit import BatchBudget, TrainingPlan, is_out_of_memory, loss_parts, plan_training
from fastcoop.engine.forest import Trees
from fastcoop.engine.objectives import Images, class_gradients
from fastcoop.engine.optimizers import joined, slices
from fastcoop.engine.plain import PlainPass
from fastcoop.engine.runs import ActiveRun, Run, State, Trained, ended_runs, state_of_ended
from fastcoop.engine.tower import ForestPass, build_pass, new_workspace
from fastcoop.engine.tree_layout import split_runs
from fastcoop.engine.weights import bmm, row_rule
from fastcoop.errors import UserError

SYNC_EVERY = 16  # steps, or an epoch, between looks for diverged runs
DIVERGED = 10.0  # diverged: a loss above this times the first epoch's and an untrained classifier's
WARM_UP = 3  # plain steps before one is recorded: libraries allocate their workspaces
WORTH_RECORDING = 16  # steps; recording costs about as much as one or two
MAX_ESTIMATE_ERROR = 0.25  # a warning is logged if a batch takes this share more than estimated

log = logging.getLogger("fastcoop")


@disable_autocast
@torch.inference_mode(False)  # objectives are differentiated by torch
def train(
    backbone: Backbone,
    runs: Sequence[Run],
    *,
    memory_budget: int | None = None,
    precision: Precision | None = None,
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
            state stay float32. bfloat16 and "tf32", for a GPU, are not exact.
        on_done: Called with a run's place in ``runs`` and its result as it ends.
        on_progress: Called after every step with the work done, in units of ``RunCost.row_steps``.
        state: From ``on_step`` of an earlier training of the same runs. Training continues from it, with the same bits
            if all runs fit together.
        on_step: Called after every step with a function that returns the state.

    Returns:
        The results, in the order of ``runs``.

    Raises:
        UserError: Before the first step, for a prompt, contexts or features that do not fit the backbone.
    """
    if memory_budget is not None:
        whole_number(memory_budget, "the memory_budget of training in bytes", 0, 2**63)
    trees = Trees(backbone, dtype_of(precision))
    tower = trees.tower
    warn_if_dtype_is_slow(tower.dtype, tower.device.type)
    for run in runs:
        given = run.contexts.shape[-1], run.features.shape[-1]
        if given != (tower.width, tower.dim):
            raise UserError(
                f"Expected context vectors of {tower.width} numbers and features of {tower.dim}, got "
                f"{given[0]} and {given[1]}: were the features computed by another backbone?"
            )
    shapes = [run.shape for run in runs]
    plan = plan_training(backbone, shapes, memory_budget=memory_budget, precision=precision)
    training = _Training(trees, backbone.logit_scale, runs, plan, state or {}, on_done)
    while training.waiting or training.active:
        with products_in_tf32(precision == "tf32"):
            if not training.step():
                continue
        if on_progress is not None:
            on_progress(float(sum(plan.runs[a.index].tree.rows for a in training.active)))
        training.remove_ended()
        if on_step is not None:
            on_step(training.state)
    return [training.results[n] for n in range(len(runs))]


class _Training:
    """Which runs wait, train and ended. The runs that train are in one `Batch`, rebuilt when they change."""

    def __init__(
        self,
        trees: Trees,
        logit_scale: float,
        runs: Sequence[Run],
        plan: TrainingPlan,
        state: State,
        on_done: Callable[[int, Trained], None] | None,
    ):
        self.trees, self.logit_scale, self.runs, self.plan = trees, logit_scale, runs, plan
        self.given_state, self.on_done = state, on_done or (lambda index, trained: None)
        self.budget, self.kept_bytes = BatchBudget(plan), max(0, plan.memory_bytes - plan.scratch_bytes)
        self.results = ended_runs(state, runs)
        self.waiting = deque(n for n in plan.order() if n not in self.results)
        self.started: dict[int, ActiveRun] = {}  # also those that wait again since memory ran out
        self.active: list[ActiveRun] = []
        self.batch: Batch | None = None
        for index, trained in self.results.items():
            self.on_done(index, trained)

    def step(self) -> bool:
        """Do one step of the runs that fit together. Returns False where memory ran out: fewer fit from now on."""
        tower = self.trees.tower
        try:
            with limit_threads(tower.heads):
                self.batch = batch = self.batch or self._next_batch()
                batch.step()
                every = max(SYNC_EVERY, *(a.run.steps_per_epoch for a in self.active))
                if batch.done == batch.steps or (batch.done % every == 0 and batch.has_diverged()):
                    batch.sync()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            used = self.batch.workspace.nbytes if self.batch else 0
            self.sync()  # the steps that were done count
            self.batch = None
            if self.budget.shrink():
                log.warning("Out of memory with %d runs together; continuing with fewer.", self.budget.runs)
            elif isinstance(tower, PlainTower) and used:
                self.kept_bytes = used // 2
                log.warning("Out of memory with one run; continuing with less kept for its backward pass.")
            else:
                raise
            return False
        if batch.done == 1:
            used, estimate, runs = batch.workspace.nbytes, self.budget.activation_bytes, self.budget.runs
            log.debug("%d runs take %.2f GB; the estimate is %.2f GB.", runs, used / 1e9, estimate / 1e9)
            if used > (1 + MAX_ESTIMATE_ERROR) * estimate:
                more = 100 * (used / estimate - 1)
                text = "%d runs take %.2f GB, %.0f%% more than estimated; a smaller memory budget is safer."
                log.warning(text, runs, used / 1e9, more)
        return True

    def _next_batch(self) -> Batch:
        """Fill a batch with the runs in training, then with waiting ones."""
        waiting = deque([*(a.index for a in self.active), *self.waiting])
        tower, chosen = self.trees.tower, self.budget.fill(waiting)
        dtype = torch.promote_types(tower.dtype, torch.float32)
        if tower.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of the batch before, in other sizes
        for n in chosen:
            if n not in self.started:
                self.started[n] = ActiveRun.start(n, self.runs[n], dtype, tower.device, self.given_state)
        self.waiting, self.active = waiting, [self.started[n] for n in chosen]
        return Batch(self.trees, self.active, self.logit_scale, self.kept_bytes)

    def remove_ended(self) -> None:
        """Report the runs that ended, as far as their progress has been read, and drop the batch with them."""
        ended = [a for a in self.active if a.ended]
        for a in ended:
            self.results[a.index] = a.result()
            self.active.remove(self.started.pop(a.index))
            self.batch = None
        for a in ended:
            self.on_done(a.index, self.results[a.index])

    def sync(self) -> None:
        """Read the runs' progress from the device now, and remove runs that ended."""
        if self.batch is not None:
            self.batch.sync()
            self.remove_ended()

    def state(self) -> State:
        """Return the state of started and ended runs; runs not in it have not started."""
        self.sync()
        states = [a.state() for a in self.started.values()]
        states += [state_of_ended(index, trained) for index, trained in self.results.items()]
        return {name: tensor for state in states for name, tensor in state.items()}


def _grouped(runs: Sequence[ActiveRun], key: Callable[[ActiveRun], Hashable]) -> list[list[ActiveRun]]:
    """Return the runs of each key, in the order of their first ones."""
    groups = defaultdict[Hashable, list[ActiveRun]](list)
    for a in runs:
        groups[key(a)].append(a)
    return list(groups.values())


class Batch:
    """One forest over the ``active`` runs, and one tensor of all their contexts; valid until the first run ends.

    ``kept_bytes``: of the plain path, which a step keeps for its backward pass.
    """

    def __init__(
        self, trees: Trees, active: Sequence[ActiveRun], logit_scale: float, kept_bytes: int | None = None
    ):
        # An optimizer's runs stand side by side, and the forest takes those of a tree together. A loss is of a group of
        # these with equally many images: a longer batch beside it would change the order of a run's sums.
        by_optimizer = sorted(active, key=lambda a: a.run.optimizer.__name__)
        groups_by_tree = [
            _grouped(of_tree, lambda a: (a.run.images_per_step, a.run.objective.kind))
            for of_tree in _grouped(by_optimizer, lambda a: (a.run.optimizer, a.run.shape.tree))
        ]
        self.groups, by_tree = list(chain(*groups_by_tree)), [list(chain(*one)) for one in groups_by_tree]
        self.active = active = list(chain(*by_tree))
        planned = [(trees[of_tree[0].run.shape.tree], len(of_tree)) for of_tree in by_tree]
        self.forest_pass = build_pass(trees.tower, planned, row_rule(trees.tower))
        self.workspace = new_workspace(trees.tower, memory_bytes=kept_bytes)

        self.steps = min(a.steps_left for a in active)
        self.vectors = joined(active, "contexts")  # (vectors of all runs, width)
        device, dtype = self.vectors.device, self.vectors.dtype
        objectives = [[a.run.objective for a in group] for group in self.groups]
        self.objectives = [own[0].stack(own, dtype, device) for own in objectives]
        self.images = StepImages(self.groups, self.steps, logit_scale)
        of_optimizers = groupby(by_tree, key=lambda of_tree: of_tree[0].run.optimizer)
        optimizers = [optimizer(list(own), self.steps) for optimizer, own in of_optimizers]
        runs, vectors = (slices(size(one.sizes) for one in optimizers) for size in (len, sum))
        self.optimizers = list(zip(optimizers, runs, vectors, strict=True))
        self.done = 0
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.steps_read = 0  # whose losses have been copied to the runs
        self.snapshot_steps = defaultdict[int, list[tuple[ActiveRun, int]]](list)
        for a in active:
            for epoch in a.run.snapshots:
                self.snapshot_steps[epoch * a.run.steps_per_epoch - a.step].append((a, epoch))

        self.losses = torch.zeros(self.steps, len(active), dtype=dtype, device=device)
        self.diverged_at = torch.full((len(active),), -1, device=device)
        self._diverged_at_before = LateReader(self.diverged_at) if device.type == "cuda" else None
        # The whole first epoch, which hardly moves a run, sets its limit: one batch of few images may be far easier
        # than the next.
        left = [a.run.steps_per_epoch - a.step for a in active]
        self.first_epoch_left = torch.tensor(left, device=device)  # negative after it: no step is below it
        # log(classes) is the loss of equal logits; the + 1 keeps it above zero for a single class.
        untrained = torch.tensor([float(np.log(len(a.run.class_names) + 1)) for a in active], dtype=dtype)
        self.untrained_loss = untrained.to(device)
        first = [a.losses[: min(max(a.step, 1), a.run.steps_per_epoch)].max() for a in active]  # 0 before any
        self.limit = DIVERGED * torch.maximum(torch.stack(first).to(device), self.untrained_loss)
        is_plain = isinstance(self.forest_pass, PlainPass)  # whose every step builds autograd's graph
        self._recorded = RecordedStep(0 if is_plain else self.steps, device)
        self._kernel_step: Callable[[Batch], None] | None = None
        if not isinstance(self.forest_pass, ForestPass | PlainPass):
            from fastcoop.engine.kernels.training_step import kernel_step

            self._kernel_step = kernel_step(self, DIVERGED)

    def step(self) -> None:
        """Do one step of every run: forward, each run's loss, backward, optimizer."""
        self._recorded(self._step, self.variants)
        self.done += 1
        for a, epoch in self.snapshot_steps[self.done]:
            a.snapshots[epoch] = a.snapshot()

    @property
    def variants(self) -> tuple[int, ...]:
        """Which operations the next step of each optimizer consists of."""
        return tuple(optimizer.variant(self.done) for optimizer, _, _ in self.optimizers)

    def has_diverged(self) -> bool:
        """Return whether a run had diverged, on a GPU at the last such question: nothing waits for the device."""
        diverged_at = self._diverged_at_before() if self._diverged_at_before else self.diverged_at
        return bool((diverged_at >= 0).any())

    def sync(self) -> None:
        """Bring the runs' ``step``, ``losses`` and ``diverged_at`` up to date. Only this waits for the device."""
        if int(self.counter) != self.done:
            raise RuntimeError(f"The device did {int(self.counter)} of {self.done} steps.")
        losses, diverged = self.losses[self.steps_read : self.done].cpu(), self.diverged_at.tolist()
        for i, a in enumerate(self.active):
            start = a.step - self.steps_read  # of this batch
            a.losses[a.step : start + self.done] = losses[:, i]
            a.step = start + self.done
            if 0 <= diverged[i] < self.done:  # in a step that was completed
                a.diverged_at = start + diverged[i]
                a.step = a.diverged_at + 1
                kept = a.diverged_at // a.run.steps_per_epoch
                a.snapshots = {epoch: c for epoch, c in a.snapshots.items() if epoch <= kept}
        self.steps_read = self.done

    def _step(self) -> None:
        if self._kernel_step is not None:
            self._kernel_step(self)
            return
        found = self.forest_pass.forward(self.vectors, self.workspace).to(self.vectors.dtype)
        features = split_runs(found, [(len(group), len(group[0].run.class_names)) for group in self.groups])
        groups = zip(self.objectives, features, self.images(self.counter), strict=True)
        losses, grads = zip(*(class_gradients(*group) for group in groups), strict=True)
        self._check_divergence(torch.cat(losses))
        grad = self._backward(grads)
        frozen = self.diverged_at >= 0
        # Nothing is written before the last allocation: a step that runs out of memory is repeated from its start.
        updates = [
            update
            for (optimizer, runs, own), variant in zip(self.optimizers, self.variants, strict=True)
            for update in optimizer.updates(self.vectors[own], grad[own], self.counter, frozen[runs], variant)
        ]
        for tensor, value in updates:
            tensor.copy_(value)
        self.counter += 1

    def _backward(self, grads: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the gradient of all vectors from each group's gradients of class features, one per part."""
        passes = []
        for part in range(max(objective.parts for objective in self.objectives)):
            # Groups with fewer parts have zeros in the other passes.
            of_groups = [own[part] if part < len(own) else 0 * own[0] for own in grads]
            grad = torch.cat([of_group.flatten(0, 1) for of_group in of_groups])
            grad = self.forest_pass.backward(grad, self.workspace)
            passes.append(split_runs(grad, [(len(group), len(group[0].contexts)) for group in self.groups]))
        pairs = zip(self.objectives, zip(*passes, strict=True), strict=True)
        merged = [objective.combine(of_parts[: objective.parts]) for objective, of_parts in pairs]
        return torch.cat([of_group.flatten(0, 1) for of_group in merged])

    def _check_divergence(self, loss: Tensor) -> None:
        """Keep this step's losses (runs,), and mark runs whose loss is not finite or above its limit."""
        self.losses.index_copy_(0, self.counter, loss[None])
        first = DIVERGED * torch.maximum(loss, self.untrained_loss)
        in_first_epoch = self.counter < self.first_epoch_left
        self.limit.copy_(torch.where(in_first_epoch, torch.maximum(first, self.limit), self.limit))
        bad = ~(torch.isfinite(loss) & (loss <= self.limit)) & (self.diverged_at < 0)
        self.diverged_at.copy_(torch.where(bad, self.counter, self.diverged_at))


class LateReader:
    """Reads a tensor of a GPU without waiting for it: a call returns the values at the call before, at first -1.

    The copy to pinned memory runs behind the steps that were queued before it, while the host queues further ones.
    """

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self._host = torch.full(tensor.shape, -1, dtype=tensor.dtype, pin_memory=True)
        self._copied: torch.cuda.Event | None = None

    def __call__(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        values = self._host.clone()
        self._host.copy_(self._tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return values


class StepImages:
    """The images that each group learns from in a step.

    Attributes:
        images, labels: Those of runs that learn from batches, on the device, (images, dim) raw and (images,).
        rows: int32 (steps, runs, batch size), their images of each step, -1 where a batch is short.
    """

    def __init__(self, groups: Sequence[Sequence[ActiveRun]], steps: int, logit_scale: float):
        self.groups, self.logit_scale, active = groups, logit_scale, list(chain(*groups))
        self.device, self.dtype = active[0].contexts.device, active[0].contexts.dtype
        batched = [a for a in active if a.batches is not None]
        if batched:
            self._build_tables(batched, steps)
        # Normalized images and labels of each few-shot subset from which runs learn all at once.
        subsets = {a.run.images: a.run for a in active if a.batches is None}
        whole = {
            images: (self._normalized(run.features.flatten(0, 1).to(self.device)), self._labels([run]))
            for images, run in subsets.items()
        }
        self._whole = [[whole[a.run.images] for a in group if a.batches is None] for group in groups]

    def _build_tables(self, active: Sequence[ActiveRun], steps: int) -> None:
        # Runs that read the same images, all of them in this batch, share one copy.
        pool = {a.run.images: a.run for a in active}
        parts = [run.features.flatten(0, 1).to(self.device) for run in pool.values()]
        self.images, self.labels = torch.cat(parts), self._labels(pool.values())
        starts = dict(zip(pool, accumulate(map(len, parts), initial=0), strict=False))
        longest = max(a.run.images_per_step for a in active)
        rows = torch.full((steps, len(active), longest), -1, dtype=torch.int32)
        for i, a in enumerate(active):
            assert a.batches is not None
            own = a.batches[a.step : a.step + steps]
            rows[:, i, : own.shape[1]] = torch.where(own >= 0, own + starts[a.run.images], -1)
        self.rows = rows.to(self.device)

    def __call__(self, step: Tensor) -> Iterator[Iterable[tuple[slice, Images]]]:
        """Yield for each group the images of a step, int64 (1,) of this batch on the device, part by part."""
        batched = [group for group in self.groups if group[0].batches is not None]
        of_batches = self._read_batches(step, batched) if batched else iter(())
        for group, whole in zip(self.groups, self._whole, strict=True):
            classes = len(group[0].run.class_names)
            yield self._cut(whole, classes) if whole else [next(of_batches)]

    def _read_batches(
        self, step: Tensor, groups: Sequence[Sequence[ActiveRun]]
    ) -> Iterator[tuple[slice, Images]]:
        rows = self.rows.index_select(0, step)[0]
        at = rows.clamp(min=0)
        images = self._normalized(self.images[at])
        labels = torch.where(rows >= 0, self.labels[at], -1)
        for group, runs in zip(groups, slices(map(len, groups)), strict=True):
            part = runs, slice(group[0].run.images_per_step)
            real = (labels[part] >= 0).to(self.dtype)
            weights = real / real.sum(1, keepdim=True)
            yield slice(0, len(group)), Images(images[part], labels[part], weights, self.logit_scale)

    def _cut(self, whole: Sequence[tuple[Tensor, Tensor]], classes: int) -> Iterator[tuple[slice, Images]]:
        """Yield all images of a group's runs, in parts that depend on a run's own sizes alone, not on its group's."""
        images, labels = zip(*whole, strict=True)
        count, dim = images[0].shape
        rows_at_once, runs_at_once = loss_parts(count, classes, dim, self.device.type == "cpu")
        weight = torch.full((1, 1), 1 / count, dtype=self.dtype, device=self.device)
        # Few large products are alone in any company, so that threads may share one.
        multiply = torch.bmm if runs_at_once == 1 else bmm
        for run, row in product(range(0, len(whole), runs_at_once), range(0, count, rows_at_once)):
            runs, rows = slice(run, min(run + runs_at_once, len(whole))), slice(row, row + rows_at_once)
            own, own_labels = (torch.stack([one[rows] for one in every[runs]]) for every in (images, labels))
            weights = weight.expand(own_labels.shape)
            yield runs, Images(own, own_labels, weights, self.logit_scale, multiply)

    def _normalized(self, images: Tensor) -> Tensor:
        return F.normalize(images.to(self.dtype), dim=-1, eps=0.0)

    def _labels(self, runs: Iterable[Run]) -> Tensor:
        """Return the labels of all views of the runs' images."""
        labels = [run.labels.repeat_interleave(run.features.shape[1]) for run in runs]
        return torch.cat(labels).to(self.device)


class RecordedStep:
    """Replays a step from a CUDA graph, one launch for hundreds, after WARM_UP plain calls; on a CPU, just calls it.

    No shape, branch or number of the step may come from the host. It is passed to each call and not kept: a cycle of
    references would hold a forest's memory until garbage collection.
    """

    def __init__(self, calls: int, device: torch.device):
        self._device, self._records = device, device.type == "cuda" and calls >= WORTH_RECORDING
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._calls = Counter[Hashable]()

    def __call__(self, step: Callable[[], None], variant: Hashable = None) -> None:
        """Do a step. Steps of equal ``variant`` consist of the same operations; each variant is recorded."""
        self._calls[variant] += 1
        if self._records and self._calls[variant] > WARM_UP and variant not in self._graphs:
            self._record(step, variant)  # recording runs nothing
        if variant in self._graphs:
            self._graphs[variant].replay()
        else:
            step()

    def _record(self, step: Callable[[], None], variant: Hashable) -> None:
        graph, device = torch.cuda.CUDAGraph(), self._device
        stream = torch.cuda.current_stream(device)
        # No number lives from one replay to the next but in the batch's own tensors: recordings can share memory.
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        try:
            # On the step's own GPU: work on another GPU than the recorded stream's would run, unrecorded.
            with torch.cuda.device(device), torch.cuda.graph(graph, pool, torch.cuda.Stream(device)):
                step()
            self._graphs[variant] = graph
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a recording that fails at its end leaves its own stream current
            log.warning("The step could not be recorded (%s); continuing without, more slowly.", error)
            self._records = False
