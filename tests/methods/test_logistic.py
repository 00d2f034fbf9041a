"""The probe's fits and searches beside scikit-learn's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import fastcoop as fc
from fastcoop.errors import UserError
from fastcoop.methods import linear_probe, logistic
from fastcoop.methods.linear_probe import LinearProbeSettings, choose_c
from fastcoop.methods.logistic import LogisticProblem
from tests.advice import follows
from tests.methods.test_methods import official_search

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Images = tuple[np.ndarray, np.ndarray]

# Kinds of features: exponent of the spectrum, and noise relative to the distance of the classes.
KINDS = {
    "even": (0.0, 1.0),
    "clear": (0.5, 0.8),
    "overlapping": (0.7, 1.6),
    "steep": (1.0, 1.3),
    "steepest": (1.5, 1.3),
}
SIZES = [(3, 1, 20), (3, 16, 20), (5, 4, 8), (8, 2, 64), (10, 8, 30), (12, 4, 48), (20, 1, 64), (25, 2, 40)]
SEARCHES = [(kind, *size) for kind in KINDS for size in SIZES]


def images(kind: str, classes: int, shots: int, dim: int, seed: int = 0) -> tuple[Images, Images, Images]:
    """Return training, validation and test images: features as of CLIP (a large common mean), and labels."""
    rng = np.random.default_rng(seed)
    exponent, noise = KINDS[kind]
    spectrum = np.arange(1, dim + 1) ** -exponent
    mean, centers = rng.normal(size=dim), rng.normal(size=(classes, dim)) * spectrum

    def draw(count: int) -> Images:
        labels = np.repeat(np.arange(classes), count)
        features = centers[labels] + noise * spectrum * rng.normal(size=(len(labels), dim))
        return 0.06 * mean + 0.15 * features, labels

    return draw(shots), draw(min(shots, 4)), draw(4)


def check_search(kind: str, classes: int, shots: int, dim: int) -> None:
    train, val, (features, labels) = images(kind, classes, shots, dim, seed=classes * shots)
    with threadpool_limits(1, user_api="blas"):
        log_c, _, model = choose_c(train, val)
        official_c = official_search(train, val)
        official = LogisticRegression(C=official_c, max_iter=1000).fit(*train)
    assert 10**log_c == pytest.approx(official_c)
    correct, official_correct = ((one.predict(features) == labels).sum() for one in (model, official))
    assert abs(correct - official_correct) <= 1


@pytest.fixture(autouse=True)
def quick_fits_of_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "SMALL", 0)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small problems into parts, as large ones are."""
    monkeypatch.setattr(logistic, "PART_WORK", 400)


@pytest.mark.parametrize(("kind", "classes", "shots", "dim"), SEARCHES[:: len(SIZES) - 1])
def test_the_search_chooses_scikit_learns_c(kind: str, classes: int, shots: int, dim: int) -> None:
    check_search(kind, classes, shots, dim)


@pytest.mark.slow
def test_forty_searches_choose_scikit_learns_c() -> None:
    """Also where scikit-learn's choice depends on the order of the features, as it does on steep spectra."""
    for search in SEARCHES:
        check_search(*search)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", ["even", "clear", "overlapping"])
