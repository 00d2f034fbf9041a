"""CoOp: context vectors learned through the frozen text tower (paper, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fastcoop.methods.base import Done, Job, Method, Outcome, RunContext, Training
from fastcoop.methods.data import Data, matching_classes
from fastcoop.methods.schedule import Positive, ScheduleSettings, epochs_of, schedule_of
from fastcoop.methods.scores import Scores
from fastcoop.methods.text import score_texts, unit

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.engine import Trained

LOOKS = 20  # at the validation images, evenly over a schedule
PROMPTS_AT_ONCE = 4096  # encoded without gradients


class CoOpSettings(ScheduleSettings):
    """Settings of a CoOp run.

    ``init``: "random", or words, whose token count then replaces ``context_length``.
    ``select``: which contexts a run keeps: the last step's, or "best_val", the first best on its validation images
    (as in the official code's first version). ``val_every``: epochs between looks at those; None is a twentieth of
    the schedule, at least 1, and the last epoch is always looked at.
    ``val_accuracy``: note the kept contexts' accuracy on the validation images. "best_val" always does.
    """

    context_length: Positive = 16
    class_position: Literal["end", "mid", "front"] = "end"
    class_specific: bool = False
    init: str = Field("random", min_length=1)
    learning_rate: float = Field(0.002, gt=0)
    select: Literal["last", "best_val"] = "last"
    val_every: Positive | None = None
    val_accuracy: bool = False


class CoOp(Method[CoOpSettings]):
    """Runs train together in the engine; each as if alone."""

    name = "coop"
    Settings = CoOpSettings

    def label(self, settings: CoOpSettings) -> str:
        start = [] if settings.init == "random" else [f'"{settings.init}"']
        length = [f"M={settings.context_length}"] if settings.init == "random" else []
        specific = ["CSC"] if settings.class_specific else []
        best = ["best on validation"] if settings.select == "best_val" else []
        return f"CoOp ({', '.join([*length, *start, settings.class_position, *specific, *best])})"

    def check(self, job: Job[CoOpSettings]) -> None:
        if job.contexts is None and (job.settings.select == "best_val" or job.settings.val_accuracy):
            job.data.require_validation(
                job.subset,
                "what select: best_val and val_accuracy of coop report",
                "leave these settings out",
            )
        for target in job.targets if job.settings.class_specific else ():
            matching_classes(job.data, target)

    def determined_by(self, job: Job[CoOpSettings], backbone: Backbone) -> dict[str, Any]:
        settings = job.settings
        resolved: dict[str, Any] = {"epochs": epochs_of(job)}
        resolved["context_length"] = context_length_of(settings, backbone)
        # Settings that came later are named where they are used alone: runs from before them keep their keys.
        if settings.select == "best_val":
            resolved |= {"looked_at": epochs_looked_at(job), "select": settings.select}
        elif settings.val_accuracy:
            resolved |= {"val_accuracy": True}
        dump = settings.model_dump(mode="json", exclude={"select", "val_every", "val_accuracy"})
        return dump | resolved | {"views": job.data.views}

    def columns(self, job: Job[CoOpSettings], backbone: Backbone) -> dict[str, Any]:
        settings = job.settings
        return {
            "context_length": context_length_of(settings, backbone),
            "class_position": settings.class_position,
            "class_specific": settings.class_specific,
            "init": settings.init,
            "epochs": epochs_of(job),
            "schedule": schedule_of(settings),
        }

    def training(self, job: Job[CoOpSettings], backbone: Backbone) -> Training:
        assert job.subset is not None
        per_epoch = max(1, len(job.subset.train) // job.settings.batch_size)
        return Training(job.data.class_names, layout_of(job.settings, backbone), epochs_of(job) * per_epoch)

    def run(
        self,
        backbone: Backbone,
        jobs: Sequence[Job[CoOpSettings]],
        done: Done,
        context: RunContext,
    ) -> None:
        from fastcoop.engine import run_costs, train

        learned = [index for index, job in enumerate(jobs) if job.contexts is not None]
        for index in learned:
            done(index, _outcome(backbone, jobs[index], np.asarray(jobs[index].contexts)))
            context.on_progress(1.0)
        order = [index for index, job in enumerate(jobs) if job.contexts is None]
        if not order:
            return
        runs = [engine_run(jobs[index], backbone) for index in order]
        costs = run_costs(backbone, runs)
        worked, start = 0.0, time.perf_counter()

        def on_progress(cost: float) -> None:
            nonlocal worked
            worked += cost
            context.on_progress(cost * len(order) / sum(costs))

        def on_done(number: int, trained: Trained) -> None:
            job = jobs[order[number]]
            contexts, extra = select(backbone, job, trained)
            # The engine keeps what it returns until all runs have ended; a resumed training tells of a run again.
            kept = extra.get("epoch")
            trained.snapshots = {epoch: taken for epoch, taken in trained.snapshots.items() if epoch == kept}
            seconds = costs[number] * (time.perf_counter() - start) / max(worked, 1.0)
            losses = np.asarray(trained.losses, dtype=np.float32)
            outcome = _outcome(backbone, job, contexts, losses, trained.status, seconds, extra)
            done(order[number], outcome)

        checkpoint = context.checkpoint
        train(
            backbone, runs, memory_budget=context.memory_budget, on_done=on_done, on_progress=on_progress,
            state=checkpoint.load() if checkpoint else None, on_step=checkpoint.offer if checkpoint else None,
        )  # fmt: skip


def engine_run(job: Job[CoOpSettings], backbone: Backbone) -> Any:
    """The engine's form of a job. Its images are the augmented views, as in the official code; the test-time
    crop only where there are no others."""
    import torch

    from fastcoop.engine import Run
    from fastcoop.prompts import initial_contexts

    assert job.subset is not None
    settings, layout = job.settings, layout_of(job.settings, backbone)
    features, labels = job.data.train(job.subset)
    views = features[:, 1:] if features.shape[1] > 1 else features
    words = None if settings.init == "random" else settings.init
    return Run(
        class_names=job.data.class_names,
        layout=layout,
        contexts=initial_contexts(backbone, layout, len(job.data.class_names), job.seed, words),
        features=torch.from_numpy(views),
        labels=torch.from_numpy(labels),
        epochs=epochs_of(job),
        seed=job.seed,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        snapshots=epochs_looked_at(job),
    )


def epochs_looked_at(job: Job[CoOpSettings]) -> list[int]:
    """Epochs, counted from 1, after which a run is tried on its validation images; none if it keeps the last."""
    if job.settings.select == "last":
        return []
    epochs = epochs_of(job)
    every = job.settings.val_every or max(1, epochs // LOOKS)
    return sorted({*range(every, epochs + 1, every), epochs})


def select(
    backbone: Backbone, job: Job[CoOpSettings], trained: Trained
) -> tuple[np.ndarray, dict[str, float]]:
    """The contexts that a run keeps, float32 on the CPU, and what it notes of them."""
    last = trained.contexts.float().cpu().numpy()
    if job.settings.select == "last":
        if not job.settings.val_accuracy:
            return last, {}
        return last, {"val_accuracy": float(_on_validation(backbone, job, last[None])[0])}
    if not trained.snapshots:  # it diverged before the first look
        return last, {}
    epochs = sorted(trained.snapshots)
    seen = np.stack([trained.snapshots[epoch].float().cpu().numpy() for epoch in epochs])
    accuracy = _on_validation(backbone, job, seen)
    best = int(accuracy.argmax())
    return seen[best], {"val_accuracy": float(accuracy[best]), "epoch": float(epochs[best])}


def _on_validation(backbone: Backbone, job: Job[CoOpSettings], contexts: np.ndarray) -> np.ndarray:
    """Accuracy in percent, (n,), of contexts (n, ...) on the job's validation images."""
    import torch

    from fastcoop.engine import PromptEncoder

    assert job.subset is not None
    features, labels = job.data.validation(job.subset)
    encoder = PromptEncoder(backbone, job.data.class_names, layout_of(job.settings, backbone))
    at_once = max(1, PROMPTS_AT_ONCE // len(job.data.class_names))
    accuracy = []
    for start in range(0, len(contexts), at_once):
        with torch.no_grad():
            texts = encoder(torch.from_numpy(contexts[start : start + at_once])).float().cpu().numpy()
        predicted = (unit(features) @ unit(texts).swapaxes(1, 2)).argmax(-1)
        accuracy.append(100 * (predicted == labels).mean(1))
    return np.concatenate(accuracy)


def context_length_of(settings: CoOpSettings, backbone: Backbone) -> int:
    """M: as set, or the token count of the words that the context starts from."""
    return settings.context_length if settings.init == "random" else _words_length(backbone, settings.init)


@lru_cache(maxsize=256)
def _words_length(backbone: Backbone, words: str) -> int:
    from fastcoop.prompts.initial import word_tokens

    return len(word_tokens(backbone, words))


def layout_of(settings: CoOpSettings, backbone: Backbone) -> Any:
    """The prompt layout of a run."""
    from fastcoop.prompts import PromptLayout

    length = context_length_of(settings, backbone)
    return PromptLayout(length, settings.class_position, settings.class_specific)


def _outcome(
    backbone: Backbone,
    job: Job[CoOpSettings],
    contexts: np.ndarray,
    losses: np.ndarray | None = None,
    status: str = "done",
    seconds: float = 0.0,
    extra: dict[str, float] | None = None,
) -> Outcome:
    scores = {data.name: _score(backbone, job, data, contexts) for data in job.tests}
    return Outcome(scores, losses, contexts, status=status, seconds=seconds, extra=extra or {})


def _score(backbone: Backbone, job: Job[CoOpSettings], data: Data, contexts: np.ndarray) -> Scores:
    """Test contexts on a dataset: a class-specific context on the classes of the same names."""
    import torch

    from fastcoop.engine import encode_prompts

    if data is not job.data and job.settings.class_specific:
        contexts = contexts[matching_classes(job.data, data)]
    item = (data.class_names, layout_of(job.settings, backbone), torch.from_numpy(contexts))
    with torch.no_grad():
        texts = encode_prompts(backbone, [item])[0]
    return score_texts(backbone, data, texts.float().cpu().numpy())
