"""One run: its batches, its progress, what is saved of it, and its result."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastcoop.checks import LARGEST_BATCH, LONGEST, whole_number
from fastcoop.engine.fit import RunShape
from fastcoop.engine.objectives import CrossEntropy, Objective
from fastcoop.engine.optimizers import SGD, Optimizer, Shampoo
from fastcoop.engine.schedule import (
    BATCH_SIZE,
    LEARNING_RATE,
    FastSchedule,
    check_rate,
    expect,
    learning_rates,
    steps_per_epoch,
)
from fastcoop.prompts.layout import PromptLayout

State = dict[str, Tensor]  # the progress of a training, as named tensors on the CPU


@dataclass(frozen=True, eq=False)
class Run:
    """One training of context vectors: its prompts, its first contexts, its images' features and its schedule.

    Args:
        class_names: Names of the classes.
        layout: The prompt layout.
        contexts: First contexts, (M, width), or (classes, M, width) if class-specific.
        features: Raw image features, (images, views, dim), of any float dtype.
        labels: Class of each image, (images,), integers.
        epochs: Passes over the images.
        seed: Draws the order of the images and their views.
        batch_size: Images of a step.
        learning_rate: Of the second epoch; the first has 1e-5, and a cosine follows (section 4.1).
        snapshots: Epochs, counted from 1, after which the contexts are kept.
        objective: What is minimized.
        schedule: A fast schedule: each epoch is one step with all images and views, and ``seed``, ``batch_size`` and
            ``learning_rate`` are not used. None: the paper's.

    Raises:
        UserError: For a shape or a value that does not fit the others.
    """

    class_names: Sequence[str]
    layout: PromptLayout
    contexts: Tensor
    features: Tensor
    labels: Tensor
    epochs: int
    seed: int
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE
    snapshots: Sequence[int] = ()
    objective: Objective = CrossEntropy()  # noqa: RUF009 (it has no state)
    schedule: FastSchedule | None = None

    def __post_init__(self) -> None:
        shape = self.layout.shape(len(self.class_names), self.contexts.shape[-1])
        expect(tuple(self.contexts.shape) == shape, f"contexts of shape {shape}", tuple(self.contexts.shape))
        images, labels = tuple(self.features.shape), tuple(self.labels.shape)
        fit = len(images) == 3 and labels == images[:1] and 0 not in images
        expect(
            fit and not self.labels.is_floating_point(),
            "features (images, views, dim) and an integer label per image, at least one image",
            f"features {images} and labels {labels} of {self.labels.dtype}",
        )
        low, high, classes = int(self.labels.min()), int(self.labels.max()), len(self.class_names)
        expect(low >= 0 and high < classes, f"labels from 0 to {classes - 1}", f"{low} to {high}")
        whole_number(self.epochs, "the epochs of a run", 1, LONGEST)
        whole_number(self.batch_size, "the batch_size of a run", 1, LARGEST_BATCH)
        whole_number(self.seed, "the seed of a run")
        check_rate(self.learning_rate, "a run")
        in_range = all(1 <= epoch <= self.epochs for epoch in self.snapshots)
        expect(in_range, f"snapshots of epochs 1 to {self.epochs}", sorted(self.snapshots))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return 1 if self.schedule else steps_per_epoch(len(self.labels), self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def shape(self) -> RunShape:
        """The run's sizes, for `plan_training`."""
        images, views = self.features.shape[:2]
        sizes = self.steps, images, views, self.images_per_step, self.images, self.schedule is not None
        return RunShape(self.class_names, self.layout, *sizes)

    @property
    def images_per_step(self) -> int:
        """Images of a step, views counted; fewer where a batch is short."""
        return self.features.shape[0] * self.features.shape[1] if self.schedule else self.batch_size

    @property
    def optimizer(self) -> type[Optimizer]:
        """The optimizer of the run's schedule."""
        return Shampoo if self.schedule else SGD

    @property
    def images(self) -> Hashable:
        """What identifies the images: runs that read the same memory share them on the device."""
        return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (self.features, self.labels))


@dataclass(eq=False)
class Trained:
    """What a training returns.

    Attributes:
        contexts: After the last step, shaped as the run's, on the CPU: float32, or float64 in a float64 tower.
        losses: (epochs,) mean loss of each epoch.
        diverged_at: The step (from 0) whose loss was not finite, or far above those of the first epoch; None for none.
        snapshots: Contexts by epoch.
    """

    contexts: Tensor
    losses: np.ndarray
    diverged_at: int | None = None
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Return "done" or "diverged"."""
        return "done" if self.diverged_at is None else "diverged"


def rates_by_step(run: Run) -> np.ndarray:
    """Return the learning rate of each step, float64 (steps,); a fast schedule's falls linearly to zero."""
    if run.schedule:
        return run.schedule.learning_rate * (1 - np.arange(run.steps) / run.steps)
    return np.repeat(learning_rates(run.epochs, run.learning_rate), run.steps_per_epoch)