@pytest.mark.parametrize(("shots", "dim"), [(1, 30), (2, 50), (6, 15)])
@pytest.mark.parametrize("c", [1e6, 1e2, 1, 1e-4])
def test_a_fit_has_scikit_learns_iterates(kind: str, shots: int, dim: int, c: float) -> None:
    (train, *_) = images(kind, 7, shots, dim)
    train = train[0][1:], train[1][1:]  # a class has fewer images, or none
    labels = np.unique(train[1], return_inverse=True)[1]
    for iterations in (3, 40):
        problem = LogisticProblem(train[0], labels)
        fit = problem.scikit_learn_fit(c, iterations)
        official = LogisticRegression(C=c, max_iter=iterations).fit(*train)
        assert fit.iterations == official.n_iter_
        for found, expected in zip(
            problem.coefficients(fit), (official.coef_, official.intercept_), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("solver", ["official", "converged"])
def test_a_search_computes_its_quick_fits_itself(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, fitted = LogisticRegression.fit, []
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *xy: fitted.append(self.C) or fit(self, *xy))
    train, val, _ = images("clear", 7, 2, 30)
    choose_c(train, val, LinearProbeSettings(solver=solver))
    assert len(fitted) <= (3 if solver == "official" else 0)


@pytest.mark.parametrize("rounding", [0.03, 2.0])
def test_scikit_learn_settles_what_rounding_may_decide(
    rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, _ = images("overlapping", 7, 4, 30)
    expected = choose_c(train, val)
    fit, fitted = LogisticRegression.fit, []
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *xy: fitted.append(self.C) or fit(self, *xy))
    monkeypatch.setattr(linear_probe, "rounding_after", lambda iterations: rounding)
    log_c, accuracy, model = choose_c(train, val)
    assert (log_c, accuracy) == expected[:2]
    if rounding < 1:
        assert len(fitted) == 2  # of six fits with such images: C of others recognizes more anyway
    else:  # any fit may recognize any image or not
        official = fit(LogisticRegression(C=10**log_c, max_iter=1000), *train)
        np.testing.assert_array_equal(model.coef_, official.coef_)


def test_small_searches_are_scikit_learns_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    train, val, _ = images("clear", 7, 2, 30)
    log_c, _, model = choose_c(train, val, LinearProbeSettings(search_steps=1))
    official = LogisticRegression(C=10**log_c, max_iter=1000).fit(*train)
    np.testing.assert_array_equal(model.coef_, official.coef_)


@pytest.mark.parametrize(("shots", "dim"), [(1, 6), (4, 3)])
def test_a_probe_of_two_classes_is_scikit_learns_to_the_bit(shots: int, dim: int) -> None:
    train, val, _ = images("clear", 2, shots, dim)
    log_c, _, model = choose_c(train, val)
    official = LogisticRegression(C=10**log_c, max_iter=1000).fit(*train)
    np.testing.assert_array_equal(model.coef_, official.coef_)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", ["overlapping", "steepest"])
def test_threads_do_not_change_a_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val, _ = images(kind, 6, 3, 40, seed=1)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with threadpool_limits(1, user_api="blas"):
            log_c, accuracy, model = choose_c(train, val, LinearProbeSettings(search_steps=4))
        found.append((log_c, accuracy, model.coef_.tobytes(), model.intercept_.tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("place", ["training", "validation"])
def test_features_that_are_not_finite_are_refused_before_a_fit(place: str) -> None:
    train, val, _ = images("even", 5, 4, 8)
    (train if place == "training" else val)[0][3, 2] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        choose_c(train, val, LinearProbeSettings(iterations=1))


def objective(train: Images, c: float) -> Callable[[np.ndarray, np.ndarray], float]:
    def value(coef: np.ndarray, intercept: np.ndarray) -> float:
        logits = train[0] @ coef.T + intercept
        loss = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return float(c * (loss - logits[np.arange(len(logits)), train[1]]).sum() + 0.5 * (coef**2).sum())

    return value


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", ["clear", "steepest"])
@pytest.mark.parametrize(("classes", "shots", "dim"), [(2, 3, 4), (3, 2, 12), (4, 8, 6)])
@pytest.mark.parametrize("c", [1e-3, 1, 1e4])
def test_a_converged_fit_is_the_minimum(kind: str, classes: int, shots: int, dim: int, c: float) -> None:
    train, *_ = images(kind, classes, shots, dim)
    problem = LogisticProblem(*train, principal=True)
    fit = problem.optimum(c)
    coef, intercept = problem.coefficients(fit)
    exact = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=10_000).fit(*train)
    assert fit.converged
    probabilities = np.exp(train[0] @ coef.T + intercept)
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, exact.predict_proba(train[0]), atol=1e-3)
    if classes > 2:
        value = objective(train, c)
        assert value(coef, intercept) <= value(exact.coef_, exact.intercept_) * (1 + 1e-6)
    # From another C's minimum, it is the same.
    warm = problem.optimum(c, problem.optimum(c / 100).weights)
    np.testing.assert_allclose(problem.coefficients(warm)[0], coef, atol=1e-3 * np.abs(coef).max())


def test_the_converged_probe_is_below_the_official_objective_and_says_what_it_is() -> None:
    train, val, _ = images("steepest", 6, 4, 40)
    log_c, _, model = choose_c(train, val, LinearProbeSettings(solver="converged", search_steps=2))
    official = LogisticRegression(C=10**log_c, max_iter=1000).fit(*train)
    value = objective(train, 10**log_c)
    assert value(model.coef_, model.intercept_) < value(official.coef_, official.intercept_)
    probe = fc.LinearProbe(solver="converged", search_steps=2)
    probe.fit(*train, X_val=val[0], y_val=val[1])
    np.testing.assert_allclose(probe.coef_, model.coef_, atol=1e-5 * np.abs(model.coef_).max())
    for settings, label in (
        ({}, "Linear probe CLIP"),
        ({"iterations": 5}, "Linear probe CLIP (5 iterations, 8 search steps)"),
        ({"solver": "converged"}, "Linear probe CLIP (converged)"),
        ({"solver": "converged", "search_steps": 2}, "Linear probe CLIP (converged, 2 search steps)"),
    ):
        assert fc.methods.METHODS["linear_probe"].label(LinearProbeSettings(**settings)) == label


@follows("leave out iterations")
def test_a_converged_probe_takes_no_iterations() -> None:
    train, val, _ = images("clear", 3, 2, 5)
    probe = fc.LinearProbe(solver="converged", iterations=20)
    with pytest.raises(UserError, match="leave out iterations"):
        probe.fit(*train, X_val=val[0], y_val=val[1])
    probe.set_params(iterations=1000).fit(*train, X_val=val[0], y_val=val[1])
