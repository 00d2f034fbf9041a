"""The execution of a grid: features cached, runs done in batches by workers, tests of what was learned."""

from fastcoop.sweeps.caching import cache_grid
from fastcoop.sweeps.evaluate import Tested, evaluate
from fastcoop.sweeps.sweep import Summary, sweep

__all__ = ["Summary", "Tested", "cache_grid", "evaluate", "sweep"]
