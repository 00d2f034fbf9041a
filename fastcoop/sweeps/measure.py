"""A short measurement on this machine: what a sweep's steps and jobs take, by doing the beginnings of some of them.

While it measures, the other workers that the sweep will have are played by processes that multiply matrices: cores
share memory, caches and power, so a core alone is faster than one of several.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from fastcoop.methods import METHODS, Data, RunContext, RunSpec

if TYPE_CHECKING:
    import torch

    from fastcoop.backbones import Backbone
    from fastcoop.datasets import Dataset
    from fastcoop.engine.state import State

STEPS = 3  # of training, at least so many are timed
TOO_LONG = 6.0  # seconds after which a measurement ends with what it has
clock = time.perf_counter
CROPS = 24  # images encoded to time that

OTHER = """
import os, time
import numpy as np
parent, end = os.getppid(), time.monotonic() + 120
a, b = np.ones((2048, 512), np.float32), np.ones((512, 2048), np.float32)
while os.getppid() == parent and time.monotonic() < end:
    a @ b
"""


class _Enough(Exception):
    """The measurement has what it needs."""


@dataclass
class Steps:
    """A training's beginning: seconds until the first step ended, then ``rows`` and ``seconds`` of each step, and the
    largest resident size seen, in bytes."""

    setup: float = 0.0
    rows: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resident: int = 0

    @property
    def step(self) -> tuple[float, float]:
        """Rows and seconds of a step: the median over those with as many rows as the first."""
        same = [s for r, s in zip(self.rows, self.seconds, strict=True) if r == self.rows[0]]
        return self.rows[0], float(np.median(same))


class _Stopwatch:
    """Stands in for a checkpoint: the engine offers its state after each step."""

    def __init__(self, costs: Sequence[float], enough: float):
        self.found = Steps()
        self._enough = enough
        self._per_run = sum(costs) / len(costs)
        self._began = self._last = clock()
        self._rows = 0.0

    def load(self) -> State | None:
        return None

    def progress(self, runs: float) -> None:
        self._rows = runs * self._per_run

    def offer(self, get_state: Callable[[], State]) -> None:
        now, found = clock(), self.found
        if not found.setup:
            found.setup = now - self._began
        else:
            found.rows.append(self._rows)
            found.seconds.append(now - self._last)
        found.resident = max(found.resident, psutil.Process().memory_info().rss)
        spent = now - self._began - found.setup
        if found.seconds and (spent > TOO_LONG or (len(found.seconds) >= STEPS and spent > self._enough)):
            raise _Enough
        self._last = clock()


def time_training(
    method: str,
    runs: Sequence[RunSpec],
    costs: Sequence[float],
    backbone: Backbone,
    budget: int,
    enough: float = 1.0,
) -> Steps:
    """Begin to train runs together. ``costs`` are their rows times steps, ``budget`` is in bytes, ``enough`` the
    seconds of steps that are timed, if that makes several."""
    watch = _Stopwatch(costs, enough)
    context = RunContext(1, budget, watch.progress, watch)
    with suppress(_Enough):
        METHODS[method].run(backbone, runs, lambda index, outcome: None, context)
    found = watch.found
    if not found.seconds:  # a single step was all there was
        found.rows, found.seconds = [watch._rows or 1.0], [found.setup]
    found.setup = max(0.0, found.setup - found.step[1])
    return found


def time_run(method: str, run: RunSpec, backbone: Backbone) -> float:
    """Seconds of a run that does not train together with others."""
    do, done, context = METHODS[method].run, lambda index, outcome: None, RunContext(1)
    do(backbone, [], done, context)  # imports what it works with
    start = clock()
    do(backbone, [run], done, context)
    return clock() - start


def time_ending(method: str, run: RunSpec, contexts: np.ndarray, backbone: Backbone) -> float:
    """Seconds to test a run that has learned ``contexts``: what follows its last step."""
    return time_run(method, replace(run, contexts=contexts), backbone)


def time_encoding(backbone: Backbone, dataset: Dataset, recipe: str) -> float:
    """Seconds per crop to read images and encode them with all cores, as caching does."""
    from fastcoop.features.encode import encode, read_crops
    from fastcoop.features.plan import Part, Settings

    rows = tuple(range(min(CROPS, len(dataset.splits["test"]))))
    part, settings = Part("test", rows, range(1), ""), Settings(recipe, 0, 0, "float32", CROPS)
    start = clock()
    images = [read_crops(dataset, part, row, backbone, settings) for row in rows]
    read = clock() - start
    encode(backbone, dataset, part, images, settings)  # the first is slower
    start = clock()
    encode(backbone, dataset, part, images, settings)
    return (read / (os.cpu_count() or 1) + clock() - start) / len(rows)


@contextmanager
def as_one_of(workers: int, threads: int) -> Iterator[None]:
    """Measure as one of so many workers, of so many threads each."""
    import torch
    from threadpoolctl import threadpool_limits

    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))}
    others = [
        subprocess.Popen([sys.executable, "-c", OTHER], env=environment, stdin=subprocess.DEVNULL)
        for _ in range(workers - 1)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.kill()
            other.wait()


class MadeUp:
    """Stands in for a feature store that is not there yet: features of the right shapes, around a point per class."""

    def __init__(self, dataset: Dataset, dim: int, views: int):
        self._labels = {name: split.labels for name, split in dataset.splits.items()}
        self._views = views
        rng = np.random.default_rng(0)
        self._centres = rng.normal(size=(len(dataset.class_names), dim)).astype(np.float32)

    def indices(self, split: str) -> np.ndarray:
        return np.arange(len(self._labels[split]))

    def train(self, indices: np.ndarray, views: bool = True) -> torch.Tensor:
        return self._features(self._labels["train"][indices], 1 + self._views if views else 1)

    def train_labels(self, indices: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._labels["train"][indices])

    def split(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        labels = self._labels[name]
        return self._features(labels, 1)[:, 0], torch.from_numpy(labels)

    def _features(self, labels: np.ndarray, views: int) -> torch.Tensor:
        import torch

        rng = np.random.default_rng(len(labels))
        noise = rng.normal(size=(len(labels), views, self._centres.shape[1])).astype(np.float32)
        return torch.from_numpy(self._centres[labels][:, None] + 1.5 * noise)


def with_features(data: Data, dim: int, missing_crops: int = 0) -> Data:
    """``data`` itself, or with features made up where some are still missing."""
    if data.store is not None and not missing_crops:
        return data
    stand_in: Any = MadeUp(data.dataset, dim, data.views)
    return Data(data.dataset, stand_in, data.views)
