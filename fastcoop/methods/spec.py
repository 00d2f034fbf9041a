"""The description of a run, the same from the grid file to the results, and the features that runs read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from fastcoop.datasets import FewShot
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone

S = TypeVar("S")


# ruff: noqa: RUF009 (the call returns a field)
def _not_compared(default: Any = None) -> Any:
    return field(default=default, compare=False, repr=False)


@dataclass(frozen=True)
class RunSpec(Generic[S]):
    """One run. A grid creates it with names; `FeatureBank.bind` adds the objects that the names stand for.

    Attributes:
        method: Name of the method.
        settings: Settings of the method, as the grid gave them.
        backbone, dataset: Names; before planning, as the grid file has them.
        shots: Training images per class, or "all"; 0 for runs that learn from no subset.
        seed: Seed of the few-shot subset and of everything else that is random; 0 for runs that learn from no subset.
        target_names: Names of further datasets to test on.
        key: SHA-256 hex digest of everything that determines the result; "" before planning.
        contexts: What the run has learned already, where only tests are left; None otherwise.
        weights: The same for methods that learn other arrays (see ``Outcome``); {} for methods that learn nothing.
        model: The backbone. It and the objects below are None before binding, and on the way to a worker process.
        data: The dataset that the run learns from, and its features.
        subset: The few-shot subset to learn from; None for runs that learn from none.
        targets: Further datasets to test on, and their features.
        tuning: The dataset that the run's values are chosen on (`Method.tuned_on`), if the grid names it.
    """

    method: str
    settings: S
    backbone: str
    dataset: str
    shots: int | str = 0
    seed: int = 0
    target_names: tuple[str, ...] = ()
    key: str = ""
    contexts: np.ndarray | None = _not_compared()
    weights: Mapping[str, np.ndarray] = _not_compared()
    model: Backbone = _not_compared()
    data: Data = _not_compared()
    subset: FewShot = _not_compared()
    targets: tuple[Data, ...] = _not_compared(())
    tuning: Data | None = _not_compared()

    @classmethod
    def of(cls, method: str, settings: S, data: Data, model: Any = None, **others: Any) -> RunSpec[S]:
        """Return a run bound to objects; ``others`` are further fields, such as ``subset`` or ``key``."""
        run = cls(method, settings, model.name if model else "", data.name, model=model, data=data, **others)
        return run.with_targets(run.targets)

    @property
    def has_learned(self) -> bool:
        """Whether only tests are left to do."""
        return self.contexts is not None or self.weights is not None

    @property
    def tests(self) -> tuple[Data, ...]:
        """Datasets to test on: the run's own and its targets, or the targets only if the run has learned before."""
        return self.targets if self.has_learned else (self.data, *self.targets)

    def with_targets(self, targets: tuple[Data, ...]) -> RunSpec[S]:
        """Return the run with other datasets to test on."""
        return replace(self, target_names=tuple(data.name for data in targets), targets=targets)

    def unbound(self) -> RunSpec[S]:
        """Return the run by names only, small enough to send to another process."""
        nothing: Any = None
        return replace(self, model=nothing, data=nothing, subset=nothing, targets=(), tuning=None)


def method_names(runs: Iterable[RunSpec[Any]]) -> str:
    """Return the names of the runs' methods, such as "coop + kgcoop"."""
    return " + ".join(sorted({run.method for run in runs}))


class FeatureBank(ABC):
    """Backbones, and datasets with their features, by name.

    There is one `Data` per backbone and dataset, which keeps the training features that it has read by few-shot subset,
    so all runs of a subset share them.
    """

    @abstractmethod
    def backbone(self, name: str) -> Backbone:
        """Return the backbone of this name."""

    @abstractmethod
    def data(self, backbone: str, dataset: str) -> Data:
        """Return the dataset of this name, with its features by this backbone."""

    def bind(self, run: RunSpec[S]) -> RunSpec[S]:
        """Return the run with the objects that its names stand for."""
        from fastcoop.methods import METHODS

        data = self.data(run.backbone, run.dataset)
        targets = tuple(self.data(run.backbone, name) for name in run.target_names)
        subset: Any = data.subset(run.shots, run.seed) if run.shots else None
        tuning = None
        if (tuned_on := METHODS[run.method].tuned_on(run.settings)) is not None:
            with suppress(KeyError):  # `Method.check` refuses a dataset that the grid does not name
                tuning = self.data(run.backbone, tuned_on)
        model = self.backbone(run.backbone)
        return replace(run, model=model, data=data, subset=subset, targets=targets, tuning=tuning)
