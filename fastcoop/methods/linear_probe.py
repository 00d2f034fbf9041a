"""Linear probe CLIP: logistic regression on image features, C chosen on validation images (section 4.1)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fastcoop.methods.base import Done, Job, Method, MethodSettings, Outcome, RunContext
from fastcoop.methods.data import matching_classes
from fastcoop.methods.scores import Scores, score

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone

START = (6, 4, 2, 0, -2, -4, -6)  # log10 of C
STEPS = 8
MAX_ITERATIONS = 1000

Labelled = tuple[np.ndarray, np.ndarray]  # features (n, dim), labels (n,)


class LinearProbeSettings(MethodSettings):
    """The effort of the official procedure; less of either is quicker, and named in the run's label.

    ``iterations``: of L-BFGS, at most. ``search_steps``: halvings of the bracket around the best of seven C.
    """

    iterations: int = Field(default=MAX_ITERATIONS, ge=1)
    search_steps: int = Field(default=STEPS, ge=1)


OFFICIAL = LinearProbeSettings()


class LinearProbe(Method[LinearProbeSettings]):
    """L-BFGS logistic regression on unnormalised features of the test-time crop.

    It learns from the same subset as the prompt learners; the official code draws one of its own.
    """

    name = "linear_probe"
    Settings = LinearProbeSettings

    def label(self, settings: LinearProbeSettings) -> str:
        if settings == OFFICIAL:
            return "Linear probe CLIP"
        return f"Linear probe CLIP ({settings.iterations} iterations, {settings.search_steps} search steps)"

    def check(self, job: Job[LinearProbeSettings]) -> None:
        job.data.require_validation(job.subset, "the probe's C", "leave the linear probe out")
        for target in job.targets:
            matching_classes(job.data, target)

    def run(
        self,
        backbone: Backbone,
        jobs: Sequence[Job[LinearProbeSettings]],
        done: Done,
        context: RunContext,
    ) -> None:
        from joblib import Parallel, delayed, parallel_config

        # The longest fits first, so that no worker is left with one at the end.
        order = sorted(range(len(jobs)), key=lambda i: -self.size(jobs[i]))
        with parallel_config(backend="loky", inner_max_num_threads=1):
            parallel = Parallel(n_jobs=context.jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs")
            for index, outcome in parallel(
                delayed(_run)(i, jobs[i].settings, *_inputs(jobs[i])) for i in order
            ):
                done(index, outcome)
                context.on_progress(1.0)

    @staticmethod
    def size(job: Job[LinearProbeSettings]) -> int:
        """What a job's fits cost, up to a factor."""
        return (len(job.subset.train) if job.subset else 0) * len(job.data.class_names)


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


def class_logits(model: Any, features: np.ndarray, classes: int) -> np.ndarray:
    """Log-odds float64 (n, classes); -inf for classes that had no training image."""
    decision = model.decision_function(features)
    if decision.ndim == 1:  # scikit-learn's form for two classes
        decision = np.stack([np.zeros_like(decision), decision], axis=1)
    logits = np.full((len(features), classes), -np.inf)
    logits[:, model.classes_] = decision
    return logits


def _inputs(job: Job[LinearProbeSettings]) -> tuple[Labelled, Labelled, int, list]:
    """What a worker needs of a job: arrays, as float64 like the official code's."""
    assert job.subset is not None
    features, labels = job.data.train(job.subset)
    val_features, val_labels = job.data.validation(job.subset)
    tests = [(job.data.name, job.data.test, list(range(len(job.data.class_names))))]
    tests += [(target.name, target.test, matching_classes(job.data, target)) for target in job.targets]
    train = (features[:, 0].astype(np.float64), labels)
    return train, (val_features.astype(np.float64), val_labels), len(job.data.class_names), tests


def _run(
    index: int,
    settings: LinearProbeSettings,
    train: Labelled,
    val: Labelled,
    classes: int,
    tests: list[tuple[str, Labelled, list[int]]],
) -> tuple[int, Outcome]:
    import sklearn.linear_model  # noqa: F401  (the first import takes seconds that are not the run's)

    start = time.perf_counter()
    log_c, model = choose_c(train, val, settings)
    extra = {"c": 10.0**log_c, "val_accuracy": 100 * float((model.predict(val[0]) == val[1]).mean())}
    scores: dict[str, Scores] = {}
    for name, (features, labels), columns in tests:
        scores[name] = score(class_logits(model, features, classes)[:, columns], labels)
    seconds = time.perf_counter() - start
    return index, Outcome(scores, seconds=seconds, extra=extra)
