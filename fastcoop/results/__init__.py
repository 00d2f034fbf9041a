"""The results folder: its records, writing, reading, selecting, comparing and merging. Loads no torch."""

from fastcoop.results.merge import merge_results
from fastcoop.results.parameters import load_contexts
from fastcoop.results.predictions import (
    PairedTest,
    Predictions,
    calibration_error,
    calibration_errors,
    confusion_matrix,
    load_predictions,
    paired_test,
)
from fastcoop.results.read import load_failures, load_results, load_runs, load_untested

__all__ = [
    "PairedTest",
    "Predictions",
    "calibration_error",
    "calibration_errors",
    "confusion_matrix",
    "load_contexts",
    "load_failures",
    "load_predictions",
    "load_results",
    "load_runs",
    "load_untested",
    "merge_results",
    "paired_test",
]
