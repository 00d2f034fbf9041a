"""CoOp: context vectors learned through the frozen text tower (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from fastcoop import engine
from fastcoop.errors import UserError
from fastcoop.memo import memoize
from fastcoop.methods.base import Outcome
from fastcoop.methods.data import Data, matching_classes
from fastcoop.methods.late import Backbone, torch
from fastcoop.methods.schedule import (
    FAST,
    FastSettings,
    LearningRate,
    Positive,
    Schedule,
    ScheduleSettings,
    epochs_of,
    shots_per_class,
)
from fastcoop.methods.scores import LinearClassifier, accuracy, unit
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import class_texts
from fastcoop.methods.training import EngineTrainer, TrainedMethod, vectors
from fastcoop.prompts.layout import PromptLayout, parse_prompt

N_VALIDATIONS = 20  # evenly over a schedule
PULL = 4.0  # over shots: the weight of the pull to the hand-written prompt


class CoOpSettings(ScheduleSettings):
    """Settings of a CoOp run.

    Attributes:
        context_length: Number of context vectors, M.
        class_position: Where the class name stands among them.
        class_specific: Whether each class has context vectors of its own.
        prompt: Words and vectors mixed, such as "[V]x4 [CLASS], a type of pet.", in place of ``context_length`` and
            ``class_position``.
        init: "random", or words whose token embeddings the vectors start from. M is their number of tokens.
        learning_rate: Of the first epoch after the warm-up.
        select: Contexts to keep: the last step's, or "best_val", the first best on the validation images (as in the
            first version of the official code).
        val_every: Epochs between validations for "best_val". None is a twentieth of the schedule, at least 1. The last
            epoch is always validated.
        val_accuracy: Record the validation accuracy of the kept contexts. "best_val" always does.
        schedule: "paper" (``epochs`` of batches by SGD, section 4.1), or a fast one (docs/fast.md): "fast",
            "fast-half", or its settings.
        pull: Whether a fast schedule pulls class features to those of the dataset's hand-written prompt: "prompt", the
            default there, or "none", CoOp's own objective.
        precision: Of the frozen text tower in training. Contexts, loss, momentum and all tests stay in float32. "tf32"
            (products of float32 on a GPU keep 10 bits) and "bfloat16" are not exact.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"select", "val_accuracy", "precision", "schedule"})

    context_length: Positive = 16
    class_position: Literal["end", "mid", "front"] = "end"
    class_specific: bool = False
    prompt: str | None = None
    init: str = Field("random", min_length=1)
    learning_rate: LearningRate = 0.002
    select: Literal["last", "best_val"] = "last"
    val_every: Positive | None = None
    val_accuracy: bool = False
    schedule: Schedule = "paper"
    pull: Literal["prompt", "none"] | None = None
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @property
    def fast(self) -> FastSettings | None:
        return FAST.get(self.schedule) if isinstance(self.schedule, str) else self.schedule

    @property
    def pulls(self) -> bool:
        """Whether class features are pulled to those of the dataset's own prompt."""
        return self.fast is not None and self.pull != "none"

    @property
    def schedule_label(self) -> str:
        if self.fast is None:
            return super().schedule_label
        return self.fast.label + (", no pull" if self.pull == "none" else "")

    @property
    def words(self) -> str | None:
        """The words that contexts start from; None if they start from random vectors."""
        return None if self.init == "random" else self.init

    @field_validator("prompt")
    @classmethod
    def _is_pattern(cls, prompt: str | None) -> str | None:
        if prompt is not None:
            parse_prompt(prompt)
        return prompt

    def unused(self) -> Mapping[str, str | None]:
        unused: dict[str, str | None] = {}
        if self.words:
            unused["context_length"] = None  # it may be the words' number of tokens
        if self.prompt is not None:
            reason = "a prompt has its own vectors and order; leave out context_length and class_position"
            unused |= {"context_length": reason, "class_position": reason}
        if self.select == "best_val":
            unused["val_accuracy"] = "best_val always records the validation accuracy; leave out val_accuracy"
        elif self.val_every is not None:
            reason = "val_every needs select: best_val; leave it out, or give that an entry of its own"
            unused["val_every"] = reason
        if self.fast:
            unused |= {
                "epochs": "a fast schedule has its own steps; leave out epochs, or give schedule: {steps: 40}",
                "batch_size": "a fast schedule reads all images in each step; leave out batch_size",
                "learning_rate": "a fast schedule has its own learning rate; leave out learning_rate, or give "
                "schedule: {learning_rate: 0.006}",
            }
        elif self.pull is not None:
            unused["pull"] = "a pull needs a fast schedule; leave out pull, or give schedule: fast"
        return unused


