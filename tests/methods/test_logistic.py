"""The probe's fits and searches compared with scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fastcoop.methods.linear_probe import LinearProbeSettings, choose_c
from fastcoop.methods.logistic import LogisticProblem
from tests.methods.test_methods import official_search

KINDS = ("clear", "overlapping", "one image of a class", "duplicates", "unequal scales")


def images(
    kind: str, classes: int, shots: int, dim: int, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return training, validation and test images: features as of CLIP (a large common mean), and labels."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** (-0.8 if kind == "unequal scales" else -0.5)
    mean, centers = rng.normal(size=dim), rng.normal(size=(classes, dim)) * spectrum
    noise = 0.8 if kind == "clear" else 1.6

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(classes), count)
        features = centers[labels] + noise * spectrum * rng.normal(size=(len(labels), dim))
        return 0.06 * mean + 0.15 * features, labels

    (features, labels), *others = (draw(count) for count in (shots, min(shots, 4), 4))
    if kind == "one image of a class":
        kept = np.r_[0, shots : len(labels)]
        features, labels = features[kept], labels[kept]
    if kind == "duplicates":
        features, labels = np.tile(features, (2, 1)), np.tile(labels, 2)
    return (features, labels), *others


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("classes", "shots", "dim"),
    [(3, 1, 20), (3, 16, 20), (5, 4, 8), (8, 2, 64), (10, 8, 30), (12, 4, 48), (20, 1, 64), (25, 2, 40)],
)
def test_the_search_chooses_scikit_learns_c(kind: str, classes: int, shots: int, dim: int) -> None:
    """On features of more unequal scales, fits take over 100 iterations, which amplify rounding: there, the C that
    scikit-learn itself chooses depends on the order of the features."""
    train, val, (features, labels) = images(kind, classes, shots, dim, seed=classes * shots)
    with threadpool_limits(1, user_api="blas"):
        log_c, _, model = choose_c(train, val)
        official_c = official_search(train, val)
    assert 10**log_c == pytest.approx(official_c)
    official = LogisticRegression(C=official_c, max_iter=1000).fit(*train)
    correct, official_correct = ((one.predict(features) == labels).sum() for one in (model, official))
    assert abs(correct - official_correct) <= 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shots", "dim"), [(2, 50), (6, 15)])
@pytest.mark.parametrize("c", [1e6, 1e2, 1, 1e-4])
def test_a_fit_is_scikit_learns(kind: str, shots: int, dim: int, c: float) -> None:
    (train, *_) = images(kind, 7, shots, dim, seed=0)
    for iterations in (3, 60):
        model = LogisticProblem(*train).fit(c, iterations)
        official = LogisticRegression(C=c, max_iter=iterations).fit(*train)
        assert model.n_iter_ == official.n_iter_
        for name in ("coef_", "intercept_"):
            tolerance = 1e-6 * np.abs(official.coef_).max()
            np.testing.assert_allclose(getattr(model, name), getattr(official, name), rtol=0, atol=tolerance)
        np.testing.assert_array_equal(model.predict(train[0]), official.predict(train[0]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("shots", "dim"), [(1, 6), (4, 3)])
def test_a_fit_of_two_classes_is_scikit_learns_to_the_bit(shots: int, dim: int) -> None:
    (train, *_) = images("clear", 2, shots, dim, seed=0)
    model, official = LogisticProblem(*train).fit(10.0, 100), LogisticRegression(C=10.0).fit(*train)
    np.testing.assert_array_equal(model.coef_, official.coef_)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val, _ = images("overlapping", 6, 3, 40, seed=1)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with threadpool_limits(1, user_api="blas"):
            log_c, accuracy, model = choose_c(train, val, LinearProbeSettings(search_steps=4))
        found.append((log_c, accuracy, model.coef_.tobytes(), model.intercept_.tobytes()))
    assert found[0] == found[1]
