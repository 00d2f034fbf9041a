"""A batch of runs as a task: what a worker gets, how the task is run, and the events it reports."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.memo import Late
from fastcoop.methods import METHODS, Data, FeatureBank, Outcome, RunContext, RunSpec
from fastcoop.methods.text import encoded_prompts
from fastcoop.results.records import Batch
from fastcoop.sweeps.checkpoints import CheckpointFile
from fastcoop.sweeps.loading import LoadedGrid
from fastcoop.sweeps.records import train_files

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.engine.runs import State
    from fastcoop.features import StoreVersion

KNOWN = ("name", "digest", "embed_dim", "logit_scale")  # attributes of a `Backbone`
PROGRESS_EVERY = 0.5  # seconds between events of progress


@dataclass(frozen=True, eq=False)
class Task:
    """A batch with its runs, unbound. ``checkpoint``: the file of its training state, None for none."""

    batch: Batch
    runs: tuple[RunSpec, ...]
    checkpoint: Path | None = None


@dataclass(frozen=True)
class BatchProgress:
    """Work done since the last such event, as a number of ``runs``: fractions in long runs; 0 when the batch starts,
    and again when everything that it needs is loaded.

    ``before``: work that a resumed batch has from its checkpoint.
    """

    batch: Batch
    runs: float = 0.0
    before: float = 0.0


@dataclass(frozen=True, eq=False)
class RunFinished:
    """A run has an outcome. A resumed task reports the runs again that had finished before."""

    key: str
    outcome: Outcome


@dataclass(frozen=True)
class BatchFinished:
    """A task has ended.

    Attributes:
        batch: Its batch.
        engine_seconds: Time in training steps of the engine.
        error: Why some runs have no outcome; None if all have one.
        died: Whether the process died, so that the run at fault is unknown.
        warning: A problem that does not affect the outcomes.
    """

    batch: Batch
    engine_seconds: float = 0.0
    error: str | None = None
    died: bool = False
    warning: str | None = None


Event = BatchProgress | RunFinished | BatchFinished
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class WorkerSpec:
    """Where a worker process finds what runs need.

    Attributes:
        backbones: By name, as ``fastcoop.backbone_from_spec`` takes them.
        datasets: By name.
        stores: Paths of feature stores, by names of backbone and dataset.
        versions: What these stores held when the runs were planned.
        views: Views of training features.
        device: Of the towers. "auto" is found by the worker.
        known: Of a backbone on a CPU, by name: attributes of `Backbone` that runs without its towers use.
        texts: Its text features, as `encoded_prompts` returns them. A worker without other runs loads no towers.
    """

    backbones: dict[str, str]
    datasets: dict[str, Dataset]
    stores: dict[tuple[str, str], Path]
    versions: dict[tuple[str, str], StoreVersion]
    views: int
    device: str
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, dict[tuple[str, ...], np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedGrid, device: str, runs: Iterable[RunSpec] = ()) -> WorkerSpec:
        """Return the spec of a grid. ``runs``: bound ones, whose hand-written prompts are encoded here, on a CPU."""
        from fastcoop.backbones.load import is_model_path

        specs = {
            backbone.name: str(path.resolve()) if is_model_path(path := Path(spec).expanduser()) else spec
            for spec, backbone in loaded.named.items()
        }
        datasets = {dataset.name: dataset for dataset in loaded.datasets.values()}
        opened = {names: data.store for names, data in loaded.features.items() if data.store is not None}
        stores = {names: store.path.resolve() for names, store in opened.items()}
        versions = {names: store.file.version for names, store in opened.items()}
        known, texts = {}, {}
        if device == "cpu":
            texts = encoded_prompts(runs)
            known = {one.name: {name: getattr(one, name) for name in KNOWN} for one in loaded.backbones}
        return cls(specs, datasets, stores, versions, loaded.grid.views, device, known, texts)


class WorkerBank(FeatureBank):
    """Loads what runs need when it is first used, and keeps it for one backbone at a time."""

    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self._backbone: Backbone | None = None
        self._data: dict[str, Data] = {}

    def backbone(self, name: str) -> Backbone:
        if self._backbone is None or self._backbone.name != name:
            self._data.clear()
            self._backbone = self._late(name) if name in self.spec.known else self._load(name)
        return self._backbone

    def _load(self, name: str) -> Backbone:
        from fastcoop.backbones import backbone_from_spec

        return backbone_from_spec(self.spec.backbones[name], device=self.spec.device)

    def _late(self, name: str) -> Backbone:
        """Return a backbone that loads itself when more than what is known of it is used."""
        import torch

        load, texts = cache(partial(self._load, name)), self.spec.texts.get(name, {})

        def encode_text(prompts: Sequence[str]) -> torch.Tensor:
            features = texts.get(tuple(prompts))
            return load().encode_text(prompts) if features is None else torch.from_numpy(features)

        found: Any = Late(load, device=torch.device("cpu"), encode_text=encode_text, **self.spec.known[name])
        return found

    def data(self, backbone: str, dataset: str) -> Data:
        from fastcoop.features import FeatureStore

        model = self.backbone(backbone)
        if dataset not in self._data:
            described, names = self.spec.datasets[dataset], (backbone, dataset)
            store = FeatureStore.open(self.spec.stores[names], model, described, self.spec.versions[names])
            self._data[dataset] = Data(described, store, self.spec.views)
        return self._data[dataset]


def run_task(task: Task, bank: FeatureBank, on_event: OnEvent) -> None:
    """Run a task and report its events. Errors of the task are reported; those of ``on_event`` are raised."""
    import torch

    batch, threads = task.batch, torch.get_num_threads()
    watch = _Watch(batch, on_event)
    error = None

    def done(index: int, outcome: Outcome) -> None:
        if any(math.isnan(scores.accuracy) for scores in outcome.scores.values()):
            outcome = replace(outcome, status="diverged")  # in the last step, after the last loss
        watch.report(RunFinished(batch.keys[index], outcome))

    try:
        watch.report(BatchProgress(batch))
        backbone = bank.backbone(batch.backbone)
        runs = [bank.bind(run) for run in task.runs]
        if task.checkpoint:
            watch.checkpoint = CheckpointFile(task.checkpoint, [train_files(run) for run in runs])
        checkpoint = watch if batch.trains else None
        context = RunContext(batch.budget, watch.on_progress, checkpoint, watch.on_resume)
        torch.set_num_threads(batch.threads)
        METHODS[runs[0].method].run(backbone, [], done, RunContext())  # imports what it needs
        watch.report(BatchProgress(batch))  # its own time starts here
        METHODS[runs[0].method].run(backbone, runs, done, context)
    except Exception as caught:
        if watch.listener_error:
            raise watch.listener_error from None
        error = describe_error(caught)
    finally:
        torch.set_num_threads(threads)
    warning = watch.checkpoint.problem if watch.checkpoint else None
    on_event(BatchFinished(batch, watch.engine_seconds, error=error, warning=warning))


def describe_error(error: BaseException) -> str:
    """Return an error in one line, with where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class _Watch:
    """A batch's `methods.base.Checkpoint`, which also reports progress and measures the time in the engine's steps.

    The engine reports a step's work at once, and offers its state when everything else of the step is done (checks for
    divergence, scores of finished runs). The time from an offer to the next report is the engine's.
    """

    def __init__(self, batch: Batch, on_event: OnEvent):
        self.checkpoint: CheckpointFile | None = None
        self.engine_seconds = 0.0
        self.listener_error: Exception | None = None
        self._batch, self._on_event = batch, on_event
        self._step_start: float | None = None
        self._runs, self._reported = 0.0, time.monotonic()

    def report(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # such as a full disk: no fault of the task
            self.listener_error = error
            raise

    def load(self) -> State | None:
        state = self.checkpoint.load() if self.checkpoint else None
        self._step_start = time.monotonic()
        return state

    def offer(self, get_state: Callable[[], State]) -> None:
        if self.checkpoint:
            self.checkpoint.offer(get_state)
        self._step_start = time.monotonic()

    def on_resume(self, runs: float) -> None:
        if runs:
            self.report(BatchProgress(self._batch, before=runs))

    def on_progress(self, runs: float) -> None:
        now = time.monotonic()
        if self._step_start is not None:
            self.engine_seconds += now - self._step_start
            self._step_start = None
        self._runs += runs
        if self._runs and now - self._reported >= PROGRESS_EVERY:
            self.report(BatchProgress(self._batch, self._runs))
            self._runs, self._reported = 0.0, now
