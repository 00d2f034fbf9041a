"""Which runs a grid stands for, and the key that says whether two runs are the same."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, FewShot
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, find_dataset
from fastcoop.grids.grid import Grid
from fastcoop.methods import METHODS, Data, FeatureBank, RunSpec
from fastcoop.methods.schedule import idle_settings

log = logging.getLogger("fastcoop")

RECIPE = 1  # raised when a change of the code changes what runs come to: older results are then not theirs


class LoadedGrid(FeatureBank):
    """A grid with the backbones and datasets that it names.

    Attributes:
        grid: the grid.
        named: backbones by the grid's names for them.
        datasets: datasets by the grid's names for them.
        features: datasets with their features, by names of backbone and dataset.
    """

    def __init__(self, grid: Grid, named: dict[str, Backbone], datasets: dict[str, Dataset]):
        self.grid, self.named, self.datasets = grid, named, datasets
        self.features: dict[tuple[str, str], Data] = {}
        self._by_name = {backbone.name: backbone for backbone in named.values()}

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        return tuple(self.named.values())

    def backbone(self, name: str) -> Backbone:
        return self._by_name[name]

    def data(self, backbone: str, dataset: str) -> Data:
        return self.features[backbone, dataset]

    def add_features(self, backbone: Backbone, dataset: Dataset, store: FeatureStore | None) -> None:
        """Set the features of a dataset; None if they are not cached yet."""
        names = backbone.name, dataset.name
        self.features.setdefault(names, Data(dataset, None, self.grid.views)).store = store

    def resolve(self, run: RunSpec) -> RunSpec:
        """Return a run of the grid bound, by the names of what it is bound to."""
        targets = tuple(self.datasets[spec].name for spec in run.target_names)
        backbone, dataset = self.named[run.backbone].name, self.datasets[run.dataset].name
        return self.bind(replace(run, backbone=backbone, dataset=dataset, target_names=targets))


def load_grid(grid: Grid, data_root: Path | None, device: str) -> LoadedGrid:
    """Load all that a grid names.

    Raises:
        UserError: something of it does not exist or cannot be used, or two of it share a name.
    """
    from fastcoop.backbones import backbone_from_spec

    datasets = {
        spec: find_dataset(spec, data_root) for spec in dict.fromkeys((*grid.datasets, *grid.targets))
    }
    refuse_shared_names("datasets", datasets)
    _warn_of_imported_features(grid, datasets.values())
    for block in grid.blocks:
        learns = [name for name, _ in block.methods if METHODS[name].learns]
        untaught = [spec for spec in block.datasets if "train" not in datasets[spec].splits]
        if learns and untaught:
            raise UserError(
                f'The dataset "{untaught[0]}" has only test images, so {learns[0]} cannot learn from it; name it '
                "under targets instead."
            )
    backbones = {spec: backbone_from_spec(spec, device=device) for spec in grid.backbones}
    refuse_shared_names("backbones", backbones)
    return LoadedGrid(grid, backbones, datasets)


def _warn_of_imported_features(grid: Grid, datasets: Iterable[Dataset]) -> None:
    """Say which keys of the grid change nothing for datasets of imported features, which are as they were given."""
    for dataset in datasets:
        if dataset.store is None:
            continue
        views = FeatureStore.open(dataset.store).meta.views
        idle = ["views"] * ("views" in grid.source and grid.views > views)
        idle += ["recipe"] * ("recipe" in grid.source)
        if idle:
            log.warning(
                "%s holds imported features with %d augmented views; %s of the grid changes nothing for it.",
                *(dataset.name, views, " and ".join(idle)),
            )


def refuse_shared_names(kind: str, found: Mapping[str, Dataset] | Mapping[str, Backbone]) -> None:
    """Raise UserError for two backbones, or two datasets, by how they were given, that files and results could not tell
    apart: of one name, but for the case or the composition of its letters; or halves of two datasets of one name."""
    by_name: dict[str, str] = {}
    wholes: dict[str, tuple[str, Dataset]] = {}
    for spec, one in found.items():
        name = _folded(one.name)
        if name in by_name:
            raise UserError(
                f'The {kind} "{by_name[name]}" and "{spec}" are both called {one.name}; rename one.'
            )
        by_name[name] = spec
        if isinstance(one, Dataset):
            whole = one.whole or one
            first, known = wholes.setdefault(_folded(whole.name), (spec, whole))
            if known.digest != whole.digest:
                raise UserError(
                    f'The datasets "{first}" and "{spec}" are of two datasets called {whole.name}; rename one.'
                )


def _folded(name: str) -> str:
    """A name as the least exact of file systems compares it."""
    return unicodedata.normalize("NFC", name).casefold()


def plan_runs(loaded: LoadedGrid) -> list[RunSpec]:
    """Every distinct run of the grid, method by method, then dataset by dataset.

    Settings that come to the same run (an epoch number written out, say) make one.

    Raises:
        UserError: a run that cannot be done.
    """
    keys = Keys()
    planned: dict[str, RunSpec] = {}
    for named in loaded.grid.runs():
        run = loaded.resolve(named)
        METHODS[run.method].check(run)
        run = replace(run, key=keys.of(run))
        known = planned.get(run.key)
        if known is not None:  # named again, maybe to be tested on more
            _refuse_copy(known, run)
            targets = tuple(dict.fromkeys((*known.targets, *run.targets)))
            run = known if targets == known.targets else known.with_targets(targets)
        planned[run.key] = run
    refuse_long_prompts(planned.values())
    return list(planned.values())


def warn_of_idle_settings(planned: Iterable[RunSpec]) -> None:
    """Say which settings change nothing in some of the runs."""
    by_method: dict[str, list[RunSpec]] = {}
    for run in planned:
        by_method.setdefault(run.method, []).append(run)
    for method, runs in by_method.items():
        for sentence in idle_settings(method, runs):
            log.warning(sentence)


def refuse_long_prompts(planned: Iterable[RunSpec], checked: set[tuple[Any, ...]] | None = None) -> None:
    """Raise UserError, before hours go into features, for class names of a run's dataset or targets that are too long
    for its prompts.

    checked: what was found to be right before; more is added.
    """
    from fastcoop.methods.text import check_class_names, check_prompts
    from fastcoop.prompts.layout import class_prompts

    checked = set() if checked is None else checked
    for run in planned:
        method, backbone = METHODS[run.method], run.model
        layout = method.layout(run.settings, backbone)
        for data in run.tests:
            for form in (*method.prompts(run.settings, data), *((layout,) if layout else ())):
                what = (id(backbone), data.class_names, form)
                if what in checked:
                    continue
                check_class_names(backbone, data)
                if isinstance(form, str):
                    check_prompts(backbone, data, form)
                else:
                    class_prompts(backbone.tokenizer, data.class_names, form, backbone.text.context_length)
                checked.add(what)


def _refuse_copy(known: RunSpec, run: RunSpec) -> None:
    if known.model is not run.model:
        raise UserError(
            f"The backbones {known.backbone} and {run.backbone} have the same weights, so their runs would be the "
            "same; use one of them."
        )
    if known.data is not run.data:
        raise UserError(
            f"The datasets {known.dataset} and {run.dataset} hold the same images and class names, so their runs would "
            "be the same; use one of them."
        )


def run_key(run: RunSpec) -> str:
    """sha256 hex of all that determines what a run comes to. Targets are not part of it: they are further
    tests of the same run.

    Before the features that a run needs are cached its key is a provisional one.
    """
    facts: dict[str, Any] = {
        "recipe": RECIPE,
        "method": run.method,
        "settings": METHODS[run.method].key_settings(run, run.model),
        "backbone": run.model.digest,
        "dataset": run.data.dataset.digest,
        "features": run.data.store.digest if run.data.store else [run.data.name],
        "shots": run.shots,
        "seed": run.seed,
        "subset": run.subset and _subset_digests(run.data, run.subset),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Keys:
    """``run_key`` for many runs: what they have in common is worked out once.

    ``key_settings`` is asked once for runs that differ in nothing but their seed, and in which images it drew.
    """

    def __init__(self) -> None:
        self._settings: dict[tuple[Any, ...], str] = {}
        self._subsets: dict[tuple[int, int], tuple[Data, FewShot, str]] = {}
        self._data: dict[tuple[int, int], tuple[Data, str]] = {}

    def of(self, run: RunSpec) -> str:
        """The run's key. Its facts stand in the order of their names, as ``json.dumps`` sorts them."""
        text = (
            f'{{{self._of_data(run.data, run.model)}, "method": "{run.method}", "recipe": {RECIPE}, '
            f'"seed": {run.seed}, "settings": {self._of_settings(run)}, "shots": {json.dumps(run.shots)}, '
            f'"subset": {self._of_subset(run.data, run.subset)}}}'
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _of_data(self, data: Data, backbone: Backbone) -> str:
        known = self._data.get((id(data), id(backbone)))
        if known is None:
            features = data.store.digest if data.store else [data.name]
            facts = {"backbone": backbone.digest, "dataset": data.dataset.digest, "features": features}
            known = self._data[id(data), id(backbone)] = data, json.dumps(facts)[1:-1]
        return known[1]

    def _of_settings(self, run: RunSpec) -> str:
        sizes = (len(run.subset.train), len(run.subset.val)) if run.subset else None
        alike = id(run.settings), run.method, id(run.data), id(run.model), run.shots, sizes
        if alike not in self._settings:
            settings = METHODS[run.method].key_settings(run, run.model)
            self._settings[alike] = json.dumps(settings, sort_keys=True)
        return self._settings[alike]

    def _of_subset(self, data: Data, subset: FewShot | None) -> str:
        if subset is None:
            return "null"
        both = id(data), id(subset)
        if both not in self._subsets:
            text = json.dumps(_subset_digests(data, subset))
            self._subsets[both] = data, subset, text  # kept, or their ids might be others'
        return self._subsets[both][2]


def _subset_digests(data: Data, subset: FewShot) -> list[str | None]:
    """Which images are drawn, and the features that are learned from; None in place of those not cached yet."""
    features = data.store.train_digest(subset.train) if data.store else None
    return [_digest(subset.train), _digest(subset.val), features]


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
