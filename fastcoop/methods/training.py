"""Runs that learn context vectors and train together: runs whose methods name equal trainers share a batch.

CoOp, KgCoOp and ProGrad train in the engine; TCP and CoCoOp by `methods.prompt_nets`. Each run has the result that it
has alone.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fastcoop import engine, prompts
from fastcoop.errors import UserError
from fastcoop.memo import memoize
from fastcoop.methods.base import Done, Outcome, RunContext
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, State, fresh_state, torch
from fastcoop.methods.schedule import ScheduledMethod, ScheduleSettings, epochs_of, steps_per_epoch
from fastcoop.methods.spec import RunSpec
from fastcoop.prompts.layout import PromptLayout, word_tokens

if TYPE_CHECKING:
    from fastcoop.methods.prompt_nets import PromptNetTrainer


@dataclass(frozen=True)
class EngineTrainer:
    """Trains context vectors in the engine.

    A trainer has `costs`, which returns the work of each training in the unit of ``on_progress``, and `train`, with the
    arguments of `fastcoop.engine.train`. States have its names for steps and for runs.

    Attributes:
        precision: Of the text tower.
        gradients: Of a step, as `Objective.parts`. Each goes back through all rows of a forest, so that runs with one
            gradient are faster without those that have two.
    """

    precision: str = "float32"
    gradients: int = 1

    def costs(self, backbone: Backbone, trainings: Sequence[Any]) -> list[float]:
        plan = engine.plan_training(backbone, [one.shape for one in trainings])
        return [cost.row_steps for cost in plan.runs]

    def train(self, backbone: Backbone, trainings: Sequence[Any], **options: Any) -> None:
        known: dict[str, Any] = {"float32": None, "bfloat16": torch.bfloat16}
        engine.train(backbone, trainings, precision=known.get(self.precision, self.precision), **options)


T = TypeVar("T", bound=ScheduleSettings)


class TrainedMethod(ScheduledMethod[T]):
    """A method that learns context vectors. Its runs train together, also with those of other such methods.

    Its settings have ``context_length``, ``init`` and ``learning_rate``, and the property ``words``: the words of
    ``init``, or None for random vectors.

    Attributes:
        tested_at_once: Runs that have learned and are tested together at most.
    """

    tested_at_once: ClassVar[int] = 64

    @abstractmethod
    def layout(self, settings: T, backbone: Backbone, data: Data) -> PromptLayout:
        """Return the layout of the prompts of ``data``'s classes."""

    def check(self, run: RunSpec[T]) -> None:
        super().check(run)
        settings: Any = run.settings
        length, given = self.layout(settings, run.model, run.data).context_length, settings.context_length
        is_given = "context_length" in settings.model_fields_set and not run.has_learned
        if is_given and settings.words and given != length:
            raise UserError(
                f'The words "{settings.words}" are {length} tokens, so the context of {self.name} has {length} vectors '
                f"and the context_length of {given} is not used: leave it out, or move it to an entry of {self.name} "
                "with init: random."
            )

    def key_settings(self, run: RunSpec[T], backbone: Backbone) -> dict[str, Any]:
        length = self.layout(run.settings, backbone, run.data).context_length
        return super().key_settings(run, backbone) | {"context_length": length}

    def columns(self, run: RunSpec[T], backbone: Backbone) -> dict[str, Any]:
        settings: Any = run.settings
        length = self.layout(settings, backbone, run.data).context_length
        return super().columns(run, backbone) | {"context_length": length, "init": settings.init}

    def run_shape(self, run: RunSpec[T], backbone: Backbone) -> engine.RunShape:
        settings, images, views = run.settings, len(run.subset.train), max(1, run.data.views)
        layout, is_fast = self.layout(settings, backbone, run.data), settings.fast is not None
        size = images * views if is_fast else settings.batch_size
        steps, features = epochs_of(run) * steps_per_epoch(run), (run.dataset, run.shots, run.seed)
        return engine.RunShape(run.data.class_names, layout, steps, images, views, size, features, is_fast)

    def engine_run(self, backbone: Backbone, run: RunSpec[T]) -> Any:
        """Return the engine's form of a run of cross-entropy by SGD, which learns from `Data.train_views`."""
        settings: Any = run.settings
        layout, names = self.layout(settings, backbone, run.data), run.data.class_names
        contexts = prompts.initial_contexts(backbone, layout, len(names), run.seed, settings.words)
        features, labels = map(torch.from_numpy, run.data.train_views(run.subset))
        return engine.Run(
            names, layout, contexts, features, labels, epochs_of(run), run.seed, settings.batch_size,
            settings.learning_rate,
        )  # fmt: skip

    @abstractmethod
    def trainer(self, settings: T) -> EngineTrainer | PromptNetTrainer:
        """Return what trains such runs."""

    @abstractmethod
    def training(self, backbone: Backbone, run: RunSpec[T]) -> Any:
        """Return the trainer's form of a run."""

    @abstractmethod
    def learned(self, backbone: Backbone, run: RunSpec[T], trained: Any) -> Outcome:
        """Return the outcome of a run, without scores, from the trainer's result."""

    def run(self, backbone: Backbone, runs: Sequence[RunSpec[Any]], done: Done, context: RunContext) -> None:
        """Do runs of any methods of this kind."""
        from fastcoop.methods import METHODS

        methods: list[Any] = [self if run.method == self.name else METHODS[run.method] for run in runs]

        def test(
            ended: Mapping[int, Outcome], on_tested: Callable[[float], None] = lambda runs: None
        ) -> None:
            """Test and report runs that have learned."""
            for method in dict.fromkeys(methods[index] for index in ended):
                own = [index for index in ended if methods[index] is method]
                for start in range(0, len(own), method.tested_at_once):
                    some = own[start : start + method.tested_at_once]
                    outcomes = [ended[index] for index in some]
                    before = time.perf_counter()
                    found = method.scores_of(backbone, [runs[index] for index in some], outcomes)
                    share = (time.perf_counter() - before) / len(some)
                    for index, outcome, scores in zip(some, outcomes, found, strict=True):
                        seconds = outcome.seconds and outcome.seconds + share  # 0: only tested, or unknown
                        done(index, replace(outcome, scores=scores, seconds=seconds))
                        on_tested(1.0)

        test({n: Outcome({}) for n, run in enumerate(runs) if run.has_learned}, context.on_progress)

        def learned(index: int, trained: Any) -> Outcome:
            return methods[index].learned(backbone, runs[index], trained)

        groups: dict[EngineTrainer | PromptNetTrainer, dict[int, Any]] = {}
        with fresh_state():
            for index, (method, run) in enumerate(zip(methods, runs, strict=True)):
                if not run.has_learned:
                    training = method.training(backbone, run)
                    groups.setdefault(method.trainer(run.settings), {})[index] = training
            if len(groups) > 1:  # a checkpoint holds one training
                context = replace(context, checkpoint=None)
            for trainer, trainings in groups.items():
                _train(backbone, trainer, trainings, learned, test, context)


