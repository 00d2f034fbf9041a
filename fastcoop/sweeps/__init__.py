"""From a grid file to results: which runs there are, which are done, and where what they came to is kept."""

from fastcoop.sweeps.caching import cache_grid
from fastcoop.sweeps.grid import Grid, read_grid
from fastcoop.sweeps.results import load_contexts, load_predictions, load_results, merge_results
from fastcoop.sweeps.sweep import Summary, sweep

__all__ = [
    "Grid",
    "Summary",
    "cache_grid",
    "load_contexts",
    "load_predictions",
    "load_results",
    "merge_results",
    "read_grid",
    "sweep",
]
