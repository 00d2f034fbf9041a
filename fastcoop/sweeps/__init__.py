"""From a grid file to results: which runs there are, which are done, and where what they came to is kept."""

from fastcoop.sweeps.caching import cache_grid
from fastcoop.sweeps.evaluate import Tested, evaluate
from fastcoop.sweeps.grid import Grid, read_grid
from fastcoop.sweeps.predictions import PairedTest, calibration_error, confusion_matrix, paired_test
from fastcoop.sweeps.results import (
    load_contexts,
    load_failures,
    load_predictions,
    load_results,
    load_untested,
    merge_results,
)
from fastcoop.sweeps.sweep import Summary, sweep

__all__ = [
    "Grid",
    "PairedTest",
    "Summary",
    "Tested",
    "cache_grid",
    "calibration_error",
    "confusion_matrix",
    "evaluate",
    "load_contexts",
    "load_failures",
    "load_predictions",
    "load_results",
    "load_untested",
    "merge_results",
    "paired_test",
    "read_grid",
    "sweep",
]
