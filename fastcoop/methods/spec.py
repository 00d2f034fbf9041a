"""The description of a run, the same from the grid file to the results, and the features that runs read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from fastcoop.methods.data import Data

if TYPE_CHECKING:  # workers import this package without torch
    from fastcoop.backbones import Backbone
    from fastcoop.datasets import FewShot

S = TypeVar("S")


class Inputs(NamedTuple):
    """The objects that a run's names stand for.

    Attributes:
        backbone: The frozen CLIP; None for methods that need none.
        data: The dataset and its features.
        subset: The few-shot subset to learn from; None for runs that learn from none.
        targets: Further datasets to test on.
    """

    backbone: Backbone | None
    data: Data
    subset: FewShot | None = None
    targets: tuple[Data, ...] = ()


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
        inputs: The objects behind the names; None before they are loaded, and on the way to a worker process.
    """

    method: str
    settings: S
    backbone: str
    dataset: str
    shots: int | str = 0
    seed: int = 0
    target_names: tuple[str, ...] = ()
    key: str = ""
    contexts: np.ndarray | None = field(default=None, compare=False)
    weights: Mapping[str, np.ndarray] | None = field(default=None, compare=False)
    inputs: Inputs | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        method: str,
        settings: S,
        data: Data,
        subset: FewShot | None = None,
        shots: int | str = 0,
        seed: int = 0,
        targets: tuple[Data, ...] = (),
        *,
        backbone: Backbone | None = None,
        **others: Any,
    ) -> RunSpec[S]:
        """Return a run bound to objects; ``others`` are further fields, such as ``key``."""
        name = backbone.name if backbone else ""
        inputs = Inputs(backbone, data, subset)
        run = cls(method, settings, name, data.name, shots, seed, inputs=inputs, **others)
        return run.with_targets(targets)

    @property
    def loaded(self) -> Inputs:
        """The objects behind the names."""
        assert self.inputs is not None, "a run is bound to its inputs before it is worked on"
        return self.inputs

    @property
    def model(self) -> Backbone:
        """The backbone itself."""
        backbone = self.loaded.backbone
        assert backbone is not None
        return backbone

    @property
    def data(self) -> Data:
        """The dataset that the run learns from, and its features."""
        return self.loaded.data

    @property
    def subset(self) -> FewShot | None:
        """The few-shot subset that the run learns from; None for runs that learn from none."""
        return self.loaded.subset

    @property
    def targets(self) -> tuple[Data, ...]:
        """Further datasets to test on."""
        return self.loaded.targets

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
        names = tuple(data.name for data in targets)
        return replace(self, target_names=names, inputs=self.loaded._replace(targets=targets))

    def unbound(self) -> RunSpec[S]:
        """Return the run by names only, small enough to send to another process."""
        return replace(self, inputs=None)


class FeatureBank(ABC):
    """Backbones, and datasets with their features, by name.

    There is one `Data` per backbone and dataset, which keeps the training features that it has read by few-shot subset,
    so all runs of a subset share them.
    """

    @abstractmethod
    def backbone(self, name: str) -> Backbone:
        """The backbone of this name."""

    @abstractmethod
    def data(self, backbone: str, dataset: str) -> Data:
        """The dataset of this name, with its features by this backbone."""

    def bind(self, run: RunSpec[S]) -> RunSpec[S]:
        """Return the run with the objects that its names stand for."""
        data = self.data(run.backbone, run.dataset)
        subset = data.subset(run.shots, run.seed) if run.shots else None
        targets = tuple(self.data(run.backbone, name) for name in run.target_names)
        return replace(run, inputs=Inputs(self.backbone(run.backbone), data, subset, targets))
