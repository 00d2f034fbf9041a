"""The features that a grid needs: open them, cache them, count what is missing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import warn_once
from fastcoop.datasets.load import ClassNames
from fastcoop.features import FeatureStore, cache_all, open_if_there, store_path
from fastcoop.features.cache import plan_encoding, view_counts
from fastcoop.features.encode import Encoding
from fastcoop.grids.grid import read_grid
from fastcoop.grids.planning import LoadedGrid, load_grid
from fastcoop.progress import counted

OpenStore = Callable[[Path, Backbone, Dataset], FeatureStore | None]

log = logging.getLogger("fastcoop")


def cache_grid(
    grid: str | Path | Mapping[str, Any],
    *,
    data_root: str | Path | None = "data",
    cache: str | Path = "cache",
    dtype: str = "float16",
    precision: str | None = None,
    skip_unreadable: bool = False,
    device: str = "auto",
    class_names: ClassNames | None = None,
) -> Iterator[Path]:
    """Cache the features of all images that the runs of a grid can draw.

    Args:
        grid, data_root, cache, skip_unreadable, device, class_names: As `sweep` takes them.
        dtype: Of the stored features: "float16" or "float32".
        precision: Of the image tower's products, as `cache_features` takes it.

    Yields:
        The path of each feature store when it is complete.

    Raises:
        UserError: As `sweep` and `cache_features` do; for unreadable images only after everything else is stored.
    """
    root = Path(data_root) if data_root is not None else None
    loaded = load_grid(read_grid(grid), root, device, class_names)
    yield from cache_loaded(
        loaded, Path(cache), dtype=dtype, precision=precision, skip_unreadable=skip_unreadable
    )


def cache_loaded(
    loaded: LoadedGrid,
    cache: Path,
    *,
    dtype: str = "float16",
    precision: str | None = None,
    skip_unreadable: bool = False,
    retry_skipped: bool = True,
) -> Iterator[Path]:
    """As `cache_grid`, for a loaded grid. Training images are cached only for datasets that a method learns from."""
    grid = loaded.grid
    wanted = [(dataset, *grid.drawn(spec)) for spec, dataset in loaded.datasets.items()]
    return cache_all(
        loaded.backbones, wanted, cache, views=grid.views, kinds=grid.kinds, recipe=grid.recipe, dtype=dtype,
        precision=precision, skip_unreadable=skip_unreadable, retry_skipped=retry_skipped,
    )  # fmt: skip


def open_features(
    loaded: LoadedGrid, cache: Path, open_one: OpenStore = open_if_there
) -> list[Mapping[str, str] | None]:
    """Open all feature stores that exist; return the digests of their splits, None for those that do not exist."""
    for backbone in loaded.backbones:
        for dataset in loaded.datasets.values():
            path = store_path(cache, backbone, dataset)
            loaded.add_features(backbone, dataset, open_one(path, backbone, dataset))
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


def missing_crops(loaded: LoadedGrid) -> dict[tuple[str, str], int]:
    """Return how many crops (images times views) `cache_loaded` would encode, by names of backbone and dataset."""
    missing: dict[tuple[str, str], int] = {}
    grid = loaded.grid
    for backbone in loaded.backbones:
        for spec, dataset in loaded.datasets.items():
            if dataset.store is not None:  # imported features
                continue
            data = loaded.data(backbone.name, dataset.name)
            shots, seeds = grid.drawn(spec)
            subsets = (data.subset(number, seed).train for number in shots for seed in seeds)
            counts = view_counts(grid.kinds, grid.views)
            encoding = Encoding(backbone, dataset, grid.recipe, precision=None, **counts)
            plan = plan_encoding(encoding, subsets, data.store, leave_skipped=True)
            if crops := sum(chunk.crops for chunk in plan.chunks):
                missing[backbone.name, dataset.name] = crops
    return missing
