"""What the kept predictions of runs tell without running anything again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastcoop.errors import UserError
from fastcoop.results.read import Predictions

BINS = 15  # of a calibration error, as is usual


def confusion_matrix(said: Predictions) -> np.ndarray:
    """Counts int64 (classes, classes): rows are true classes, columns predicted ones.

    Raises UserError for a run that predicted nothing.
    """
    _refuse_none(said)
    classes = len(said.class_names)
    counts = np.bincount(classes * said.labels + said.predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def calibration_error(said: Predictions, bins: int = BINS) -> float:
    """The expected calibration error, in percentage points: how far confidence is from accuracy, on average.

    Predictions are sorted into ``bins`` of equal width by their confidence; each bin counts by its images.
    Confidence is kept in float16, so a few predictions may lie in the bin beside theirs.

    Raises UserError for a run that predicted nothing.
    """
    _refuse_none(said)
    confidence = said.confidence.astype(np.float64)
    correct = said.predicted == said.labels
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    gaps = np.bincount(place, weights=correct - confidence, minlength=bins)
    return float(100 * np.abs(gaps).sum() / len(confidence))


class PairedTest(NamedTuple):
    """McNemar's exact test of two runs on the same images.

    Attributes:
        only_first, only_second: images that only the one run, or only the other, got right.
        p: two-sided, of such a difference if both runs were equally good.
    """

    only_first: int
    only_second: int
    p: float


def paired_test(first: Predictions, second: Predictions) -> PairedTest:
    """Whether one run is better than another by more than chance, image by image.

    Raises:
        UserError: the runs were tested on other images, or one predicted nothing.
    """
    for said in (first, second):
        _refuse_none(said)
    from scipy.stats import binomtest

    if first.class_names != second.class_names or not np.array_equal(first.labels, second.labels):
        raise UserError("The two runs were tested on other images; compare runs tested on the same dataset.")
    one, other = first.predicted == first.labels, second.predicted == second.labels
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    p = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return PairedTest(only_first, only_second, p)


def _refuse_none(said: Predictions) -> None:
    if (said.predicted < 0).any():
        raise UserError(
            "The run diverged: its outputs are not finite, so it predicted nothing; choose another run."
        )
