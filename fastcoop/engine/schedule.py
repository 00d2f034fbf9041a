"""Schedules: the paper's, in epochs of batches, and the fast one, of all images in each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastcoop.checks import amount
from fastcoop.errors import UserError

LEARNING_RATE = 0.002
WARMUP_RATE = 1e-5
BATCH_SIZE = 32
MIN_RATE, MAX_RATE = 1e-38, 1e38  # limits of float32
# Of the fast schedule's optimizer: what a step keeps of the average gradient G and of the average of G'G, and when the
# inverse root is computed: in the first REFRESH steps, and then once in as many.
AVERAGE_KEPT, COVARIANCE_KEPT, REFRESH = 0.8, 0.95, 4


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the optimizer steps of an epoch: the last, short batch is dropped unless it is the only one."""
    return max(1, images // batch_size)


def learning_rates(epochs: int, base: float = LEARNING_RATE) -> np.ndarray:
    """Return the learning rate of each epoch, float64 (epochs,): 1e-5 in the first, then section 4.1's cosine.

    For e >= 1: ``base * (1 + cos(pi * (e - 1) / epochs)) / 2``. The official scheduler starts its cosine one epoch
    late, after the warm-up, so it ends above zero.
    """
    epoch = np.arange(epochs)
    rates = base * (1 + np.cos(np.pi * (epoch - 1) / epochs)) / 2
    rates[0] = WARMUP_RATE
    return rates


@dataclass(frozen=True)
class FastSchedule:
    """Few steps of all views of all images, by one-sided Shampoo (docs/fast.md), in place of the paper's schedule.

    Args:
        learning_rate: Root mean square of the first step's change of the contexts; it falls linearly to zero.
        ridge: Added to the average of G'G, whose diagonal is scaled to a mean of 1, before its inverse root.

    Raises:
        UserError: For a value out of range.
    """

    learning_rate: float = 0.006
    ridge: float = 0.03

    def __post_init__(self) -> None:
        check_rate(self.learning_rate, "a fast schedule")
        ridge = amount(self.ridge, "the ridge of a fast schedule")
        expect(1e-6 <= ridge <= 1e6, "the ridge of a fast schedule to be from 1e-06 to 1e+06", ridge)


def expect(fits: bool, expected: str, got: object) -> None:
    """Raise UserError unless a value fits."""
    if not fits:
        raise UserError(f"Expected {expected}, got {got}.")


def check_rate(learning_rate: float, of: str) -> None:
    """Raise UserError unless float32 holds a learning rate."""
    rate = amount(learning_rate, f"the learning_rate of {of}")
    expect(MIN_RATE <= rate <= MAX_RATE, f"a learning_rate from {MIN_RATE:g} to {MAX_RATE:g}", f"{rate:g}")
