"""Linear probe CLIP: logistic regression on image features, C chosen on validation images (section 4.1)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fastcoop.methods.base import Done, Method, MethodSettings, Outcome, RunContext
from fastcoop.methods.data import matching_classes
from fastcoop.methods.scores import Scores, score
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone

START = (6, 4, 2, 0, -2, -4, -6)  # log10 of C
STEPS = 8
MAX_ITERATIONS = 1000

Labelled = tuple[np.ndarray, np.ndarray]  # features (n, dim), labels (n,)
Weights = Mapping[str, np.ndarray]


class LinearProbeSettings(MethodSettings):
    """The effort of the official procedure; less of either is quicker, and named in the run's label.

    ``iterations``: of L-BFGS, at most. ``search_steps``: halvings of the bracket around the best of seven C.
    """

    iterations: int = Field(default=MAX_ITERATIONS, ge=1, le=1_000_000)
    search_steps: int = Field(default=STEPS, ge=1, le=50)  # beyond, the bracket is below float64


OFFICIAL = LinearProbeSettings()


class LinearProbe(Method[LinearProbeSettings]):
    """L-BFGS logistic regression on unnormalised features of the test-time crop.

    It learns from the same subset as the prompt learners; the official code draws one of its own. Its weights are
    kept as float32, and scored as they are kept.
    """

    name = "linear_probe"
    Settings = LinearProbeSettings
    augments = False

    def label(self, settings: LinearProbeSettings) -> str:
        if settings == OFFICIAL:
            return "Linear probe CLIP"
        fits, steps = settings.iterations, settings.search_steps
        return f"Linear probe CLIP ({fits} iteration{'s' * (fits != 1)}, {steps} search step{'s' * (steps != 1)})"

    def check(self, run: RunSpec[LinearProbeSettings]) -> None:
        if run.weights is None:
            run.data.require_validation(run.subset, "the probe's C", "leave the linear probe out")
        for target in run.targets:
            matching_classes(run.data, target)

    def run(
        self,
        backbone: Backbone,
        runs: Sequence[RunSpec[LinearProbeSettings]],
        done: Done,
        context: RunContext,
    ) -> None:
        import sklearn.linear_model  # noqa: F401  (the first import takes seconds that are not a run's)

        for index, run in enumerate(runs):
            if run.weights is not None:
                done(index, Outcome(_scores(run, run.weights)))
            else:
                start = time.perf_counter()
                weights, extra = _learn(run.settings, *_inputs(run))
                scores = _scores(run, weights)
                seconds = time.perf_counter() - start
                done(index, Outcome(scores, weights=dict(weights), seconds=seconds, extra=extra))
            context.on_progress(1.0)


def choose_c(train: Labelled, val: Labelled, settings: LinearProbeSettings = OFFICIAL) -> tuple[float, Any]:
    """log10 of the official search's C, and the model fitted with it.

    First the best of seven by validation accuracy (ties: the largest C), then ``search_steps`` times (8) a fit at
    both ends of a bracket that starts a decade either side and halves towards the better end (ties: the smaller
    C). The better end of the last step is the choice.
    """

    @cache
    def fitted(log_c: float) -> tuple[float, Any]:
        model = fit(train, log_c, settings.iterations)
        return float((model.predict(val[0]) == val[1]).mean()), model

    best = max(START, key=lambda log_c: fitted(log_c)[0])  # max keeps the first of equals
    low, high = best - 1.0, best + 1.0
    for _ in range(settings.search_steps):
        middle = (low + high) / 2
        if fitted(low)[0] < fitted(high)[0]:
            chosen, low = high, middle
        else:
            chosen, high = low, middle
    return chosen, fitted(chosen)[1]


def fit(train: Labelled, log_c: float, iterations: int = MAX_ITERATIONS) -> Any:
    """scikit-learn's multinomial logistic regression at C = 10 ** log_c."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # It warns of one image per class, and of ending at 1,000 steps, where the official probe ends too.
        warnings.simplefilter("ignore", UserWarning)
        model = LogisticRegression(solver="lbfgs", max_iter=iterations, C=10.0**log_c)
        return model.fit(train[0], train[1])


def weights_of(model: Any) -> Weights:
    """What a fitted model answers by, as it is kept: "coef" float32 (classes seen, dim), "intercept" float32 and
    "labels" int64 (classes seen,); classes without a training image have no row."""
    coef, intercept = model.coef_, model.intercept_
    if len(coef) < len(model.classes_):  # scikit-learn's form for two classes
        coef, intercept = (np.concatenate([np.zeros_like(one), one]) for one in (coef, intercept))
    return {
        "coef": coef.astype(np.float32),
        "intercept": intercept.astype(np.float32),
        "labels": model.classes_.astype(np.int64),
    }


def class_logits(weights: Weights, features: np.ndarray, classes: int) -> np.ndarray:
    """Log-odds float64 (n, classes) of features (n, dim); -inf for classes that had no training image."""
    logits = np.full((len(features), classes), -np.inf)
    logits[:, weights["labels"]] = features.astype(np.float64) @ weights["coef"].T + weights["intercept"]
    return logits


def _inputs(run: RunSpec[LinearProbeSettings]) -> tuple[Labelled, Labelled]:
    """Training and validation images, as float64 like the official code's."""
    assert run.subset is not None
    features, labels = run.data.train(run.subset)
    val_features, val_labels = run.data.validation(run.subset)
    return (features[:, 0].astype(np.float64), labels), (val_features.astype(np.float64), val_labels)


def _learn(settings: LinearProbeSettings, train: Labelled, val: Labelled) -> tuple[Weights, dict[str, float]]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):  # fits are small; and sums come out the same on any machine
        log_c, model = choose_c(train, val, settings)
    extra = {"c": 10.0**log_c, "val_accuracy": 100 * float((model.predict(val[0]) == val[1]).mean())}
    return weights_of(model), extra


def _scores(run: RunSpec[LinearProbeSettings], weights: Weights) -> dict[str, Scores]:
    """Each test set scored among its own classes alone."""
    scores = {}
    for data in run.tests:
        logits = class_logits(weights, data.test[0], len(run.data.class_names))
        if data is not run.data:
            logits = logits[:, matching_classes(run.data, data)]
        scores[data.name] = score(logits, data.test[1])
    return scores
