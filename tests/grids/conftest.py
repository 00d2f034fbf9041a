"""The small world that sweeps are tested on."""

from tests.sweeps.conftest import grid, run, world

__all__ = ["grid", "run", "world"]
