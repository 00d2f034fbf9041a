"""The small world that sweeps are tested on."""

from tests.small_study import grid, run, world

__all__ = ["grid", "run", "world"]
