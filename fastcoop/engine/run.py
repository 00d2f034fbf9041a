"""What one training needs, as tensors, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastcoop.checks import LARGEST_BATCH, LONGEST, amount, whole_number
from fastcoop.engine.fit import RunShape
from fastcoop.errors import UserError
from fastcoop.prompts.layout import PromptLayout

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LEARNING_RATE = 0.002
WARMUP_RATE = 1e-5
BATCH_SIZE = 32
MIN_RATE, MAX_RATE = 1e-38, 1e38  # what float32 holds


@dataclass(frozen=True, eq=False)
class Run:
    """One CoOp training: its prompts, where its contexts start, its images' features and its schedule.

    ``contexts`` (M, width), or (classes, M, width) if class-specific. ``features`` (images, views, dim), raw;
    ``labels`` (images,) int64. Each epoch goes through the images in an order, and by views, drawn from
    ``seed``; ``batches`` (steps, batch size) int64 gives both instead: entries are ``image * views + view``, -1 pads
    a short batch. ``snapshots``: epochs (counted from 1) after which the contexts are kept.

    Raises UserError for shapes that do not fit, labels outside the classes, no images, or batches and snapshots
    that are not the run's.
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
    weight_decay: float = WEIGHT_DECAY
    momentum: float = MOMENTUM
    batches: np.ndarray | None = None
    snapshots: Sequence[int] = ()

    def __post_init__(self) -> None:
        shape = self.layout.shape(len(self.class_names), self.contexts.shape[-1])
        if tuple(self.contexts.shape) != shape:
            raise UserError(
                f"A run's contexts should be {shape} for its layout; {tuple(self.contexts.shape)} came."
            )
        images, labels = tuple(self.features.shape), tuple(self.labels.shape)
        if len(images) != 3 or labels != images[:1] or 0 in images or self.labels.is_floating_point():
            raise UserError(
                "A run needs features (images, views, dim) and an integer label per image, at least one image; "
                f"{images} and labels {labels} of {self.labels.dtype} came."
            )
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.class_names):
            raise UserError(
                f"A run's labels should lie in 0 to {len(self.class_names) - 1}, its classes; "
                f"{int(self.labels.min())} to {int(self.labels.max())} came."
            )
        whole_number(self.epochs, "the epochs of a run", 1, LONGEST)
        whole_number(self.batch_size, "the batch_size of a run", 1, LARGEST_BATCH)
        whole_number(self.seed, "the seed of a run")
        rate = amount(self.learning_rate, "the learning_rate of a run")
        if not MIN_RATE <= rate <= MAX_RATE:
            raise UserError(f"Expected a learning_rate from {MIN_RATE:g} to {MAX_RATE:g}, got {rate:g}.")
        for name, most in (("weight_decay", 1e38), ("momentum", 1.0)):
            if not 0 <= float(getattr(self, name)) < most:
                raise UserError(
                    f"Expected the {name} of a run to be from 0 to below {most:g}, got {getattr(self, name)}."
                )
        if not all(1 <= epoch <= self.epochs for epoch in self.snapshots):
            raise UserError(
                f"Snapshots are of epochs 1 to {self.epochs} of this run; {sorted(self.snapshots)} were asked for."
            )
        if self.batches is not None:
            self._check_batches(np.asarray(self.batches))

    def _check_batches(self, batches: np.ndarray) -> None:
        rows = self.features.shape[0] * self.features.shape[1]
        if batches.ndim != 2 or len(batches) != self.steps or not np.issubdtype(batches.dtype, np.integer):
            raise UserError(
                f"Given batches should be integers ({self.steps} steps, batch size); {batches.dtype} "
                f"{batches.shape} came."
            )
        if batches.min() < -1 or batches.max() >= rows or (batches.max(1) < 0).any():
            raise UserError(
                f"Given batches should hold image * views + view, so 0 to {rows - 1}, or -1 to pad, and at least one "
                f"image each; {batches.min()} to {batches.max()} came."
            )

    @property
    def steps_per_epoch(self) -> int:
        """A training set smaller than a batch is one batch; otherwise the last short batch is dropped."""
        return max(1, len(self.labels) // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def shape(self) -> RunShape:
        """The run's sizes, for `plan_training`."""
        return RunShape(
            self.class_names,
            self.layout,
            self.steps,
            images=self.features.shape[0],
            views=self.features.shape[1],
            batch_size=self.batch_size if self.batches is None else np.shape(self.batches)[1],
            features=id(self.features),
        )


@dataclass(eq=False)
class Trained:
    """The last step's ``contexts`` (float32, or float64 in a float64 tower; shaped as the run's, on the CPU).

    ``losses`` (epochs,): mean loss per epoch. ``status``: "done", or "diverged" with ``diverged_at`` the step (from 0)
    whose loss was not finite or far above its start. ``snapshots``: epoch to contexts.
    """

    contexts: Tensor
    losses: np.ndarray
    status: str = "done"
    diverged_at: int | None = None
    snapshots: dict[int, Tensor] = field(default_factory=dict)


def learning_rates(epochs: int, base: float = LEARNING_RATE) -> np.ndarray:
    """Learning rate of each epoch, float64 (epochs,): 1e-5 in the first, then the cosine of section 4.1.

    For e >= 1: ``base * (1 + cos(pi * (e - 1) / epochs)) / 2``. The official scheduler starts its cosine one epoch
    late, behind the warm-up, so it ends above zero.
    """
    epoch = np.arange(epochs)
    rates = base * (1 + np.cos(np.pi * (epoch - 1) / epochs)) / 2
    rates[0] = WARMUP_RATE
    return rates


def draw_batches(run: Run) -> np.ndarray:
    """Return the run's batches, int64 (steps, batch size): ``image * views + view``, -1 where a batch is short."""
    if run.batches is not None:
        return np.asarray(run.batches, np.int64)
    images, views = run.features.shape[:2]
    rng = np.random.default_rng(run.seed)
    take = run.steps_per_epoch * min(run.batch_size, images)
    rows = np.stack(
        [
            rng.permutation(images)[:take] * views + rng.integers(views, size=images)[:take]
            for _ in range(run.epochs)
        ]
    ).reshape(run.steps, -1)
    return np.pad(rows, ((0, 0), (0, run.batch_size - rows.shape[1])), constant_values=-1)


def normalized(features: Tensor) -> Tensor:
    """Rows of ``features`` divided by their Euclidean norm."""
    return torch.nn.functional.normalize(features, dim=-1, eps=0.0)
