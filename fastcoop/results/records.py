"""The plain records that a results folder stores. `fastcoop.sweeps.records` makes them from finished runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NO_CLASS = 65535  # the stored prediction where a run's outputs are not finite
# Names in a run's recorded settings that are no settings of its method: the prompt of its dataset, where the run uses
# it, and properties of its features that are not the default.
DATASET_PROMPT = "dataset_prompt"
FEATURE_PROPERTIES = ("recipe", "feature_dtype", "feature_precision", "views")


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What identifies a run. ``settings`` is JSON, with ``DATASET_PROMPT`` and ``FEATURE_PROPERTIES``."""

    key: str
    backbone: str
    dataset: str
    method: str
    label: str
    shots: int | str
    seed: int
    settings: str


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord(RunDescription):
    """A finished run, without its tests and what it learned.

    Attributes:
        columns: the method's own columns, by name.
        train_files: sha256 hex of the training images' files; None where nothing is learned or no store knows them.
            That of another dataset's follows it, where a run learns them first (``selection: imagenet_val``).
        losses: mean training loss of each epoch; None where nothing was trained by steps.
        extra: further numbers, by name.
    """

    backbone_digest: str
    columns: Mapping[str, Any]
    train_images: int
    train_files: str | None
    status: str
    seconds: float
    losses: Sequence[float] | np.ndarray | None
    extra: Mapping[str, Any]
    device: str


class ScoreInputs(NamedTuple):
    """What a test of a run depends on, besides the run. A run is tested again where any of it has changed.

    Attributes:
        test: sha256 hex of the dataset: class names, paths, labels, and which test images were not read.
        features: sha256 hex of the test features; None where they are not cached, or in results of version 1.
        images: sha256 hex of the test images' files; None where no store knows them, or in results of version 1.
        prompts: JSON list of the hand-written prompts that the score depends on; None in results of version 1.
        train_files: as in `RunRecord`. The run's key only covers these images' features at the test-time crop.
    """

    test: str
    features: str | None
    images: str | None
    prompts: str | None
    train_files: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRecord:
    """A test of a run on ``dataset``. Accuracies are in percent, NaN where the run's outputs are not finite.

    Attributes:
        class_names: in label order.
        labels: int (images,), the true labels.
        per_class: float (classes,), accuracies.
        predictions: uint16 (images,), predicted labels, or ``NO_CLASS``.
        confidence: float16 (images,), the softmax probability of each prediction.
    """

    dataset: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    inputs: ScoreInputs
    accuracy: float
    macro_accuracy: float
    per_class: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Runs that one worker does together, in the order in which the engine receives them.

    Attributes:
        method, backbone: names; of several methods joined, such as "coop + kgcoop".
        keys: of the runs.
        threads: number of threads of the worker.
        budget: bytes that training may use at once; None for runs without a trainer, which do not train together.
        cost: estimated seconds of one core.
        attempt: how often a batch of these runs has failed before.
    """

    method: str
    backbone: str
    keys: tuple[str, ...]
    threads: int
    budget: int | None = None
    cost: float = 0.0
    attempt: int = 0

    @property
    def name(self) -> str:
        """The name of its record and of its checkpoint."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()[:16]

    @property
    def trains(self) -> bool:
        """Whether a trainer trains its runs together, from a checkpoint where there is one."""
        return self.budget is not None
