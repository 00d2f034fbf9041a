"""The length of a training: the paper's epochs (section 4.1), or others, which figures then state."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator

from fastcoop import engine
from fastcoop.checks import LARGEST, LARGEST_BATCH, LONGEST
from fastcoop.errors import UserError
from fastcoop.methods.base import Method, MethodSettings
from fastcoop.methods.late import Backbone, torch
from fastcoop.methods.spec import RunSpec

PAPER_EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}
PAPER_EPOCHS_IMAGENET = 50
FEWEST_EPOCHS = 4  # of a schedule given in steps: one of warm-up and three of the cosine
STEPS = re.compile(r"[1-9][0-9]{0,6} steps")
ROOT_STEPS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4})? sqrt\(shots\)")


def _fits_float32(number: float) -> float:
    with np.errstate(over="ignore"):
        if number and not 0 < np.float32(number) < np.inf:
            raise ValueError("expected a number that float32 holds, such as 0.002")
    return number


Positive = Annotated[int, Field(ge=1, le=LARGEST)]
BatchSize = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]
EpochNumber = Annotated[int, Field(ge=1, le=LONGEST)]
Coefficient = Annotated[float, Field(ge=0), AfterValidator(_fits_float32)]
LearningRate = Annotated[float, Field(gt=0), AfterValidator(_fits_float32)]


class FastSettings(MethodSettings):
    """Settings of a fast schedule (docs/fast.md): all views of all images in each of few steps.

    Attributes:
        steps: A number, or "C sqrt(shots)", rounded. With "all" shots it is the mean number of images per class.
        learning_rate: Root mean square of the first step's change of the contexts; it falls linearly to zero.
        ridge: Added to the average G'G of gradients G, with a diagonal of mean 1, before its inverse root.
    """

    steps: EpochNumber | str = "15 sqrt(shots)"
    learning_rate: LearningRate = 0.006
    ridge: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.03

    @field_validator("steps")
    @classmethod
    def _is_number_or_root(cls, steps: int | str) -> int | str:
        if isinstance(steps, str) and not ROOT_STEPS.fullmatch(steps):
            raise ValueError('expected a number of steps, or one like "15 sqrt(shots)"')
        return steps

    def steps_of(self, run: RunSpec[Any]) -> int:
        """Return the steps of a run."""
        if isinstance(self.steps, int):
            return self.steps
        return max(1, round(float(self.steps.split()[0]) * shots_per_class(run) ** 0.5))

    @property
    def label(self) -> str:
        """Its name, or the settings that are not the default, to be printed in figures of such runs."""
        names = [name for name, named in FAST.items() if named == self]
        changed = self.model_dump(exclude_defaults=True).items()
        return names[0] if names else f"fast: {', '.join(f'{name} {value}' for name, value in changed)}"


FAST = {"fast": FastSettings(), "fast-half": FastSettings(steps="8 sqrt(shots)")}
Schedule = Annotated[  # by tags, so that an error names the part that is wrong
    Annotated[Literal["paper", "fast", "fast-half"], Tag("named")] | Annotated[FastSettings, Tag("given")],
    Discriminator(lambda value: "named" if isinstance(value, str) else "given"),
]


class ScheduleSettings(MethodSettings):
    """Settings of methods that train by steps.

    Attributes:
        epochs: "paper" (the method's official number; CoOp's is 200 for 16 and 8 shots, 100 for 4 and 2, 50 for 1; 50
            on ImageNet), a number, "N steps" (the epochs closest to N optimizer steps, at least 4), or a mapping from
            shots to numbers or "N steps".
        batch_size: Images of a step.
    """

    epochs: EpochNumber | dict[Positive | Literal["all"], EpochNumber | str] | str = "paper"
    batch_size: BatchSize = 32

    @field_validator("epochs", mode="before")
    @classmethod
    def _names_shots_once(cls, epochs: Any) -> Any:
        if isinstance(epochs, dict):
            if any(isinstance(one, bool | bytes) for pair in epochs.items() for one in pair):
                raise ValueError("expected whole numbers, not yes or no")
            names = Counter(map(str, epochs)).most_common(1) or [("no", 0)]
            if names[0][1] != 1:
                raise ValueError(f"it names {names[0][0]} shots{' twice' * bool(epochs)}")
        return epochs

    @field_validator("epochs")
    @classmethod
    def _is_schedule(cls, epochs: Any) -> Any:
        by_shots = isinstance(epochs, dict)
        for value in epochs.values() if by_shots else [epochs]:
            if isinstance(value, int) or (value == "paper" and not by_shots):
                continue
            if not STEPS.fullmatch(value):
                kinds = 'a number, "N steps", or a mapping from shots to numbers or "N steps"'
                raise ValueError(f'expected "paper", {kinds}')
            if int(value.split()[0]) > LONGEST:
                raise ValueError(f"expected at most {LONGEST} steps")
        return epochs

    def paper_epochs(self, dataset: str, shots: int | str) -> int:
        """Return the method's official number of epochs, which "paper" stands for: CoOp's, unless overridden."""
        return paper_epochs(dataset, shots)

    @property
    def fast(self) -> FastSettings | None:
        """The fast schedule; None for epochs of batches."""
        return None

    @property
    def schedule_label(self) -> str:
        """ "paper", or a description of another schedule, to be printed in figures of such runs."""
        epochs = self.epochs
        if isinstance(epochs, dict) and all(isinstance(n, str) for n in epochs.values()):
            steps = "/".join(str(n).split()[0] for n in epochs.values())
            return f"quick: {steps} steps at {'/'.join(map(str, epochs))} shots"
        if isinstance(epochs, dict):
            return f"quick: epochs {', '.join(f'{n} at {shots}' for shots, n in epochs.items())} shots"
        return "paper" if epochs == "paper" else f"quick: {epochs}{' epochs' * isinstance(epochs, int)}"


T = TypeVar("T", bound=ScheduleSettings)


class ScheduledMethod(Method[T]):
    """A method that trains by steps. Its epochs are in the key and in the results, and so are its views in the key."""

    def key_settings(self, run: RunSpec[T], backbone: Backbone) -> dict[str, Any]:
        resolved = {"epochs": epochs_of(run), "views": run.data.views}
        prompt = {"prompt": run.data.dataset.template} if self.reads_prompt else {}
        return run.settings.for_key() | resolved | prompt

    def columns(self, run: RunSpec[T], backbone: Backbone) -> dict[str, Any]:
        return {"epochs": epochs_of(run), "schedule": run.settings.schedule_label}


def sgd(parameters: Any) -> torch.optim.SGD:
    """Return CoOp's optimizer. Its learning rate is set before each step."""
    of = engine.optimizers
    return torch.optim.SGD(parameters, lr=0.0, momentum=of.MOMENTUM, weight_decay=of.WEIGHT_DECAY)


