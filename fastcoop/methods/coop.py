"""CoOp: context vectors learned through the frozen text tower (paper, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fastcoop.methods.base import Done, Job, Method, Outcome, RunContext
from fastcoop.methods.data import Data, matching_classes
from fastcoop.methods.schedule import Positive, ScheduleSettings, epochs_of, schedule_of
from fastcoop.methods.scores import Scores
from fastcoop.methods.text import score_texts

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone


class CoOpSettings(ScheduleSettings):
    """Settings of a CoOp run.

    ``init``: "random", or words, whose token count then replaces ``context_length``.
    """

    context_length: Positive = 16
    class_position: Literal["end", "mid", "front"] = "end"
    class_specific: bool = False
    init: str = Field("random", min_length=1)
    learning_rate: float = Field(0.002, gt=0)


class CoOp(Method[CoOpSettings]):
    """Runs train together in the engine; each as if alone."""

    name = "coop"
    Settings = CoOpSettings

    def label(self, settings: CoOpSettings) -> str:
        start = [] if settings.init == "random" else [f'"{settings.init}"']
        length = [f"M={settings.context_length}"] if settings.init == "random" else []
        specific = ["CSC"] if settings.class_specific else []
        return f"CoOp ({', '.join([*length, *start, settings.class_position, *specific])})"

    def check(self, job: Job[CoOpSettings]) -> None:
        for target in job.targets if job.settings.class_specific else ():
            matching_classes(job.data, target)

    def determined_by(self, job: Job[CoOpSettings], backbone: Backbone) -> dict[str, Any]:
        resolved = {"epochs": epochs_of(job), "context_length": context_length_of(job.settings, backbone)}
        return job.settings.model_dump(mode="json") | resolved | {"views": job.data.views}

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

    def run(
        self,
        backbone: Backbone,
        jobs: Sequence[Job[CoOpSettings]],
        done: Done,
        context: RunContext,
    ) -> None:
        from fastcoop.engine import Trained, run_costs, train

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
            contexts = trained.contexts.float().cpu().numpy()
            seconds = costs[number] * (time.perf_counter() - start) / max(worked, 1.0)
            losses = np.asarray(trained.losses, dtype=np.float32)
            done(order[number], _outcome(backbone, job, contexts, losses, trained.status, seconds))

        train(backbone, runs, memory_budget=context.memory_budget, on_done=on_done, on_progress=on_progress)


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
    )


def context_length_of(settings: CoOpSettings, backbone: Backbone) -> int:
    """M: as set, or the token count of the words that the context starts from."""
    from fastcoop.prompts.initial import word_tokens

    return settings.context_length if settings.init == "random" else len(word_tokens(backbone, settings.init))


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
) -> Outcome:
    scores = {data.name: _score(backbone, job, data, contexts) for data in job.tests}
    return Outcome(scores, losses, contexts, status=status, seconds=seconds)


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
