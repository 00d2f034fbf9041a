"""The small world that sweeps are tested on."""

from tests.small_study import grid, run, undrawn, world

__all__ = ["grid", "run", "undrawn", "world"]
