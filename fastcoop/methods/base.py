"""What a method is: settings that a grid can give, and a way to do many runs at once."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from fastcoop.checks import shortened
from fastcoop.errors import UserError, nearest
from fastcoop.methods.data import Data
from fastcoop.methods.scores import Scores
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:  # workers import this room without torch
    from fastcoop.backbones import Backbone
    from fastcoop.engine.state import State
    from fastcoop.prompts import PromptLayout


class MethodSettings(BaseModel):
    """Settings of one run. In a grid file, a list in place of a value makes a run of each.

    Numbers are finite; yes and no, which Python counts as 1 and 0, are no numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _names_each_once(cls, given: Any) -> Any:
        for one in cls.model_fields.values():
            aliases = getattr(one.validation_alias, "choices", ())
            named = [alias for alias in aliases if isinstance(given, Mapping) and alias in given]
            if len(named) > 1:
                raise ValueError(f"{' and '.join(map(str, named))} are the same setting; leave one of them")
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_flag(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a number or text, not yes or no")
        if isinstance(value, bytes):
            raise ValueError("expected a number or text, not bytes")
        return value

    def unused(self) -> Mapping[str, str | None]:
        """Settings that change nothing beside the others, and why; giving one is refused. None instead of a reason
        where only the backbone can tell."""
        return {}


S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one run came to.

    Attributes:
        scores: by name of the dataset, of all that ``RunSpec.tests`` has.
        losses: float32 (epochs,), mean training loss of each epoch; None where nothing was trained by steps.
        contexts: float32 (M, width) or (classes, M, width), of prompt learning.
        weights: arrays by name, of methods that learn something else and can be tested again by it.
        status: "done", or "diverged" where a loss was not finite.
        seconds: of work this run took, its share of what it did together with others.
        extra: further numbers, by name: the probe's C, "val_accuracy" in percent.
    """

    scores: dict[str, Scores]
    losses: np.ndarray | None = None
    contexts: np.ndarray | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    status: str = "done"
    seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


Done = Callable[[int, Outcome], None]


class Checkpoint(Protocol):
    """Where the state of one call of ``run`` is kept, so that a killed one goes on from there."""

    def load(self) -> State | None:
        """The state that was kept last; None where there is none that can be used."""

    def offer(self, get_state: Callable[[], State]) -> None:
        """Called after each step; keeps the state when it is time to."""


@dataclass(frozen=True)
class RunContext:
    """What a method may use for its runs.

    Attributes:
        jobs: processes to use at once; -1 for one per core.
        memory_budget: bytes that training may take at once; None for the engine's own choice.
        on_progress: told of work as it is done, in runs; fractions while long runs are under way.
        checkpoint: of runs that train together.
    """

    jobs: int = -1
    memory_budget: int | None = None
    on_progress: Callable[[float], None] = lambda runs: None
    checkpoint: Checkpoint | None = None


class Training(NamedTuple):
    """What a run asks of the engine: its prompts and its optimiser steps."""

    class_names: tuple[str, ...]
    layout: PromptLayout
    steps: int


class Method(ABC, Generic[S]):
    """A method that grid files can name.

    Class attributes:
        name: in grid files and results.
        Settings: the pydantic model of a run's settings.
        learns: whether runs learn from a few-shot subset, and so are crossed with shots and seeds.
        augments: whether they learn from augmented views of its images.
    """

    name: ClassVar[str]
    Settings: type[S]
    learns: ClassVar[bool] = True
    augments: ClassVar[bool] = True

    @abstractmethod
    def label(self, settings: S) -> str:
        """The name of a curve of such runs."""

    def check(self, run: RunSpec[S]) -> None:
        """Raise UserError where a run cannot be done. Asked of every run before the first one runs."""
        return

    def key_settings(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        """What of the settings determines this run's result, resolved: the part of the run's key that is the
        method's. Differently written settings that make the same run give the same, and so do runs that differ only
        in their seed and which images it drew."""
        return run.settings.model_dump(mode="json")

    def prompts(self, settings: S, data: Data) -> tuple[str, ...]:
        """Hand-written prompts, with "{}" for the class name, that the score of such a run on ``data`` depends on. They
        are recorded with the score, and where they have changed the run is tested again."""
        return ()

    def views(self, data: Data) -> int:
        """How many augmented views of an image a run learns from, where ``augments``."""
        return data.views

    def layout(self, settings: S, backbone: Backbone) -> PromptLayout | None:
        """The layout of prompts with learned vectors that class names go into; None where a run has none."""
        return None

    def columns(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        """Columns of the results table, beyond those that every run has: by name, what JSON can hold."""
        return {}

    def training(self, run: RunSpec[S], backbone: Backbone) -> Training | None:
        """What a run asks of the engine; None for methods whose runs do not train together there."""
        return None

    @abstractmethod
    def run(self, backbone: Backbone, runs: Sequence[RunSpec[S]], done: Done, context: RunContext) -> None:
        """Do all runs of one backbone; ``done(index, outcome)`` is called as each finishes.

        With no runs it only imports what it works with.
        """


def expand(method: Method[S], given: Mapping[str, Any] | None = None) -> list[S]:
    """All settings of a method that a grid's mapping stands for: lists are crossed, in the order written.

    Raises:
        UserError: an unknown setting, with the nearest valid one, or a value that the setting cannot take.
    """
    given = given or {}
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    for name, several in zip(given, values, strict=True):
        if not several:
            raise UserError(f"The setting {name} of method {method.name} is an empty list; give it a value.")
        if twice := [value for n, value in enumerate(several) if value in several[:n]]:
            raise UserError(
                f"The setting {name} of method {method.name} lists {shortened(twice[0])} twice; leave one."
            )
    return [_with_effect(method, dict(zip(given, row, strict=True))) for row in itertools.product(*values)]


def _with_effect(method: Method[S], given: Mapping[str, Any]) -> S:
    """Settings that were given, each of which has an effect."""
    settings = validate(method.Settings, given, f"method {method.name}")
    for name, reason in settings.unused().items():
        if name in settings.model_fields_set and reason is not None:
            raise SettingError(f"The settings of method {method.name} do not go together: {reason}.", ())
    return settings


class SettingError(UserError):
    """A setting that cannot be used, and its place in what was given: keys and indices from the top."""

    def __init__(self, message: str, place: tuple[Any, ...]):
        super().__init__(message)
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.place)


M = TypeVar("M", bound=BaseModel)


def _place(given: Any, location: Sequence[Any]) -> Iterator[str]:
    """Of pydantic's path to what is wrong the names that lead into ``given``, and the numbers of lists of mappings:
    other steps name parts of its types."""
    for step in location:
        inside = isinstance(given, Mapping) and step in given
        if inside or (isinstance(given, list | tuple) and isinstance(step, int) and step < len(given)):
            given = given[step]
            if isinstance(step, str) or isinstance(given, Mapping):
                yield str(step)


def validate(model: type[M], given: Mapping[str, Any], where: str) -> M:
    """``model`` of the given values. Raises UserError in one sentence, for the first thing that is wrong."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
        if not first["loc"]:  # of several settings together
            problem = first["msg"].removeprefix("Value error, ")
            raise SettingError(f"The settings of {where} do not go together: {problem}.", ()) from None
        path = ".".join(_place(given, first["loc"])) or str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), model.model_fields)
            raise SettingError(f'Unknown setting "{path}" of {where}.{hint}', first["loc"]) from None
        if first["type"] == "missing":
            raise SettingError(f'The setting "{path}" of {where} is missing; it must be given.', ()) from None
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[:1].lower() + problem[1:].partition(": value has")[0]
        message = f'The setting "{path}" of {where} cannot be {shortened(first["input"])}: {problem}.'
        raise SettingError(message, first["loc"]) from None
