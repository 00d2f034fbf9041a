"""Confusion matrices, calibration and paired tests from kept predictions, against scikit-learn and by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix as sklearn_confusion

from fastcoop.errors import UserError
from fastcoop.results import Predictions, calibration_error, confusion_matrix, paired_test


def drawn(seed: int, images: int = 400, classes: int = 5) -> Predictions:
    """Predictions that are right as often as they are confident, less some."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes - 1, size=images)  # the last class has no images
    confidence = rng.uniform(0.2, 1, images).astype(np.float16)
    right = rng.random(images) < confidence - 0.1 * seed
    predicted = np.where(right, labels, rng.integers(classes, size=images))
    return Predictions(tuple("abcde"), labels, predicted, confidence)


@pytest.mark.parametrize("seed", range(3))
def test_confusions_are_scikit_learns(seed: int) -> None:
    said = drawn(seed)
    expected = sklearn_confusion(said.labels, said.predicted, labels=range(5))
    assert (confusion_matrix(said) == expected).all(axis=None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_is_scikit_learns_curve(seed: int, bins: int) -> None:
    said = drawn(seed)
    right, confidence = said.predicted == said.labels, said.confidence.astype(np.float64)
    true, predicted = calibration_curve(right, confidence, n_bins=bins)
    sizes = np.histogram(confidence, np.linspace(0, 1, bins + 1))[0]
    expected = 100 * (np.abs(true - predicted) * sizes[sizes > 0]).sum() / len(confidence)
    assert calibration_error(said, bins) == pytest.approx(expected, abs=1e-6)
    certain = replace(said, predicted=said.labels, confidence=np.ones_like(said.confidence))
    assert calibration_error(certain) == 0
    halves = Predictions(("a", "b"), np.array([0, 0, 0]), np.array([0, 0, 1]), np.float16([0.5, 0.5, 0.75]))
    assert calibration_error(halves, bins=2) == pytest.approx(100 * (1 + 0.75) / 3), "an edge ends its bin"


def test_the_paired_test_counts_all_ways_of_tossing() -> None:
    labels = np.zeros(14, np.int64)
    one, other = labels.copy(), labels.copy()
    one[:2], other[2:10], one[10:12], other[10:12] = 1, 1, 1, 1  # 2 and 8 differ; 2 are wrong in both
    first, second = (Predictions(("a", "b"), labels, said, np.ones(14, np.float16)) for said in (one, other))
    found = paired_test(first, second)
    assert (found.only_first, found.only_second) == (8, 2)
    tosses = np.array([sum(toss) for toss in itertools.product((0, 1), repeat=10)])
    assert found.p == pytest.approx((np.abs(tosses - 5) >= 3).mean())
    assert paired_test(first, first) == (0, 0, 1.0)
    for change in ({"labels": 1 - labels}, {"class_names": ("a", "c")}):
        with pytest.raises(UserError, match="other images"):
            paired_test(first, replace(second, **change))
    lost = replace(second, predicted=np.full(14, -1))
    for pair in ((first, lost), (lost, first)):
        with pytest.raises(UserError, match="diverged"):
            paired_test(*pair)
