"""The results folder: written, read, selected from, compared and merged."""

from fastcoop.results.predictions import PairedTest, calibration_error, confusion_matrix, paired_test
from fastcoop.results.read import (
    load_contexts,
    load_failures,
    load_predictions,
    load_results,
    load_untested,
    merge_results,
)

__all__ = [
    "PairedTest",
    "calibration_error",
    "confusion_matrix",
    "load_contexts",
    "load_failures",
    "load_predictions",
    "load_results",
    "load_untested",
    "merge_results",
    "paired_test",
]