Run = RunSpec[CoOpSettings]


class CoOpMethod(TrainedMethod[CoOpSettings]):
    """Context Optimization. Runs train together in the engine; each has the result that it has alone."""

    name = "coop"
    title = "CoOp"
    Settings: type[CoOpSettings] = CoOpSettings

    def label(self, settings: CoOpSettings) -> str:
        length = f"M={settings.context_length}" if settings.prompt is None else ""
        parts = (
            f'"{settings.words}"' if settings.words else length,
            settings.class_position if settings.prompt is None else f'"{settings.prompt}"',
            "CSC" if settings.class_specific else "",
            "best on validation" if settings.select == "best_val" else "",
            settings.schedule_label if settings.fast else "",
            {"float32": "", "tf32": "TF32"}.get(settings.precision, settings.precision),
        )
        return f"{self.title} ({', '.join(filter(None, parts))})"

    def validation_choice(self, settings: CoOpSettings) -> tuple[str, str] | None:
        if settings.select == "last" and not settings.val_accuracy:
            return None
        return f"what select: best_val and val_accuracy of {self.name} report", "leave these settings out"

    def is_class_specific(self, settings: CoOpSettings) -> bool:
        return settings.class_specific

    def prompts(self, settings: CoOpSettings, data: Data) -> tuple[str, ...]:
        return (data.dataset.template,) if settings.pulls else ()

    def check(self, run: Run) -> None:
        super().check(run)
        if run.has_learned:
            return
        if run.settings.precision == "tf32" and run.model.device.type == "cpu":
            raise UserError(
                "precision: tf32 is a way in which a GPU multiplies float32; on a CPU use float32."
            )
        if (run.settings.val_every or 0) > epochs_of(run):
            raise UserError(
                f"val_every of {self.name} is {run.settings.val_every}, but a run has {epochs_of(run)} epochs, so that "
                "only the last is validated; give a smaller number."
            )

    def key_settings(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        settings, layout = run.settings, layout_of(run.settings, backbone)
        found = super().key_settings(run, backbone) | {"class_position": layout.class_position}
        unused = {"prompt", "val_every", "pull"}
        if settings.fast:
            unused |= {"batch_size", "learning_rate"}
        resolved = {name: value for name, value in found.items() if name not in unused}
        if layout.prompt is not None:
            resolved["prompt"] = layout.prompt
        if settings.select == "best_val":
            resolved["looked_at"] = validation_epochs(run)
        if settings.fast:
            # Whatever determines the steps: the optimizer's constants too, which no setting has.
            of = engine.schedule
            constants = {"momentum": of.AVERAGE_KEPT, "decay": of.COVARIANCE_KEPT, "refresh": of.REFRESH}
            resolved["schedule"] = asdict(fast_schedule(settings.fast)) | constants
        if settings.pulls:
            weight = PULL / shots_per_class(run)
            resolved["pull"] = {"prompt": run.data.dataset.template, "weight": weight}
        return resolved

    def layout(self, settings: CoOpSettings, backbone: Backbone, data: Data) -> PromptLayout:
        return layout_of(settings, backbone)

    def columns(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        layout = layout_of(run.settings, backbone)
        position, is_specific = layout.prompt or layout.class_position, run.settings.class_specific
        own = {"class_position": position, "class_specific": is_specific}
        return super().columns(run, backbone) | own

    def trainer(self, settings: CoOpSettings) -> EngineTrainer:
        return EngineTrainer(settings.precision)

    def training(self, backbone: Backbone, run: Run) -> Any:
        training, objective = self.engine_run(backbone, run), self.objective(backbone, run)
        schedule = fast_schedule(run.settings.fast) if run.settings.fast else None
        return replace(training, snapshots=validation_epochs(run), schedule=schedule, objective=objective)

    def learned(self, backbone: Backbone, run: Run, trained: engine.Trained) -> Outcome:
        contexts, extra = select_contexts(backbone, run, trained)
        # The engine holds the snapshots until all runs end. A resumed training reports a run again.
        kept = extra.get("epoch")
        trained.snapshots = {epoch: taken for epoch, taken in trained.snapshots.items() if epoch == kept}
        losses = np.asarray(trained.losses, dtype=np.float32)
        return Outcome({}, losses, contexts, status=trained.status, extra=extra)

    def objective(self, backbone: Backbone, run: Run) -> engine.Objective:
        """Return what a run minimizes."""
        if not run.settings.pulls:
            return engine.CrossEntropy()
        texts = torch.from_numpy(class_texts(backbone, run.data))
        return engine.PullToPrompt(texts, PULL / shots_per_class(run))

    def classifier(self, backbone: Backbone, run: Run, data: Data) -> LinearClassifier:
        return self.classifiers(backbone, [(run, data)])[0]

    def classifiers(self, backbone: Backbone, tests: Sequence[tuple[Run, Data]]) -> list[LinearClassifier]:
        trees: dict[tuple[Any, ...], dict[int, np.ndarray]] = {}  # the contexts of each tree's tests
        for n, (run, data) in enumerate(tests):
            contexts = np.asarray(run.contexts)
            if run.settings.class_specific:
                contexts = contexts[matching_classes(run.data, data)]
            trees.setdefault((data.class_names, layout_of(run.settings, backbone)), {})[n] = contexts
        found: dict[int, LinearClassifier] = {}
        for (names, layout), of_tree in trees.items():
            texts = _encode(backbone, names, layout, np.stack([*of_tree.values()]))
            for n, one in zip(of_tree, texts, strict=True):
                found[n] = LinearClassifier.of_texts(one, backbone.logit_scale)
        return [found[n] for n in range(len(tests))]


def fast_schedule(settings: FastSettings) -> engine.FastSchedule:
    """Return the engine's form of a fast schedule."""
    return engine.FastSchedule(settings.learning_rate, ridge=settings.ridge)


def validation_epochs(run: Run) -> list[int]:
    """Return the epochs, counted from 1, after which contexts are validated; none if a run keeps the last step's."""
    if run.settings.select == "last":
        return []
    epochs = epochs_of(run)
    every = run.settings.val_every or max(1, epochs // N_VALIDATIONS)
    return sorted({*range(every, epochs + 1, every), epochs})


def select_contexts(
    backbone: Backbone, run: Run, trained: engine.Trained
) -> tuple[np.ndarray, dict[str, float]]:
    """Return the contexts that a run keeps, float32 on the CPU, and what it records about them."""
    last, best_val = trained.contexts.float().cpu().numpy(), run.settings.select == "best_val"
    if not (best_val or run.settings.val_accuracy):
        return last, {}
    taken = {epoch: contexts.float().cpu().numpy() for epoch, contexts in sorted(trained.snapshots.items())}
    kept = taken if best_val else {0: last}  # none if it diverged before the first validation
    found = _on_validation(backbone, run, np.stack([*kept.values()])) if kept else np.full(1, np.nan)
    if np.isnan(found).all():
        return last, {}
    best = int(np.nanargmax(found))
    epoch = [*kept][best]
    return kept[epoch], {"val_accuracy": float(found[best])} | ({"epoch": float(epoch)} if best_val else {})


def _on_validation(backbone: Backbone, run: Run, contexts: np.ndarray) -> np.ndarray:
    """Return accuracy in percent (n,) of contexts (n, ...) on the validation images, NaN for diverged ones."""
    features, labels = run.data.validation(run.subset)
    texts = _encode(backbone, run.data.class_names, layout_of(run.settings, backbone), contexts)
    return np.concatenate([accuracy(unit(features) @ unit(one).T, labels)[None] for one in texts])


def _encode(
    backbone: Backbone, class_names: Sequence[str], layout: PromptLayout, contexts: np.ndarray
) -> np.ndarray:
    """Return text features float32 (runs, classes, dim) of classes in contexts (runs, ...)."""
    features = engine.encoder.encode_runs(_trees(backbone), class_names, layout, torch.from_numpy(contexts))
    return np.asarray(features.float().cpu().numpy())


@memoize(1)
def _trees(backbone: Backbone) -> Any:
    """Return the engine's view of a frozen tower. Making it takes longer than testing a run."""
    return engine.forest.Trees(backbone)


def layout_of(settings: CoOpSettings, backbone: Backbone) -> PromptLayout:
    """Return the prompt layout of a run. Raises UserError for a prompt without one vector per token of ``init``."""
    length = vectors(settings, backbone)
    if settings.prompt is None:
        return PromptLayout(length, settings.class_position, settings.class_specific)
    layout = PromptLayout.written(settings.prompt, settings.class_specific)
    if settings.words and length != layout.context_length:
        raise UserError(
            f'The words "{settings.init}" that contexts start from are {length} tokens, but the prompt '
            f'"{settings.prompt}" has {layout.context_length} vectors; give it {length}.'
        )
    return layout
