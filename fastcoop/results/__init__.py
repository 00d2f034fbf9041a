"""The results folder: its records, writing, reading, selecting, comparing and merging. Loads no torch."""

from fastcoop.results.merge import merge_results
from fastcoop.results.parameters import load_contexts
from fastcoop.results.predictions import (
    PairedTest,
    Predictions,
    calibration_curve,
    calibration_error,
    calibration_errors,
    class_accuracies,
    confused_pairs,
    confusion,
    confusion_matrix,
    disagreements,
    group_confusion,
    load_predictions,
    mistakes,
    paired_test,
    representative_run,
    wrong_images,
)
from fastcoop.results.read import load_failures, load_results, load_runs, load_untested

__all__ = [
    "PairedTest", "Predictions", "calibration_curve", "calibration_error", "calibration_errors", "class_accuracies",
    "confused_pairs", "confusion", "confusion_matrix", "disagreements", "group_confusion", "load_contexts",
    "load_failures", "load_predictions", "load_results", "load_runs", "load_untested", "merge_results", "mistakes",
    "paired_test", "representative_run", "wrong_images",
]  # fmt: skip
