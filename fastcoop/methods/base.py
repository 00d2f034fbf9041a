"""What a method is: settings that a grid can give, and a way to do many runs at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from fastcoop import engine
from fastcoop.checks import shortened
from fastcoop.errors import UserError, nearest
from fastcoop.methods.data import Data, matching_classes
from fastcoop.methods.late import Backbone, State
from fastcoop.methods.scores import Classifier, Scores, score_all
from fastcoop.methods.spec import RunSpec
from fastcoop.prompts.layout import PromptLayout

if TYPE_CHECKING:
    from fastcoop.methods.prompt_nets import PromptNetTrainer
    from fastcoop.methods.training import EngineTrainer


class MethodSettings(BaseModel):
    """Settings of one run. A list in place of a value in a grid file makes a run of each.

    Numbers must be finite. Yes and no are not numbers, although Python counts them as 1 and 0.

    Attributes:
        added_later: Settings that the first version did not have. They are in a run's key only if they are not the
            default, so that older runs keep their keys.
    """

    added_later: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_flag(cls, value: Any, info: ValidationInfo) -> Any:
        flag = isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool
        if flag or isinstance(value, bytes):
            raise ValueError(f"expected a number or text, not {'yes or no' if flag else 'bytes'}")
        return value

    def unused(self) -> Mapping[str, str | None]:
        """Return the settings that have no effect beside the others, and why. Giving such a setting is refused.

        A reason of None means that only the backbone can tell.
        """
        return {}

    def for_key(self) -> dict[str, Any]:
        """Return the settings that are in a run's key, as JSON has them."""
        fields = type(self).model_fields
        unchanged = {name for name in self.added_later if getattr(self, name) == fields[name].get_default()}
        return self.model_dump(mode="json", exclude=unchanged)


