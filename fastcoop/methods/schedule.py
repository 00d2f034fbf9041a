"""How long training goes on: the paper's epochs, or others, which every figure then names (section 4.1)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from fastcoop.errors import UserError
from fastcoop.methods.base import Job, MethodSettings

PAPER_EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}
PAPER_EPOCHS_IMAGENET = 50
FEWEST_EPOCHS = 4  # of a schedule given in steps: one of warm-up and three of the cosine

Positive = Annotated[int, Field(ge=1)]
Epochs = int | dict[int | str, int | str] | str
STEPS = re.compile(r"[1-9]\d* steps")


class ScheduleSettings(MethodSettings):
    """Settings of whatever trains by steps.

    ``epochs``: "paper" (200 for 16 and 8 shots, 100 for 4 and 2, 50 for 1; 50 on ImageNet), a number,
    "N steps" (the epochs closest to N optimiser steps, at least 4), or a mapping from shots to either of these.
    """

    epochs: Positive | dict[Positive | Literal["all"], Positive | str] | str = "paper"
    batch_size: Positive = 32

    @field_validator("epochs")
    @classmethod
    def _is_schedule(cls, epochs: Epochs) -> Epochs:
        by_shots = isinstance(epochs, dict)
        for value in epochs.values() if isinstance(epochs, dict) else (epochs,):
            if isinstance(value, str) and (by_shots or value != "paper") and not STEPS.fullmatch(value):
                raise ValueError(
                    'expected "paper", a number, "N steps", or a mapping from shots to numbers or "N steps"'
                )
        return epochs


def epoch_order(images: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """An epoch's batches, indices in a random order: one where there are no more images than fill it, otherwise
    the last short one is dropped."""
    order = rng.permutation(images)
    return [order[at : at + batch_size] for at in range(0, max(images - batch_size, 0) + 1, batch_size)]


def epochs_of(job: Job[Any]) -> int:
    """Epochs that a job's schedule stands for.

    Raises:
        UserError: a schedule by shots does not name the job's.
    """
    epochs, shots = job.settings.epochs, job.shots
    if isinstance(epochs, dict):
        if shots not in epochs:
            given = ", ".join(str(key) for key in epochs)
            raise UserError(f"The epochs are given for {given} shots, not for {shots}; add them.")
        epochs = epochs[shots]
    if isinstance(epochs, int):
        return epochs
    if epochs == "paper":
        return paper_epochs(job.data.name, shots)
    assert job.subset is not None
    per_epoch = max(1, len(job.subset.train) // job.settings.batch_size)
    return max(FEWEST_EPOCHS, round(int(epochs.split()[0]) / per_epoch))


def paper_epochs(dataset: str, shots: int | str) -> int:
    """The official number of epochs. Shots that the paper does not have take those of its next number."""
    if dataset.partition(":")[0] == "imagenet":
        return PAPER_EPOCHS_IMAGENET
    enough = [known for known in PAPER_EPOCHS if shots != "all" and known >= int(shots)]
    return PAPER_EPOCHS[min(enough, default=16)]


def schedule_of(settings: ScheduleSettings) -> str:
    """ "paper", or what the schedule is instead, to be printed on all that is drawn from such runs."""
    epochs = settings.epochs
    if isinstance(epochs, dict):
        if all(isinstance(n, str) for n in epochs.values()):
            steps = "/".join(str(n).split()[0] for n in epochs.values())
            return f"quick: {steps} steps at {'/'.join(map(str, epochs))} shots"
        by_shots = ", ".join(f"{n} at {shots}" for shots, n in epochs.items())
        return f"quick: epochs {by_shots} shots"
    if isinstance(epochs, int):
        return f"quick: {epochs} epochs"
    return "paper" if epochs == "paper" else f"quick: {epochs}"
