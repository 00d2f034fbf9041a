"""The predictions of a run: reading them, confusion matrices, calibration and paired tests.

`fastcoop.results.confusions` makes tables of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcoop import escape
from fastcoop.errors import UserError
from fastcoop.results.database import reading
from fastcoop.results.metadata import recorded_places
from fastcoop.results.records import NO_CLASS

BINS = 15  # of the calibration error, the usual number


@dataclass(frozen=True, eq=False)
class Predictions:
    """A run's predictions on a test set.

    Attributes:
        class_names: in label order.
        labels: int64 (images,), the true labels.
        predicted: int64 (images,); -1 where the run's outputs are not finite.
        confidence: float16 (images,), the softmax probability of the prediction; NaN where there is none.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def load_predictions(folder: str | Path, key: str, dataset: str | None = None) -> Predictions:
    """Return a run's predictions on a dataset that it was tested on.

    Args:
        folder: a results folder.
        key: the run's whole key.
        dataset: name of the tested dataset; None: the one that the run learned.

    Raises:
        UserError: there is no such run or test.
    """
    query = (
        "SELECT class_names, labels, predictions, confidence FROM scores JOIN runs USING (key) JOIN tests ON "
        "test = digest WHERE key = ? AND scores.dataset = coalesce(?, runs.dataset)"
    )
    with reading(Path(folder)) as db:
        row = db.execute(query, (key, dataset)).fetchone()
        known = db.execute("SELECT dataset FROM runs WHERE key = ?", (key,)).fetchone()
    if row is not None:
        return _decoded(*row)
    if known is None:
        raise UserError(f"{folder} has no run {key}.")
    target = dataset or known[0]
    words = ("fastcoop", "evaluate", Path(folder), "--targets", target, "--run", key[:12])
    command = escape.shell_command(*words, *recorded_places(folder))
    raise UserError(f"The run {key[:12]} was not tested on {target}; run `{command}`.")


def _decoded(class_names: str, *blobs: bytes) -> Predictions:
    labels, predicted = (np.frombuffer(blob, dtype="<u2").astype(np.int64) for blob in blobs[:2])
    predicted[predicted == NO_CLASS] = -1
    return Predictions(
        tuple(json.loads(class_names)), labels, predicted, np.frombuffer(blobs[2], dtype="<f2")
    )


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Return the confusion matrix, int64 (classes, classes): rows are true classes, columns predicted ones.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    refuse_diverged(predictions)
    classes = len(predictions.class_names)
    counts = np.bincount(classes * predictions.labels + predictions.predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def calibration_error(predictions: Predictions, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance between confidence and accuracy.

    Confidence is stored in float16, so a few predictions may fall into a neighboring bin.

    Args:
        predictions: of a run.
        bins: number of bins of equal width, into which predictions are sorted by confidence.

    Returns:
        The error in percentage points, each bin weighted by its number of images.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    images, confidence, correct = binned(predictions, bins)
    return float(100 * np.abs(correct - confidence).sum() / images.sum())


def binned(predictions: Predictions, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images, the sum of their confidence and the correct ones, (bins,) each, by confidence."""
    refuse_diverged(predictions)
    confidence = predictions.confidence.astype(np.float64)
    index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    weights = None, confidence, predictions.predicted == predictions.labels
    images, total, correct = (np.bincount(index, weights=one, minlength=bins) for one in weights)
    return images, total, correct


def calibration_errors(folder: str | Path) -> dict[tuple[str, str], float]:
    """Return the `calibration_error` of every test of a results folder, by key and tested dataset.

    Tests of runs that diverged have NaN.
    """
    query = (
        "SELECT key, scores.dataset, class_names, labels, predictions, confidence FROM scores JOIN tests "
        "ON test = digest"
    )
    errors = {}
    with reading(Path(folder)) as db:
        for key, dataset, *stored in db.execute(query):
            found = _decoded(*stored)
            diverged = (found.predicted < 0).any()
            errors[key, dataset] = math.nan if diverged else calibration_error(found)
    return errors


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

    refuse_other_images(first, second)
    one, other = first.predicted == first.labels, second.predicted == second.labels
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    p = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    return PairedTest(only_first, only_second, p)


def refuse_other_images(first: Predictions, second: Predictions) -> None:
    """Raise UserError where two runs were tested on different images, or one diverged."""
    for predictions in (first, second):
        refuse_diverged(predictions)
    if first.class_names != second.class_names or not np.array_equal(first.labels, second.labels):
        raise UserError("The two runs were tested on other images; compare runs tested on the same dataset.")


def refuse_diverged(predictions: Predictions) -> None:
    """Raise UserError where a run predicted nothing."""
    if (predictions.predicted < 0).any():
        raise UserError(
            "The run diverged: its outputs are not finite, so it predicted nothing; choose another run."
        )
