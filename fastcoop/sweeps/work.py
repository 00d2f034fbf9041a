"""A piece of work as it travels to whoever does it, the doing, and what is told of it."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.grids.plan import LoadedGrid
from fastcoop.methods import METHODS, Data, FeatureBank, Outcome, RunContext, RunSpec
from fastcoop.results.records import Batch
from fastcoop.sweeps.checkpoints import CheckpointFile

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone
    from fastcoop.engine.state import State
    from fastcoop.features import StoreVersion

TOLD_EVERY = 0.5  # seconds between words of progress


@dataclass(frozen=True)
class Begun:
    """A worker has taken up a batch."""

    batch: Batch


@dataclass(frozen=True, eq=False)
class Ended:
    """A run has come to an outcome. It is told again where a resumed batch holds runs that had ended."""

    key: str
    outcome: Outcome


@dataclass(frozen=True)
class Progressed:
    """So many runs' worth of a batch, in fractions, were done since the last word."""

    batch: Batch
    runs: float


@dataclass(frozen=True)
class Finished:
    """A batch was left: all its runs ended or, with ``error``, some did not.

    ``engine``: seconds of ``seconds`` spent in steps of the engine. ``died``: its process did, so that nobody knows
    which run was at fault. ``warning``: what went wrong without harm.
    """

    batch: Batch
    seconds: float = 0.0
    engine: float = 0.0
    error: str | None = None
    died: bool = False
    warning: str | None = None


Event = Begun | Ended | Progressed | Finished
Tell = Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class Task:
    """A batch with its runs, unbound. ``checkpoint``: the file of its state, None for no state."""

    batch: Batch
    runs: tuple[RunSpec, ...]
    checkpoint: Path | None = None


@dataclass(frozen=True, eq=False)
class Supplies:
    """Where a worker finds what runs need: sent once, loaded when first asked for, kept warm.

    Attributes:
        backbones: by name, as ``fastcoop.backbone_from_spec`` takes them.
        datasets: by name.
        stores: paths of feature stores by names of backbone and dataset.
        versions: what these stores held when the runs were planned.
        views: of training features.
        device: of the towers.
    """

    backbones: dict[str, str]
    datasets: dict[str, Dataset]
    stores: dict[tuple[str, str], Path]
    versions: dict[tuple[str, str], StoreVersion]
    views: int
    device: str

    @classmethod
    def of(cls, world: LoadedGrid, device: str) -> Supplies:
        from fastcoop.backbones.load import is_model_path

        specs = {
            backbone.name: str(path.resolve()) if is_model_path(path := Path(spec).expanduser()) else spec
            for spec, backbone in world.named.items()
        }
        opened = {names: data.store for names, data in world.features.items() if data.store is not None}
        stores = {names: store.path.resolve() for names, store in opened.items()}
        versions = {names: store.version for names, store in opened.items()}
        datasets = {dataset.name: dataset for dataset in world.datasets.values()}
        return cls(specs, datasets, stores, versions, world.grid.views, device)


class Workshop(FeatureBank):
    """Where tasks are done: what runs need is loaded when first asked for and kept warm, a backbone at a time."""

    def __init__(self, supplies: Supplies):
        self.supplies = supplies
        self._backbone: Backbone | None = None
        self._data: dict[str, Data] = {}

    def do(self, task: Task, tell: Tell) -> None:
        """Do a task; what goes wrong with it is told, not raised."""
        start = time.monotonic()
        troubled: list[Exception] = []

        def careful(event: Event) -> None:
            try:
                tell(event)
            except Exception as error:
                troubled.append(error)
                raise

        careful(Begun(task.batch))
        try:
            runs = [self.bind(run) for run in task.runs]
            do_batch(task.batch, self.backbone(task.batch.backbone), runs, careful, task.checkpoint)
        except Exception as error:
            if troubled:  # the listener's own, such as a full disk: no fault of the task
                raise troubled[0] from None
            tell(Finished(task.batch, time.monotonic() - start, error=describe(error)))

    def backbone(self, name: str) -> Backbone:
        from fastcoop.backbones import backbone_from_spec

        if self._backbone is None or self._backbone.name != name:
            self._data.clear()
            self._backbone = backbone_from_spec(self.supplies.backbones[name], device=self.supplies.device)
        return self._backbone

    def data(self, backbone: str, dataset: str) -> Data:
        from fastcoop.features import FeatureStore

        if dataset not in self._data:
            described = self.supplies.datasets[dataset]
            path = self.supplies.stores[backbone, dataset]
            version = self.supplies.versions[backbone, dataset]
            store = FeatureStore.open(path, self.backbone(backbone), described, version)
            self._data[dataset] = Data(described, store, self.supplies.views)
        return self._data[dataset]


class Home(Workshop):
    """The same with what the sweep itself has loaded."""

    def __init__(self, world: LoadedGrid):
        self.world = world

    def backbone(self, name: str) -> Backbone:
        return self.world.backbone(name)

    def data(self, backbone: str, dataset: str) -> Data:
        return self.world.data(backbone, dataset)


def do_batch(
    batch: Batch,
    backbone: Backbone,
    runs: Sequence[RunSpec],
    tell: Tell,
    checkpoint: Path | None = None,
) -> None:
    """Do a batch's runs, telling of each as it ends, and of the batch at last. Raises what its method raises."""
    import torch

    start = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(batch.threads)
    files = [run.data.train_files(run.subset) if run.subset else None for run in runs] if checkpoint else []
    watch = _Watch(batch, tell, CheckpointFile(checkpoint, files) if checkpoint else None)

    def done(index: int, outcome: Outcome) -> None:
        if any(math.isnan(scores.accuracy) for scores in outcome.scores.values()):
            outcome = replace(outcome, status="diverged")  # its last step diverged, after the last loss
        tell(Ended(batch.keys[index], outcome))

    context = RunContext(1, batch.budget, watch.on_progress, watch if batch.trains else None)
    try:
        METHODS[batch.method].run(backbone, runs, done, context)
    finally:
        torch.set_num_threads(threads)
    warning = watch.checkpoint.problem if watch.checkpoint else None
    tell(Finished(batch, time.monotonic() - start, watch.engine, warning=warning))


def describe(error: BaseException) -> str:
    """An error in a line that says where it came from."""
    if isinstance(error, UserError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(where[-1].filename).name}, line {where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"


@dataclass(eq=False)
class _Watch:
    """A batch's checkpoint that also tells of progress, and notes the time spent in steps of the engine.

    The engine reports a step's work as soon as it is done, and offers its state when all else of the step is (losses
    looked at, ended runs scored): from offer to report is the engine's time.
    """

    batch: Batch
    tell: Tell
    checkpoint: CheckpointFile | None
    engine: float = 0.0
    _began: float | None = None
    _runs: float = 0.0
    _told: float = field(default_factory=time.monotonic)

    def load(self) -> State | None:
        state = self.checkpoint.load() if self.checkpoint else None
        self._began = time.monotonic()
        return state

    def offer(self, get_state: Callable[[], State]) -> None:
        if self.checkpoint:
            self.checkpoint.offer(get_state)
        self._began = time.monotonic()

    def on_progress(self, runs: float) -> None:
        now = time.monotonic()
        if self._began is not None:
            self.engine += now - self._began
            self._began = None
        self._runs += runs
        if now - self._told >= TOLD_EVERY:
            self.tell(Progressed(self.batch, self._runs))
            self._runs, self._told = 0.0, now
