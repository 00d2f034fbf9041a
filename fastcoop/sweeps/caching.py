"""The features that a grid needs: cache them, count what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastcoop import features
from fastcoop.datasets.load import ClassNames
from fastcoop.features.plan import Encoding, plan_encoding, view_counts
from fastcoop.grids.grid import read_grid
from fastcoop.sweeps.loading import LoadedGrid, load_grid


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
    loaded = load_grid(read_grid(grid), data_root, device, class_names)
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
    return features.cache_all(
        loaded.backbones, wanted, cache, views=grid.views, kinds=grid.kinds, recipe=grid.recipe, dtype=dtype,
        precision=precision, skip_unreadable=skip_unreadable, retry_skipped=retry_skipped,
    )  # fmt: skip


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
