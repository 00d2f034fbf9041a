"""The features that a grid needs: cached before its runs, or by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastcoop.features import cache_all
from fastcoop.methods import METHODS
from fastcoop.sweeps.grid import read_grid
from fastcoop.sweeps.plan import World, load_world


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
    world = load_world(read_grid(grid), Path(data_root) if data_root is not None else None, device)
    yield from cache_world(world, Path(cache), dtype=dtype, skip_unreadable=skip_unreadable)


def cache_world(
    world: World,
    cache: Path,
    *,
    dtype: str = "float16",
    skip_unreadable: bool = False,
    retry_skipped: bool = True,
) -> Iterator[Path]:
    """The same for a grid that is loaded. Training images are cached of datasets that a method learns from."""
    grid = world.grid
    learned = {world.datasets[spec].name for spec in grid.datasets}
    learns = any(METHODS[name].learns for name, _ in grid.methods)
    wanted = [
        (dataset, grid.shots, grid.seeds) if learns and dataset.name in learned else (dataset, (), ())
        for dataset in world.datasets.values()
    ]
    return cache_all(
        world.backbones, wanted, cache, views=grid.views, recipe=grid.recipe, dtype=dtype,
        skip_unreadable=skip_unreadable, retry_skipped=retry_skipped,
    )  # fmt: skip