S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a run.

    Attributes:
        scores: Scores on each of ``RunSpec.tests``, by dataset name.
        losses: float32 (epochs,), mean training loss of each epoch; None for methods that do not train by steps.
        contexts: float32 (M, width) or (classes, M, width), learned context vectors; None for other methods.
        weights: Arrays by name, of methods that learn something else that can be tested again.
        status: "done", or "diverged" if a loss was not finite.
        seconds: Time of this run, or its share of the time of runs that train together.
        extra: Further numbers, by name, such as "c" of the probe, or "val_accuracy" in percent.
    """

    scores: dict[str, Scores]
    losses: np.ndarray | None = None
    contexts: np.ndarray | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    status: str = "done"
    seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @classmethod
    def learned(
        cls, losses: np.ndarray | None, *, scores: Mapping[str, Scores] | None = None, **others: Any
    ) -> Outcome:
        """Return the outcome of a run that has diverged if a loss or a weight is not finite."""
        outcome = cls(dict(scores or {}), losses, **others)
        numbers = [*outcome.weights.values(), *([] if losses is None else [losses])]
        finite = all(np.isfinite(one).all() for one in numbers)
        return outcome if finite else replace(outcome, status="diverged")


Done = Callable[[int, Outcome], None]


class Checkpoint(Protocol):
    """Keeps the state of one call of ``Method.run``, so that it can be resumed after its process died."""

    def load(self) -> State | None:
        """Return the last state; None if there is none that can be used."""

    def offer(self, get_state: Callable[[], State]) -> None:
        """Keep the state if it is time to. Called after each step."""


@dataclass(frozen=True)
class RunContext:
    """What a method may use for its runs.

    Attributes:
        memory_budget: Bytes that training may use at once; None for the engine's own choice.
        on_progress: Called with the number of runs done since the last call; with fractions during long runs.
        checkpoint: Checkpoint of runs that train together; None for none.
        on_resume: Called with the work that a checkpoint has, as ``on_progress``.
    """

    memory_budget: int | None = None
    on_progress: Callable[[float], None] = lambda runs: None
    checkpoint: Checkpoint | None = None
    on_resume: Callable[[float], None] = lambda runs: None


_on_share: ContextVar[Callable[[float], None]] = ContextVar("_on_share", default=lambda share: None)


def report_share(share: float) -> None:
    """Report that this share of the work in `sharing` is done, such as from `Method.learn`."""
    _on_share.get()(share)


@contextmanager
def sharing(on_progress: Callable[[float], None], runs: float = 1.0) -> Iterator[None]:
    """Report the work of runs to ``on_progress``: in the block what `report_share` receives, and then the rest."""
    reported = 0.0

    def on_share(share: float) -> None:
        nonlocal reported
        share = min(share, 1.0 - reported)
        reported += share
        on_progress(share * runs)

    token = _on_share.set(on_share)
    try:
        yield
    finally:
        _on_share.reset(token)
    on_progress((1.0 - reported) * runs)


class Method(Generic[S]):
    """A method that grid files can name.

    Most methods only define `learn` and `classifier`. A method whose runs train together overrides `run`, or is a
    `methods.training.TrainedMethod`.

    Attributes:
        name: Name in grid files and results.
        title: Name in lists, if it is not ``name`` with spaces.
        Settings: The pydantic model of a run's settings.
        learns: Whether runs learn from a few-shot subset, and so are crossed with shots and seeds.
        augments: Whether they learn from augmented views of its images.
        kinds: Kinds of training features that they read, as `cache_features` takes them.
        needs_backbone: Whether runs use the backbone for more than text features of hand-written prompts.
        needs_causal_tower: Whether runs compute prompts by the parts of a causal text tower.
        reads_prompt: Whether runs use the text features of each dataset's own prompt, such as ``class_texts``.
        text_length_matters: Whether what runs learn depends on the length of these text features, as the tower gives
            them.
        runs_together: Whether `run` learns runs of one dataset in one batch of tensors.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    Settings: type[S]
    learns: ClassVar[bool] = True
    augments: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("coop",)
    needs_backbone: ClassVar[bool] = True
    needs_causal_tower: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = False
    text_length_matters: ClassVar[bool] = False
    runs_together: ClassVar[bool] = False

    def label(self, settings: S) -> str:
        """Return the name of such runs in lists and progress lines: here, with the settings that are not the default.

        Figures and tables use ``name`` and the settings that differ from the most frequent ones.
        """
        changed = settings.model_dump(exclude_defaults=True).items()
        title = self.title or self.name.replace("_", " ").capitalize()
        return f"{title} ({', '.join(f'{name} {value}' for name, value in changed)})" if changed else title

    def learn(self, backbone: Backbone, run: RunSpec[S]) -> Outcome:
        """Learn from ``run.subset``. Return what was learned; scores only if no `classifier` can give them."""
        raise NotImplementedError

    def classifier(self, backbone: Backbone, run: RunSpec[S], data: Data) -> Classifier:
        """Return the classifier of ``data``'s classes that ``run.contexts`` or ``run.weights`` give."""
        raise NotImplementedError

    def run(self, backbone: Backbone, runs: Sequence[RunSpec[S]], done: Done, context: RunContext) -> None:
        """Do runs that share a backbone, and call ``done(index, outcome)`` when each finishes.

        An empty list only imports what the method needs.
        """
        for index, run in enumerate(runs):
            start = time.perf_counter()
            with sharing(context.on_progress):
                outcome = self.learn(backbone, run) if self.learns and not run.has_learned else Outcome({})
                scores = outcome.scores or self.scores_of(backbone, [run], [outcome])[0]
                seconds = 0.0 if self.learns and run.has_learned else time.perf_counter() - start
                done(index, replace(outcome, scores=scores, seconds=seconds))

    def classifiers(
        self, backbone: Backbone, tests: Sequence[tuple[RunSpec[S], Data]]
    ) -> Sequence[Classifier]:
        """Return the `classifier` of each run and dataset. Methods that compute many at once override it."""
        return [self.classifier(backbone, run, data) for run, data in tests]

    def scores_of(
        self, backbone: Backbone, runs: Sequence[RunSpec[S]], learned: Sequence[Outcome]
    ) -> list[dict[str, Scores]]:
        """Test runs on each of ``RunSpec.tests``, by what they have learned before or else by ``learned``.

        Each has the scores that it has alone.
        """
        known = [
            run if run.has_learned else replace(run, contexts=one.contexts, weights=one.weights)
            for run, one in zip(runs, learned, strict=True)
        ]
        tests = [(n, data) for n, run in enumerate(runs) for data in run.tests]
        classifiers = self.classifiers(backbone, [(known[n], data) for n, data in tests])
        groups: dict[tuple[Data, bool], list[tuple[int, Classifier]]] = {}
        for (n, data), one in zip(tests, classifiers, strict=True):
            groups.setdefault((data, one.unit_length), []).append((n, one))
        scores: list[dict[str, Scores]] = [{} for _ in runs]
        for (data, unit_length), group in groups.items():
            places, of_data = zip(*group, strict=True)
            raw = data.test_before if "pre" in self.kinds else data.test[0]
            images, classes = data.unit_test if unit_length else raw, len(data.class_names)
            found = score_all(of_data, images, data.test[1], classes, backbone.device)
            for n, of_run in zip(places, found, strict=True):
                scores[n][data.name] = of_run
        return scores

    def check(self, run: RunSpec[S]) -> None:
        """Raise UserError for a run that cannot be done. Called for every run before the first one starts.

        ``run.model`` is the backbone, whose weights may not be loaded yet: use its sizes and its tokenizer.
        """
        choice = None if run.has_learned else self.validation_choice(run.settings)
        if choice:
            what, instead = choice
            drawn = run.subset.val if run.subset else None
            if drawn is None or not len(drawn):
                raise UserError(
                    f"{run.data.name} has no validation images, which choose {what}; give it a val split, or {instead}."
                )
            if not len(run.data.readable("val", drawn)):
                raise UserError(
                    f"None of the validation images of {run.data.name} that {run.shots} shots and seed {run.seed} draw "
                    f"could be read, which choose {what}; repair them and run `fastcoop cache-features`, or {instead}."
                )
        if self.is_class_specific(run.settings):
            for target in run.targets:
                matching_classes(run.data, target)

    def notes(self, runs: Sequence[RunSpec[S]]) -> Iterator[str]:
        """Yield sentences to log before a sweep of these runs, at least one, such as on what they cost."""
        return iter(())

    def validation_choice(self, settings: S) -> tuple[str, str] | None:
        """Return what such runs choose on validation images, and what to do without any; None if nothing."""
        return None

    def tuned_on(self, settings: S) -> str | None:
        """Return the name of the dataset, if it is another, that such runs learn first and choose values on."""
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
        return run.settings.for_key() | ({"prompts": list(prompts)} if prompts else {})

    def read_draw(self, run: RunSpec[S]) -> np.ndarray | None:
        """Return the training rows of another dataset that a run learns from first, if a file gives them; or None.

        They are part of the key. A subset that is drawn is not: it follows from the dataset, the shots and the seed.
        """
        return None

    def prompts(self, settings: S, data: Data) -> tuple[str, ...]:
        """Return the hand-written prompts, with "{}" for the class name, that the scores on ``data`` depend on.

        They are recorded with the scores. A run is tested again if they have changed.
        """
        return (data.dataset.template,) if self.reads_prompt else ()

    def views(self, data: Data) -> int:
        """Return the number of augmented views per image that a run learns from, if the method ``augments``."""
        return data.views

    def layout(self, settings: S, backbone: Backbone, data: Data) -> PromptLayout | None:
        """Return the layout of learned prompts of ``data``'s classes; None if such runs have none."""
        return None

    def columns(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        """Return additional columns of the results table: names, and values that JSON can hold."""
        return {}

    def trainer(self, settings: S) -> EngineTrainer | PromptNetTrainer | None:
        """Return what trains such runs, together with those of equal trainers; None for other methods."""
        return None

    def run_shape(self, run: RunSpec[S], backbone: Backbone) -> engine.RunShape | None:
        """Return the sizes of a run that has a `trainer`; None for other methods."""
        return None


def hidden_units(inputs: int, reduction: int) -> int:
    """Return the size of a network's hidden layer. Raises UserError for a reduction that leaves no unit."""
    if reduction > inputs:
        raise UserError(
            f"Expected a reduction of at most {inputs}, the size of a feature, got {reduction}; give a smaller number."
        )
    return inputs // reduction


def expand(method: Method[S], given: Mapping[str, Any] | None = None) -> list[S]:
    """Return the settings of a method that a grid's mapping stands for: lists are crossed, in the order written.

    Raises:
        UserError: A setting is unknown, cannot have its value, or has no effect beside the others.
    """
    lists = {name: value if isinstance(value, list) else [value] for name, value in (given or {}).items()}
    for name, several in lists.items():
        setting = f"The setting {name} of method {method.name}"
        if not several:
            raise UserError(f"{setting} is an empty list; give it a value.")
        if twice := [value for n, value in enumerate(several) if value in several[:n]]:
            raise UserError(f"{setting} lists {shortened(twice[0])} twice; leave one.")
    return [
        make_settings(method, dict(zip(lists, row, strict=True)))
        for row in itertools.product(*lists.values())
    ]


def make_settings(method: Method[S], given: Mapping[str, Any]) -> S:
    """Return settings of a method, with the errors of `expand`."""
    settings = validate(method.Settings, given, f"method {method.name}")
    for name, reason in settings.unused().items():
        if name in settings.model_fields_set and reason is not None:
            raise SettingError(f"The settings of method {method.name} do not go together: {reason}.", ())
    return settings


class SettingError(UserError):
    """A setting that cannot be used, and its place in what was given: keys and indices from the top."""

    def __init__(self, message: str, place: tuple[Any, ...]):
        super().__init__(message, place)
        self.place = place

    def __str__(self) -> str:
        return str(self.args[0])


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], given: Mapping[str, Any], where: str) -> M:
    """Return the model of some values. Raises SettingError, with one sentence on the first problem."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
        problem, place = first["msg"].removeprefix("Value error, ").rstrip("."), first["loc"]
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, SettingError):  # raised by a validator, about a value inside
            raise SettingError(str(inner), (*place, *inner.place)) from None
        name = ".".join(_names(given, place)) or "".join(map(str, place[:1]))
        if not place:  # of several settings together
            message = f"The settings of {where} do not go together: {problem}."
        elif first["type"] == "extra_forbidden":
            message = f'Unknown setting "{name}" of {where}.{nearest(str(place[-1]), model.model_fields)}'
        elif first["type"] == "missing":
            message = f'The setting "{name}" of {where} is missing; it must be given.'
        else:
            problem = problem[:1].lower() + problem[1:].partition(": value has")[0]
            message = f'The setting "{name}" of {where} cannot be {shortened(first["input"])}: {problem}.'
        raise SettingError(message, place) from None


def _names(given: Any, path: Sequence[Any]) -> Iterator[str]:
    """Yield the keys, and indices of mappings in lists, along pydantic's path, which also names parts of its types."""
    for step in path:
        inside = isinstance(given, Mapping) and step in given
        if inside or (isinstance(given, list | tuple) and isinstance(step, int) and step < len(given)):
            given = given[step]
            if isinstance(step, str) or isinstance(given, Mapping):
                yield str(step)
