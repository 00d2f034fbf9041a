"""The features that a grid needs: cached before its runs, or by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastcoop.features import cache_all
from fastcoop.features.plan import Settings, make_plan
from fastcoop.grids.grid import read_grid
from fastcoop.grids.plan import LoadedGrid, load_grid


def cache_grid(
    grid: str | Path,
    *,
    data_root: str | Path | None = "data",
    cache: str | Path = "cache",
    dtype: str = "float16",
    skip_unreadable: bool = False,
    device: str = "cpu",
) -> Iterator[Path]:
    """Cache what the runs of a grid file can draw, yielding each store's path as it is done.

    Raises UserError as ``sweep`` and ``cache_features`` do; for unreadable images only when all the rest is
    stored.
    """
    world = load_grid(read_grid(grid), Path(data_root) if data_root is not None else None, device)
    yield from cache_world(world, Path(cache), dtype=dtype, skip_unreadable=skip_unreadable)


def cache_world(
    world: LoadedGrid,
    cache: Path,
    *,
    dtype: str = "float16",
    skip_unreadable: bool = False,
    retry_skipped: bool = True,
) -> Iterator[Path]:
    """The same for a grid that is loaded. Training images are cached of datasets that a method learns from."""
    grid = world.grid
    wanted = [(dataset, *grid.drawn(spec)) for spec, dataset in world.datasets.items()]
    return cache_all(
        world.backbones, wanted, cache, views=grid.views, recipe=grid.recipe, dtype=dtype,
        skip_unreadable=skip_unreadable, retry_skipped=retry_skipped,
    )  # fmt: skip


def missing_crops(world: LoadedGrid) -> dict[tuple[str, str], int]:
    """Images and views that ``cache_world`` has to encode, by names of backbone and dataset; those of none left out."""
    missing: dict[tuple[str, str], int] = {}
    settings = Settings(world.grid.recipe, 0, world.grid.views, "float16", 1)
    for backbone in world.backbones:
        for spec, dataset in world.datasets.items():
            data = world.data(backbone.name, dataset.name)
            wanted = {split: np.arange(len(images)) for split, images in dataset.splits.items()}
            if "train" in wanted:
                shots, seeds = world.grid.drawn(spec)
                drawn = [data.subset(number, seed).train for number in shots for seed in seeds]
                wanted["train"] = np.unique(np.concatenate([np.zeros(0, np.int64), *drawn]))
            if dataset.store is None:
                plan = make_plan(backbone, dataset, wanted, settings, data.store, True)
                crops = sum(len(part.rows) * len(part.views) for part in plan.parts)
                missing |= {(backbone.name, dataset.name): crops} if crops else {}
    return missing
