"""Confusion matrices, calibration and paired tests from stored predictions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastcoop.errors import UserError
from fastcoop.results.read import Predictions

BINS = 15  # of the calibration error, the usual number


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Return the confusion matrix, int64 (classes, classes): rows are true classes, columns predicted ones.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    _refuse_diverged(predictions)
    classes = len(predictions.class_names)
    counts = np.bincount(classes * predictions.labels + predictions.predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def calibration_error(predictions: Predictions, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance between confidence and accuracy.

    Confidence is stored in float16, so a few predictions may fall into a neighboring bin.

    Args:
        predictions: of a run.
        bins: number of bins of equal width that predictions are sorted into by confidence. Each is weighted by its
            number of images.

    Returns:
        The error in percentage points.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    _refuse_diverged(predictions)
    confidence = predictions.confidence.astype(np.float64)
    correct = predictions.predicted == predictions.labels
    index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(100 * np.abs(gaps).sum() / len(confidence))


class PairedTest(NamedTuple):
    """McNemar's exact test of two runs on the same images.

    Attributes:
        only_first, only_second: number of images that only the first run, or only the second, classified correctly.
        p: two-sided p value of this difference, under the hypothesis that both runs are equally good.
    """

    only_first: int
    only_second: int
    p: float


def paired_test(first: Predictions, second: Predictions) -> PairedTest:
    """Test whether two runs differ by more than chance, with McNemar's exact test over the images.

    Raises:
        UserError: the runs were tested on different images, or one diverged and predicted nothing.
    """
    from scipy.stats import binomtest

    for predictions in (first, second):
        _refuse_diverged(predictions)
    if first.class_names != second.class_names or not np.array_equal(first.labels, second.labels):
        raise UserError("The two runs were tested on other images; compare runs tested on the same dataset.")
    one, other = first.predicted == first.labels, second.predicted == second.labels
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    p = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return PairedTest(only_first, only_second, p)


def _refuse_diverged(predictions: Predictions) -> None:
    if (predictions.predicted < 0).any():
        raise UserError(
            "The run diverged: its outputs are not finite, so it predicted nothing; choose another run."
        )