def draw_batches(run: Run) -> np.ndarray:
    """Return the run's batches, int64 (steps, batch size): ``image * views + view``, -1 where a batch is short."""
    images, views = run.features.shape[:2]
    rng, taken = np.random.default_rng(run.seed), slice(run.steps_per_epoch * min(run.batch_size, images))
    epochs = [
        rng.permutation(images)[taken] * views + rng.integers(views, size=images)[taken]
        for _ in range(run.epochs)
    ]
    rows = np.stack(epochs).reshape(run.steps, -1)
    return np.pad(rows, ((0, 0), (0, run.batch_size - rows.shape[1])), constant_values=-1)


@dataclass(eq=False)
class ActiveRun:
    """A run in training. ``step``, ``losses`` and ``diverged_at`` are up to date after ``Batch.sync``."""

    index: int  # in the list of runs
    run: Run
    tensors: dict[str, Tensor]  # the contexts (vectors, width) and the optimizer's own, on the device
    batches: Tensor | None  # (steps, batch size); None: all images in each
    rates: np.ndarray  # learning rate of each step
    losses: Tensor  # (steps,)
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    step: int = 0
    diverged_at: int | None = None

    @classmethod
    def start(
        cls, index: int, run: Run, dtype: torch.dtype, device: torch.device, state: State | None = None
    ) -> ActiveRun:
        """Put a run on the device, to continue from ``state`` if that contains it."""
        contexts = run.contexts.detach().to(device, dtype).reshape(-1, run.contexts.shape[-1]).clone()
        batches = None if run.schedule else torch.as_tensor(draw_batches(run))
        tensors = {"contexts": contexts} | run.optimizer.new_tensors(contexts)
        active = cls(index, run, tensors, batches, rates_by_step(run), torch.zeros(run.steps, dtype=dtype))
        if state and f"step.{index}" in state:
            for name, tensor in active._saved.items():
                tensor.copy_(state[f"{name}.{index}"])
            active.step, active.snapshots = int(state[f"step.{index}"]), _snapshots(state, index)
        return active

    @property
    def contexts(self) -> Tensor:
        return self.tensors["contexts"]

    @property
    def steps_left(self) -> int:
        return len(self.losses) - self.step

    @property
    def ended(self) -> bool:
        return self.diverged_at is not None or self.steps_left == 0

    def snapshot(self) -> Tensor:
        return self.contexts.view(self.run.contexts.shape).cpu().clone()

    def result(self) -> Trained:
        losses, per_epoch = self.losses[: self.step].double().numpy(), self.run.steps_per_epoch
        means = np.array([losses[i : i + per_epoch].mean() for i in range(0, len(losses), per_epoch)])
        return Trained(self.snapshot(), means, self.diverged_at, self.snapshots)

    @property
    def _saved(self) -> dict[str, Tensor]:
        """What is saved with the step, by name; batches and rates follow from the run."""
        return self.tensors | {"losses": self.losses}

    def state(self) -> State:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self._saved.items()}
        return _named(self.index, tensors | {"step": torch.tensor(self.step)}, self.snapshots)


def state_of_ended(index: int, trained: Trained) -> State:
    """Return the state of a run that ended."""
    ended = torch.tensor(-1 if trained.diverged_at is None else trained.diverged_at)
    tensors = {"contexts": trained.contexts, "losses": torch.from_numpy(trained.losses), "ended": ended}
    return _named(index, tensors, trained.snapshots)


def ended_runs(state: State, runs: Sequence[Run]) -> dict[int, Trained]:
    """Return the results of runs that had ended in ``state``, by their place in ``runs``."""
    ended = {}
    for index, run in enumerate(runs):
        if f"ended.{index}" in state:
            at, losses = int(state[f"ended.{index}"]), state[f"losses.{index}"].numpy()
            contexts = state[f"contexts.{index}"].view(run.contexts.shape)
            ended[index] = Trained(contexts, losses, None if at < 0 else at, _snapshots(state, index))
    return ended


def shares_done(state: State, runs: Sequence[Run]) -> list[float]:
    """Return the share of each run's steps that are done in ``state``; 1 for runs that ended."""
    steps = [run.steps if f"ended.{n}" in state else state.get(f"step.{n}", 0) for n, run in enumerate(runs)]
    return [int(done) / run.steps for done, run in zip(steps, runs, strict=True)]


def _named(index: int, tensors: dict[str, Tensor], snapshots: dict[int, Tensor]) -> State:
    kept = {f"snapshot.{index}.{epoch}": contexts for epoch, contexts in snapshots.items()}
    return {f"{name}.{index}": tensor for name, tensor in tensors.items()} | kept


def _snapshots(state: State, index: int) -> dict[int, Tensor]:
    prefix = f"snapshot.{index}."
    return {int(name[len(prefix) :]): kept for name, kept in state.items() if name.startswith(prefix)}
