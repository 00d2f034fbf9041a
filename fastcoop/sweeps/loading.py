"""What a grid names, loaded and checked: its backbones, its datasets and their features."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastcoop import backbones
from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import warn_once
from fastcoop.datasets.load import ClassNames
from fastcoop.errors import UserError
from fastcoop.features.store import FeatureStore, find_datasets, open_if_there, store_path
from fastcoop.grids import Grid
from fastcoop.methods import Data, FeatureBank, RunSpec
from fastcoop.methods.late import Backbone
from fastcoop.progress import counted

OpenStore = Callable[[Path, Backbone, Dataset], FeatureStore | None]

log = logging.getLogger("fastcoop")


class LoadedGrid(FeatureBank):
    """A grid with the backbones and datasets that it names.

    Attributes:
        grid: The grid.
        named: Backbones by the grid's names for them.
        datasets: Datasets by the grid's names for them.
        features: Datasets with their features, none before `open_features`, by names of backbone and dataset.
    """

    def __init__(self, grid: Grid, named: dict[str, Backbone], datasets: dict[str, Dataset]):
        self.grid, self.named, self.datasets = grid, named, datasets
        self.features = {
            (backbone.name, dataset.name): Data(dataset, None, grid.views)
            for backbone in named.values()
            for dataset in datasets.values()
        }

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        return tuple(self.named.values())

    def backbone(self, name: str) -> Backbone:
        return next(backbone for backbone in self.named.values() if backbone.name == name)

    def data(self, backbone: str, dataset: str) -> Data:
        return self.features[backbone, dataset]

    def runs(self) -> Iterator[RunSpec[Any]]:
        """Yield the runs of the grid bound, by the names of what they are bound to."""
        for run in self.grid.runs():
            targets = tuple(self.datasets[spec].name for spec in run.target_names)
            backbone, dataset = self.named[run.backbone].name, self.datasets[run.dataset].name
            yield self.bind(replace(run, backbone=backbone, dataset=dataset, target_names=targets))


def load_grid(
    grid: Grid,
    data_root: str | Path | None,
    device: str,
    class_names: ClassNames | None = None,
    load: Callable[[str], Backbone] | None = None,
) -> LoadedGrid:
    """Load the backbones and datasets of a grid.

    Args:
        grid: The grid.
        data_root: Folder of the datasets.
        device: Of the backbones.
        class_names: As `find_datasets` takes them.
        load: Loads a backbone, in place of `backbone_from_spec`.

    Raises:
        UserError: One of them does not exist or cannot be used, or two of them share a name.
    """
    found = find_datasets((*grid.datasets, *grid.targets), data_root, class_names)
    datasets = {str(spec): dataset for spec, dataset in found.items()}
    refuse_shared_names("datasets", datasets)
    for dataset in datasets.values():
        _warn_of_unused_keys(grid, dataset)
    for block in grid.blocks:
        without_train = [spec for spec in block.datasets if "train" not in datasets[spec].splits]
        if block.learning and without_train:
            method = block.learning[0].name
            raise UserError(
                f'The dataset "{without_train[0]}" has only test images, so {method} cannot learn from it; name it '
                "under targets instead."
            )
    load = load or partial(backbones.backbone_from_spec, device=device)
    named = {spec: load(spec) for spec in grid.backbones}
    refuse_shared_names("backbones", named)
    return LoadedGrid(grid, named, datasets)


def _warn_of_unused_keys(grid: Grid, dataset: Dataset) -> None:
    """Warn of keys of the grid that have no effect on imported features."""
    if dataset.store is None:
        return
    views, given = FeatureStore.open(dataset.store).meta.views, grid.source
    unused = ["views"] * ("views" in given and grid.views > views) + ["recipe"] * ("recipe" in given)
    if unused:
        log.warning(
            f"{dataset.name} holds imported features with {views} augmented views; {' and '.join(unused)} of the grid "
            "changes nothing for it."
        )


def refuse_shared_names(kind: str, found: Mapping[str, Dataset] | Mapping[str, Backbone]) -> None:
    """Refuse backbones or datasets that files and results could not tell apart.

    Args:
        kind: "backbones" or "datasets", for the message.
        found: What the grid names, by the grid's names.

    Raises:
        UserError: Two names are equal, or differ only in the case or the composition of their letters; or two halves
            are of two datasets with one name.
    """

    def folded(name: str) -> str:  # as file systems that ignore case and composition compare names
        return unicodedata.normalize("NFC", name).casefold()

    first: dict[str, str] = {}
    wholes: dict[str, tuple[str, Dataset | Backbone]] = {}
    for spec, one in found.items():
        if (other := first.setdefault(folded(one.name), spec)) != spec:
            raise UserError(f'The {kind} "{other}" and "{spec}" are both called {one.name}; rename one.')
        whole = (one.whole if isinstance(one, Dataset) else None) or one
        other, same = wholes.setdefault(folded(whole.name), (spec, whole))
        if same.digest != whole.digest:
            raise UserError(
                f'The datasets "{other}" and "{spec}" are of two datasets called {whole.name}; rename one.'
            )


def open_features(
    loaded: LoadedGrid, cache: Path, open_one: OpenStore = open_if_there
) -> list[Mapping[str, str] | None]:
    """Open all feature stores that exist; return the digests of their splits, None for those that do not exist."""
    for (name, _), data in loaded.features.items():
        backbone = loaded.backbone(name)
        data.store = open_one(store_path(cache, backbone, data.dataset), backbone, data.dataset)
    stores = [data.store for data in loaded.features.values()]
    precisions = Counter(store.meta.precision for store in stores if store)
    if len(precisions) > 1:
        listed = ", ".join(f"{precision} in {count}" for precision, count in sorted(precisions.items()))
        warn_once(f"The precision of this grid's feature stores is not the same: {listed}.")
    return [store.meta.sha256 if store else None for store in stores]


def open_unchanged(path: Path, backbone: Backbone, dataset: Dataset) -> FeatureStore | None:
    """Open a store, if it exists, without images whose files have changed, and warn about those."""
    store = open_if_there(path, backbone, dataset, only_unchanged=True)
    if store is not None and store.changed_images:
        log.warning(
            f"{counted(store.changed_images, 'image file')} of {dataset.name} changed since the last encoding; a sweep "
            "would encode again."
        )
    return store