def _train(
    backbone: Backbone,
    trainer: EngineTrainer | PromptNetTrainer,
    trainings: Mapping[int, Any],
    learned: Callable[[int, Any], Outcome],
    test: Callable[[Mapping[int, Outcome]], None],
    context: RunContext,
) -> None:
    """Train runs of one trainer, by their index, and test those that end in one step together."""
    indices, given = [*trainings], [*trainings.values()]
    costs = trainer.costs(backbone, given)
    worked, start, ended = 0.0, time.perf_counter(), dict[int, Outcome]()
    checkpoint = context.checkpoint

    def on_progress(cost: float) -> None:
        nonlocal worked
        worked += cost
        context.on_progress(cost * len(costs) / sum(costs))

    def on_done(number: int, trained: Any) -> None:
        # A run that ended before the training was resumed has no known time.
        seconds = costs[number] * (time.perf_counter() - start) / worked if worked else 0.0
        ended[indices[number]] = replace(learned(indices[number], trained), seconds=seconds)

    def report() -> None:
        nonlocal start
        before = time.perf_counter()
        test(ended)
        ended.clear()
        start += time.perf_counter() - before  # no time of the runs that still train

    def on_step(get_state: Callable[[], State]) -> None:
        report()
        if checkpoint:
            checkpoint.offer(get_state)

    state = (checkpoint.load() if checkpoint else None) or {}
    shares = engine.runs.shares_done(state, given)
    if before := sum(cost * share for cost, share in zip(costs, shares, strict=True)):
        context.on_resume(before * len(costs) / sum(costs))
    trainer.train(
        backbone, given, memory_budget=context.memory_budget, on_done=on_done, on_progress=on_progress, state=state,
        on_step=on_step,
    )  # fmt: skip
    report()


def vectors(settings: Any, backbone: Backbone) -> int:
    """Return M, the number of context vectors: one per token of the words that they start from."""
    return len(tokens_of(backbone, settings.words)) if settings.words else settings.context_length


@memoize(256)
def tokens_of(backbone: Backbone, words: str) -> list[int]:
    """Return the token ids of words, without start and end. Raises UserError if there are none."""
    return word_tokens(backbone, words)
