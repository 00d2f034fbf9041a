"""Which runs a grid stands for, and the key that says whether two runs are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, find_dataset
from fastcoop.methods import METHODS, Data, Job
from fastcoop.sweeps.grid import Grid

RECIPE = 1  # raised when a change of the code changes what runs come to: older results are then not theirs


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run of the grid: its key, its method's name, its backbone and its job."""

    key: str
    method: str
    backbone: Backbone
    job: Job

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the datasets that the run is tested on."""
        return tuple(data.name for data in (self.job.data, *self.job.targets))


@dataclass(frozen=True)
class World:
    """What a grid names, loaded: backbones, datasets by the grid's names for them, features by both names."""

    grid: Grid
    backbones: tuple[Backbone, ...]
    datasets: dict[str, Dataset]
    data: dict[tuple[str, str], Data] = field(default_factory=dict)

    def add_features(self, backbone: Backbone, dataset: Dataset, store: FeatureStore | None) -> None:
        """State the features of a dataset; None where they are not cached yet."""
        names = backbone.name, dataset.name
        self.data.setdefault(names, Data(dataset, None, self.grid.views)).store = store


def load_world(grid: Grid, data_root: Path | None, device: str) -> World:
    """Load all that a grid names.

    Raises:
        UserError: something of it does not exist or cannot be used, or two of it share a name.
    """
    from fastcoop.backbones import backbone_from_spec

    targets = (target for targets in grid.targets.values() for target in targets)
    specs = dict.fromkeys([*grid.datasets, *targets])
    datasets = {spec: find_dataset(spec, data_root) for spec in specs}
    _refuse_shared("datasets", {spec: dataset.name for spec, dataset in datasets.items()})
    learns = [name for name, _ in grid.methods if METHODS[name].learns]
    for spec in grid.datasets:
        if learns and "train" not in datasets[spec].splits:
            raise UserError(
                f'The dataset "{spec}" has only test images, so {learns[0]} cannot learn from it; name it '
                "under targets instead."
            )
    backbones = {spec: backbone_from_spec(spec, device=device) for spec in grid.backbones}
    _refuse_shared("backbones", {spec: backbone.name for spec, backbone in backbones.items()})
    return World(grid, tuple(backbones.values()), datasets)


def _refuse_shared(kind: str, names: dict[str, str]) -> None:
    by_name: dict[str, str] = {}
    for spec, name in names.items():
        if name in by_name:
            raise UserError(f'The {kind} "{by_name[name]}" and "{spec}" are both called {name}; rename one.')
        by_name[name] = spec


def plan_runs(world: World) -> list[PlannedRun]:
    """Every distinct run of the grid, method by method, then dataset by dataset.

    Settings that come to the same run (an epoch number written out, say) make one.

    Raises:
        UserError: a run that cannot be done.
    """
    planned: dict[str, PlannedRun] = {}
    for backbone in world.backbones:
        for method in dict.fromkeys(name for name, _ in world.grid.methods):
            for job in _jobs(world, backbone, method):
                METHODS[method].check(job)
                key = run_key(method, job, backbone)
                planned.setdefault(key, PlannedRun(key, method, backbone, job))
    return list(planned.values())


def _jobs(world: World, backbone: Backbone, method: str) -> Iterator[Job]:
    grid = world.grid
    for spec in grid.datasets:
        data = world.data[backbone.name, world.datasets[spec].name]
        names = [world.datasets[target].name for target in grid.targets.get(spec, ())]
        targets = tuple(world.data[backbone.name, name] for name in names)
        for settings in grid.runs_of(method):
            if not METHODS[method].learns:
                yield Job(settings, data, targets=targets)
                continue
            for shots in grid.shots:
                for seed in grid.seeds:
                    yield Job(settings, data, data.subset(shots, seed), shots, seed, targets)


def run_key(method: str, job: Job, backbone: Backbone) -> str:
    """sha256 hex of all that determines what a run comes to. Targets are not part of it: they are further
    tests of the same run."""
    facts: dict[str, Any] = {
        "recipe": RECIPE,
        "method": method,
        "settings": METHODS[method].determined_by(job, backbone),
        "backbone": backbone.digest,
        "dataset": job.data.dataset.digest,
        "features": job.data.store.digest if job.data.store else None,
        "shots": job.shots,
        "seed": job.seed,
        "subset": job.subset and [_digest(job.subset.train), _digest(job.subset.val)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