def epoch_order(images: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the batches of an epoch, as indices in random order.

    The last, short batch is dropped unless it is the only one.
    """
    order = rng.permutation(images)
    return [order[at : at + batch_size] for at in range(0, max(images - batch_size, 0) + 1, batch_size)]


def steps_per_epoch(run: RunSpec[Any]) -> int:
    """Return the optimizer steps of one epoch of a run over its readable images: one in a fast schedule."""
    if run.settings.fast:
        return 1
    images = len(run.data.readable("train", run.subset.train))
    return engine.schedule.steps_per_epoch(images, run.settings.batch_size)


def steps_of(run: RunSpec[Any]) -> int:
    """Return the optimizer steps of a run; 0 for methods without a schedule and for runs that have learned."""
    scheduled = isinstance(run.settings, ScheduleSettings) and run.subset is not None and not run.has_learned
    return epochs_of(run) * steps_per_epoch(run) if scheduled else 0


def shots_per_class(run: RunSpec[Any]) -> float:
    """Return the shots of a run; for "all" shots the mean number of readable training images per class."""
    if isinstance(run.shots, int):
        return run.shots
    return len(run.data.readable("train", run.subset.train)) / len(run.data.class_names)


def epochs_of(run: RunSpec[Any]) -> int:
    """Return the epochs of a run's schedule. Raises UserError if a schedule by shots does not have the run's."""
    epochs, shots = run.settings.epochs, run.shots
    if run.settings.fast:
        return run.settings.fast.steps_of(run)
    if isinstance(epochs, dict):
        if shots not in epochs:
            given = ", ".join(map(str, epochs))
            raise UserError(f"The epochs are given for {given} shots, not for {shots}; add them.")
        epochs = epochs[shots]
    if isinstance(epochs, int):
        return epochs
    if epochs == "paper":
        return run.settings.paper_epochs(run.data.name, shots)
    return max(FEWEST_EPOCHS, round(int(epochs.split()[0]) / steps_per_epoch(run)))


def paper_epochs(dataset: str, shots: int | str) -> int:
    """Return the official number of epochs. Shots that the paper does not have use those of its next number."""
    if dataset.partition(":")[0] == "imagenet":
        return PAPER_EPOCHS_IMAGENET
    enough = [known for known in PAPER_EPOCHS if shots != "all" and known >= int(shots)]
    return PAPER_EPOCHS[min(enough, default=16)]
