"""The execution of a grid: features cached, runs done in batches by workers, tests of what was learned."""

from fastcoop.sweeps.caching import cache_grid
from fastcoop.sweeps.evaluation import Tested, evaluate
from fastcoop.sweeps.grid_sweep import Summary, sweep
from fastcoop.sweeps.interpretation import interpret

__all__ = ["Summary", "Tested", "cache_grid", "evaluate", "interpret", "sweep"]
