"""Tests of many runs: in chunks, together, and on the backbone's device, with the scores of each alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fastcoop.backbones import Backbone
from fastcoop.methods import METHODS, Classifier, Data, LinearClassifier, Outcome, Scores, score, scores, unit
from fastcoop.methods.scores import score_all
from fastcoop.prompts import PromptLayout, initial_contexts
from tests.methods.conftest import job, make_data
from tests.pretend_gpu import GPU, pretend_gpu

IMAGES, DIM, CLASSES = 70, 8, 5
RNG = np.random.default_rng(0)
FEATURES, LABELS = unit(RNG.normal(size=(IMAGES, DIM))).astype(np.float32), RNG.integers(4, size=IMAGES)


@dataclass(frozen=True)
class Cubic:
    """A classifier that is not linear."""

    weights: np.ndarray
    unit_length = True

    def logits(self, features: np.ndarray) -> np.ndarray:
        return (features @ self.weights.T) ** 3


def classifiers() -> list[Classifier]:
    def weights(rows: int = CLASSES) -> np.ndarray:
        return RNG.normal(size=(rows, DIM)).astype(np.float32)

    broken = weights()
    broken[1, 2] = np.nan
    rows = np.array([2, -1, 0, 1, -1])
    texts = [LinearClassifier.of_texts(weights(), 100.0) for _ in range(3)]
    probe = LinearClassifier(weights(3).astype(np.float64), weights(3)[:, 0], rows=rows)
    return [*texts, LinearClassifier(broken), probe, Cubic(weights())]


def assert_equal(one: Scores, other: Scores, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(one.predictions, other.predictions)
    np.testing.assert_array_equal(one.per_class, other.per_class)
    np.testing.assert_equal((one.accuracy, one.macro_accuracy), (other.accuracy, other.macro_accuracy))
    np.testing.assert_allclose(one.confidence, other.confidence, rtol=tolerance)


def test_accuracies_are_those_counted_by_hand() -> None:
    logits = np.eye(4)[[0, 0, 1, 1, 3]]
    found = score(logits, np.array([0, 0, 0, 1, 1]))
    assert found.predictions.tolist() == [0, 0, 1, 1, 3]
    np.testing.assert_allclose(
        found.per_class, [200 / 3, 50, np.nan, np.nan]
    )  # two classes have no test image
    assert (found.accuracy, found.macro_accuracy) == (60.0, pytest.approx((200 / 3 + 50) / 2))


@pytest.mark.parametrize("at_once", [1, 7 * CLASSES, 200, 10**6])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    every = classifiers()
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", at_once)
    found = score_all(every, FEATURES, LABELS, CLASSES)
    for one, of_one in zip(every, found, strict=True):
        # A product of a single row is not summed as one of many rows is.
        assert_equal(of_one, score(one.logits(FEATURES), LABELS), 1e-3 if at_once == 1 else 0.0)
    assert [np.isnan(one.accuracy) for one in found] == [False] * 3 + [True] + [False] * 2


@pytest.mark.parametrize("at_once", [1, 200, 10**6])
def test_a_gpu_scores_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    every = classifiers()
    expected = score_all(every, FEATURES, LABELS, CLASSES)
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", at_once)
    with pretend_gpu(), monkeypatch.context() as patch:
        patch.setattr(LinearClassifier, "logits", None)  # those are the CPU's
        found = score_all(every, FEATURES, LABELS, CLASSES, GPU)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other, 1e-3)


def test_runs_are_tested_together_as_alone(backbone: Backbone, data: Data) -> None:
    other = make_data(classes=("cat", "old dog", "sea lion"), name="others", seed=1)
    some = [
        job(data, "coop", context_length=length, class_specific=specific, targets=(other,), seed=seed)
        for length, specific in ((2, False), (3, False), (2, True))
        for seed in (1, 2, 3)
    ]
    learned = [
        Outcome({}, contexts=initial_contexts(backbone, layout, 3, one.seed).numpy())
        for one in some
        for layout in [PromptLayout(one.settings.context_length, "end", one.settings.class_specific)]
    ]
    method = METHODS["coop"]
    together = method.scores_of(backbone, some, learned)
    for one, outcome, found in zip(some, learned, together, strict=True):
        (alone,) = method.scores_of(backbone, [one], [outcome])
        assert list(found) == ["animals", "others"]
        for name in found:
            assert_equal(found[name], alone[name])
