"""Run a grid: cache features, train runs in batches in worker processes, evaluate and interpret the results."""

from typing import TYPE_CHECKING

from fastcoop.memo import late_names

if TYPE_CHECKING:
    from fastcoop.sweeps.caching import cache_grid
    from fastcoop.sweeps.evaluation import Tested, evaluate
    from fastcoop.sweeps.grid_sweep import Summary, sweep
    from fastcoop.sweeps.interpretation import interpret
else:
    __getattr__ = late_names(__name__)

__all__ = ["Summary", "Tested", "cache_grid", "evaluate", "interpret", "sweep"]
