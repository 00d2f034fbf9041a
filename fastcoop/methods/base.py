"""What a method is: settings that a grid can give, and a way to do many runs at once."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from fastcoop.checks import shortened
from fastcoop.errors import UserError, nearest
from fastcoop.methods.data import Data, matching_classes
from fastcoop.methods.scores import LinearClassifier, Scores, score
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:  # workers import this package without torch
    from fastcoop.backbones import Backbone
    from fastcoop.engine import RunShape
    from fastcoop.engine.training import State
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
    """The result of a run.

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
        on_progress: Called with the number of runs done since the last call; fractions during long runs.
        checkpoint: of runs that train together.
    """

    jobs: int = -1
    memory_budget: int | None = None
    on_progress: Callable[[float], None] = lambda runs: None
    checkpoint: Checkpoint | None = None


class Method(ABC, Generic[S]):
    """A method that grid files can name.

    A method that learns something in `learn` and classifies by it in `classifier` needs nothing else. Methods whose
    runs train together, or whose classifier is not linear, override `run`.

    Attributes:
        name: In grid files and results.
        Settings: The pydantic model of a run's settings.
        learns: Whether runs learn from a few-shot subset, and so are crossed with shots and seeds.
        augments: Whether they learn from augmented views of its images.
        needs_backbone: Whether runs use the backbone for more than text features of hand-written prompts.
    """

    name: ClassVar[str]
    Settings: type[S]
    learns: ClassVar[bool] = True
    augments: ClassVar[bool] = True
    needs_backbone: ClassVar[bool] = True

    @abstractmethod
    def label(self, settings: S) -> str:
        """Return the name of such runs in lists and progress lines.

        Figures and tables use ``name`` and the settings that differ from the most frequent ones.
        """

    def learn(self, backbone: Backbone, run: RunSpec[S]) -> Outcome:
        """Learn from ``run.subset``. Return an outcome without scores."""
        raise NotImplementedError

    def classifier(self, backbone: Backbone, run: RunSpec[S], data: Data) -> LinearClassifier:
        """Return the classifier of ``data``'s classes by ``run.contexts`` or ``run.weights``."""
        raise NotImplementedError

    def run(self, backbone: Backbone, runs: Sequence[RunSpec[S]], done: Done, context: RunContext) -> None:
        """Do runs that share a backbone, and call ``done(index, outcome)`` as each finishes.

        An empty list only imports what the method needs.
        """
        for index, run in enumerate(runs):
            start = time.perf_counter()
            learned = self.learn(backbone, run) if self.learns and not run.has_learned else Outcome({})
            scores = self.scores(backbone, run, run if run.has_learned else learned)
            seconds = 0.0 if self.learns and run.has_learned else time.perf_counter() - start
            done(index, replace(learned, scores=scores, seconds=seconds))
            context.on_progress(1.0)

    def scores(self, backbone: Backbone, run: RunSpec[S], learned: RunSpec[S] | Outcome) -> dict[str, Scores]:
        """Test what a run learned on each of ``run.tests``."""
        known = replace(run, contexts=learned.contexts, weights=learned.weights)
        scores = {}
        for data in run.tests:
            classifier = self.classifier(backbone, known, data)
            images = data.unit_test if classifier.unit_length else data.test[0]
            scores[data.name] = score(classifier.logits(images), data.test[1])
        return scores

    def check(self, run: RunSpec[S]) -> None:
        """Raise UserError for a run that cannot be done. Called for every run before the first one starts."""
        choice = None if run.has_learned else self.validation_choice(run.settings)
        if choice and (run.subset is None or not len(run.subset.val)):
            what, instead = choice
            raise UserError(
                f"{run.data.name} has no validation images, which choose {what}; give it a val split, or {instead}."
            )
        if self.is_class_specific(run.settings):
            for target in run.targets:
                matching_classes(run.data, target)

    def validation_choice(self, settings: S) -> tuple[str, str] | None:
        """Return what such runs choose on validation images, and what to do without any; None if nothing."""
        return None

    def is_class_specific(self, settings: S) -> bool:
        """Return whether what such runs learn belongs to the classes that they learned from."""
        return False

    def key_settings(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        """Return the settings that affect the result, with defaults resolved; hashed into the run key.

        Settings that are written differently but make the same run are equal here. Seed and few-shot subset are not
        part of them. Hand-written prompts are, since what a run learns may depend on them.
        """
        prompts = self.prompts(run.settings, run.data)
        return run.settings.model_dump(mode="json") | ({"prompts": list(prompts)} if prompts else {})

    def prompts(self, settings: S, data: Data) -> tuple[str, ...]:
        """Return the hand-written prompts, with "{}" for the class name, that the scores on ``data`` depend on.

        They are recorded with the scores. A run is tested again if they have changed.
        """
        return ()

    def views(self, data: Data) -> int:
        """Return the number of augmented views per image that a run learns from, if the method ``augments``."""
        return data.views

    def layout(self, settings: S, backbone: Backbone) -> PromptLayout | None:
        """Return the layout of learned prompts; None if such runs have none."""
        return None

    def columns(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        """Return additional columns of the results table: names, and values that JSON can hold."""
        return {}

    def run_shape(self, run: RunSpec[S], backbone: Backbone) -> RunShape | None:
        """Return the sizes of a run that trains in the engine, beside others; None for methods that do not."""
        return None


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
    return [make_settings(method, dict(zip(given, row, strict=True))) for row in itertools.product(*values)]


def make_settings(method: Method[S], given: Mapping[str, Any]) -> S:
    """Return settings of a method. Raises UserError for a given one that has no effect beside the others."""
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
