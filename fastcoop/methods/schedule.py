"""The length of a training: the paper's epochs (section 4.1), or others, which figures then state."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, field_validator

from fastcoop.checks import LARGEST, LARGEST_BATCH, LONGEST
from fastcoop.errors import UserError
from fastcoop.methods.base import MethodSettings
from fastcoop.methods.spec import RunSpec

PAPER_EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}
PAPER_EPOCHS_IMAGENET = 50
WARMUP_RATE = 1e-5  # of the first epoch, as the engine has it
FEWEST_EPOCHS = 4  # of a schedule given in steps: one of warm-up and three of the cosine


def _fits_float32(rate: float) -> float:
    with np.errstate(over="ignore"):
        if not 0 < np.float32(rate) < np.inf:
            raise ValueError("expected a number that float32 holds, such as 0.002")
    return rate


Positive = Annotated[int, Field(ge=1, le=LARGEST)]
EpochNumber = Annotated[int, Field(ge=1, le=LONGEST)]
LearningRate = Annotated[float, Field(gt=0), AfterValidator(_fits_float32)]
Epochs = int | dict[int | str, int | str] | str
STEPS = re.compile(r"[1-9][0-9]{0,6} steps")


class ScheduleSettings(MethodSettings):
    """Settings of methods that train by steps.

    ``epochs``: "paper" (200 for 16 and 8 shots, 100 for 4 and 2, 50 for 1; 50 on ImageNet), a number,
    "N steps" (the epochs closest to N optimiser steps, at least 4), or a mapping from shots to either of these.
    """

    epochs: EpochNumber | dict[Positive | Literal["all"], EpochNumber | str] | str = "paper"
    batch_size: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = 32

    @field_validator("epochs", mode="before")
    @classmethod
    def _names_shots_once(cls, epochs: Any) -> Any:
        if isinstance(epochs, dict):
            if any(isinstance(one, bool | bytes) for pair in epochs.items() for one in pair):
                raise ValueError("expected whole numbers, not yes or no")
            names = [str(shots) for shots in epochs]
            twice = [name for n, name in enumerate(names) if name in names[:n]]
            if twice or not epochs:
                raise ValueError(f"it names {twice[0]} shots twice" if twice else "it names no shots")
        return epochs

    @field_validator("epochs")
    @classmethod
    def _is_schedule(cls, epochs: Epochs) -> Epochs:
        by_shots = isinstance(epochs, dict)
        for value in epochs.values() if isinstance(epochs, dict) else (epochs,):
            if isinstance(value, str) and (by_shots or value != "paper") and not STEPS.fullmatch(value):
                raise ValueError(
                    'expected "paper", a number, "N steps", or a mapping from shots to numbers or "N steps"'
                )
            if isinstance(value, str) and value != "paper" and int(value.split()[0]) > LONGEST:
                raise ValueError(f"expected at most {LONGEST} steps")
        return epochs


def epoch_order(images: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """An epoch's batches, indices in a random order: one where there are no more images than fill it, otherwise
    the last short one is dropped."""
    order = rng.permutation(images)
    return [order[at : at + batch_size] for at in range(0, max(images - batch_size, 0) + 1, batch_size)]


def steps_per_epoch(run: RunSpec[Any]) -> int:
    """Return the optimizer steps of one epoch of a run, as the engine counts them."""
    from fastcoop.engine.runs import steps_per_epoch

    assert run.subset is not None
    return steps_per_epoch(len(run.subset.train), run.settings.batch_size)


def epochs_of(run: RunSpec[Any]) -> int:
    """Return the epochs of a run's schedule. Raises UserError if a schedule by shots does not have the run's."""
    epochs, shots = run.settings.epochs, run.shots
    if isinstance(epochs, dict):
        if shots not in epochs:
            given = ", ".join(str(key) for key in epochs)
            raise UserError(f"The epochs are given for {given} shots, not for {shots}; add them.")
        epochs = epochs[shots]
    if isinstance(epochs, int):
        return epochs
    if epochs == "paper":
        return paper_epochs(run.data.name, shots)
    assert run.subset is not None
    per_epoch = steps_per_epoch(run)
    return max(FEWEST_EPOCHS, round(int(epochs.split()[0]) / per_epoch))


def unused_settings(method: str, runs: Sequence[RunSpec[Any]]) -> Iterator[str]:
    """Yield a sentence per setting of a schedule that was given and changes nothing in some of a method's runs."""
    given = [run for run in runs if isinstance(run.settings, ScheduleSettings) and run.subset is not None]
    small = [
        run
        for run in given
        if "batch_size" in run.settings.model_fields_set
        and run.subset is not None
        and len(run.subset.train) < run.settings.batch_size
    ]
    if small:
        yield (
            f"{len(small)} of {len(runs)} runs of {method} have fewer images than their batch_size: each of their "
            "batches is all of their images."
        )
    short = [run for run in given if "learning_rate" in run.settings.model_fields_set and epochs_of(run) == 1]
    if short:
        yield (
            f"{len(short)} of {len(runs)} runs of {method} train for one epoch, whose learning rate is the warm-up's "
            f"{WARMUP_RATE:g} whatever learning_rate says."
        )


def paper_epochs(dataset: str, shots: int | str) -> int:
    """Return the official number of epochs. Shots that the paper does not have use those of its next number."""
    if dataset.partition(":")[0] == "imagenet":
        return PAPER_EPOCHS_IMAGENET
    enough = [known for known in PAPER_EPOCHS if shots != "all" and known >= int(shots)]
    return PAPER_EPOCHS[min(enough, default=16)]


def schedule_of(settings: ScheduleSettings) -> str:
    """Return "paper", or a description of another schedule, to be printed in figures of such runs."""
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
