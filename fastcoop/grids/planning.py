"""From a grid to its distinct runs, with everything that they name loaded and checked."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.datasets.load import ClassNames
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, find_datasets
from fastcoop.grids.grid import Grid
from fastcoop.grids.keys import RunKeys
from fastcoop.methods import METHODS, Data, FeatureBank, RunSpec
from fastcoop.methods.schedule import unused_settings

log = logging.getLogger("fastcoop")


class LoadedGrid(FeatureBank):
    """A grid with the backbones and datasets that it names.

    Attributes:
        grid: The grid.
        named: Backbones by the grid's names for them.
        datasets: Datasets by the grid's names for them.
        features: Datasets with their features, by names of backbone and dataset.
    """

    def __init__(self, grid: Grid, named: dict[str, Backbone], datasets: dict[str, Dataset]):
        self.grid, self.named, self.datasets = grid, named, datasets
        self.features: dict[tuple[str, str], Data] = {}

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        return tuple(self.named.values())

    def backbone(self, name: str) -> Backbone:
        return next(backbone for backbone in self.named.values() if backbone.name == name)

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


def load_grid(
    grid: Grid,
    data_root: Path | None,
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
    from fastcoop.backbones import backbone_from_spec

    found = find_datasets((*grid.datasets, *grid.targets), data_root, class_names)
    datasets = {str(spec): dataset for spec, dataset in found.items()}
    refuse_shared_names("datasets", datasets)
    for dataset in datasets.values():
        _warn_of_unused_keys(grid, dataset)
    for block in grid.blocks:
        learns = [name for name, _ in block.methods if METHODS[name].learns]
        without_train = [spec for spec in block.datasets if "train" not in datasets[spec].splits]
        if learns and without_train:
            raise UserError(
                f'The dataset "{without_train[0]}" has only test images, so {learns[0]} cannot learn from it; name it '
                "under targets instead."
            )
    load = load or partial(backbone_from_spec, device=device)
    backbones = {spec: load(spec) for spec in grid.backbones}
    refuse_shared_names("backbones", backbones)
    return LoadedGrid(grid, backbones, datasets)


def _warn_of_unused_keys(grid: Grid, dataset: Dataset) -> None:
    """Warn of keys of the grid that have no effect on imported features."""
    if dataset.store is None:
        return
    views = FeatureStore.open(dataset.store).meta.views
    unused = ["views"] * ("views" in grid.source and grid.views > views) + ["recipe"] * (
        "recipe" in grid.source
    )
    if unused:
        log.warning(
            "%s holds imported features with %d augmented views; %s of the grid changes nothing for it.",
            *(dataset.name, views, " and ".join(unused)),
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

    by_name: dict[str, str] = {}
    wholes: dict[str, tuple[str, Dataset]] = {}
    for spec, one in found.items():
        first = by_name.setdefault(folded(one.name), spec)
        if first != spec:
            raise UserError(f'The {kind} "{first}" and "{spec}" are both called {one.name}; rename one.')
        if isinstance(one, Dataset):
            whole = one.whole or one
            first, known = wholes.setdefault(folded(whole.name), (spec, whole))
            if known.digest != whole.digest:
                raise UserError(
                    f'The datasets "{first}" and "{spec}" are of two datasets called {whole.name}; rename one.'
                )


def plan_runs(loaded: LoadedGrid) -> list[RunSpec]:
    """Return every distinct run of a grid with its key, method by method, then dataset by dataset.

    Runs of the same key are one run, such as those of equal epochs given as a number and as "paper".

    Raises:
        UserError: A run cannot be done.
    """
    keys = RunKeys()
    planned: dict[str, RunSpec] = {}
    for named in loaded.grid.runs():
        run = loaded.resolve(named)
        _refuse_tower(run)
        METHODS[run.method].check(run)
        run = replace(run, key=keys.of(run))
        known = planned.get(run.key)
        if known is not None:  # it has the targets of both
            for kind, same in (("backbone", "weights"), ("dataset", "images and class names")):
                if (first := getattr(known, kind)) != (second := getattr(run, kind)):
                    raise UserError(
                        f"The {kind}s {first} and {second} have the same {same}, so their runs would be the same; use "
                        "one of them."
                    )
            targets = tuple(dict.fromkeys((*known.targets, *run.targets)))
            run = known if targets == known.targets else known.with_targets(targets)
        planned[run.key] = run
    refuse_long_prompts(planned.values())
    return list(planned.values())


def _refuse_tower(run: RunSpec) -> None:
    """Refuse a run whose method cannot compute prompts with the backbone's text tower."""
    method, (path, reason) = METHODS[run.method], run.model.prompt_path
    if path != "shared" and (
        method.needs_causal_tower or (path is None and method.layout(run.settings, run.model, run.data))
    ):
        raise UserError(
            f'The method "{run.method}" cannot run on the backbone {run.model.name}: {reason}. Leave out the method '
            "there, or use a backbone such as RN50 or ViT-B-16; zero-shot, ensembles and probes run on every backbone."
        )


def warn_of_unused_settings(planned: Iterable[RunSpec]) -> None:
    """Warn of settings that have no effect in some of the runs, and of what their methods note."""
    planned = list(planned)
    for method in dict.fromkeys(run.method for run in planned):
        runs = [run for run in planned if run.method == method]
        for sentence in (*unused_settings(method, runs), *METHODS[method].notes(runs)):
            log.warning(sentence)


def refuse_long_prompts(planned: Iterable[RunSpec], checked: set[tuple[Any, ...]] | None = None) -> None:
    """Refuse class names that are too long for the prompts of a run, before features are computed.

    Args:
        planned: The runs, with their datasets and targets.
        checked: Prompts that are known to fit; those of these runs are added.

    Raises:
        UserError: A prompt with a class name is longer than the text tower takes.
    """
    from fastcoop.methods.text import check_class_names, check_prompts
    from fastcoop.prompts.plain import check_class_prompts

    checked = set() if checked is None else checked
    for run in planned:
        method, backbone = METHODS[run.method], run.model
        for data in run.tests:
            layout = method.layout(run.settings, backbone, data)
            for form in (*method.prompts(run.settings, data), *((layout,) if layout else ())):
                what = (id(backbone), data.class_names, form)
                if what in checked:
                    continue
                check_class_names(backbone, data)
                if isinstance(form, str):
                    check_prompts(backbone, data, form)
                else:
                    check_class_prompts(backbone, data.class_names, form)
                checked.add(what)
