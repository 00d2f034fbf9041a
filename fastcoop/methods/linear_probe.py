"""Linear probe CLIP: logistic regression on image features, with C chosen on validation images (section 4.1)."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fastcoop.methods.base import Method, MethodSettings, Outcome
from fastcoop.methods.data import Data, Labelled, class_rows
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

    from fastcoop.backbones import Backbone

START = (6, 4, 2, 0, -2, -4, -6)  # log10 of C


class LinearProbeSettings(MethodSettings):
    """Settings of a linear probe. The defaults are the official procedure; others are in the run's label.

    Attributes:
        iterations: Largest number of iterations of L-BFGS.
        search_steps: Halvings of the bracket around the best of seven C.
    """

    iterations: int = Field(default=1000, ge=1, le=1_000_000)
    search_steps: int = Field(default=8, ge=1, le=50)  # with more, the bracket is below float64


OFFICIAL = LinearProbeSettings()


class LinearProbeMethod(Method[LinearProbeSettings]):
    """L-BFGS logistic regression on unnormalized features of the test-time crop.

    It learns from the same subset as the prompt learners; the official code draws one of its own. Its weights are
    stored as float32, and scored as they are stored.
    """

    name = "linear_probe"
    Settings = LinearProbeSettings
    augments = False
    needs_backbone = False

    def label(self, settings: LinearProbeSettings) -> str:
        if settings == OFFICIAL:
            return "Linear probe CLIP"
        fits, steps = settings.iterations, settings.search_steps
        return (
            f"Linear probe CLIP ({fits} iteration{'s' * (fits > 1)}, {steps} search step{'s' * (steps > 1)})"
        )

    def validation_choice(self, settings: LinearProbeSettings) -> tuple[str, str]:
        return "the probe's C", "leave the linear probe out"

    def is_class_specific(self, settings: LinearProbeSettings) -> bool:
        return True

    def run(self, *arguments: Any) -> None:
        import sklearn.linear_model  # noqa: F401  (its first import takes seconds, which are not a run's)

        super().run(*arguments)

    def learn(self, backbone: Backbone, run: RunSpec[LinearProbeSettings]) -> Outcome:
        from threadpoolctl import threadpool_limits

        (features, labels), (val_features, val_labels) = (
            run.data.train(run.subset),
            run.data.validation(run.subset),
        )
        train, val = (
            (features[:, 0].astype(np.float64), labels),
            (val_features.astype(np.float64), val_labels),
        )
        with threadpool_limits(1, user_api="blas"):  # small fits; and sums are equal on any number of cores
            log_c, accuracy, model = choose_c(train, val, run.settings)
        coef, intercept = model.coef_, model.intercept_
        if len(coef) < len(model.classes_):  # scikit-learn's form for two classes
            coef, intercept = (np.concatenate([np.zeros_like(one), one]) for one in (coef, intercept))
        weights = {"coef": coef.astype(np.float32), "intercept": intercept.astype(np.float32)}
        weights["labels"] = model.classes_.astype(np.int64)  # classes without a training image have no row
        return Outcome({}, weights=weights, extra={"c": 10.0**log_c, "val_accuracy": 100 * accuracy})

    def classifier(
        self, backbone: Backbone, run: RunSpec[LinearProbeSettings], data: Data
    ) -> LinearClassifier:
        learned = run.weights
        rows = class_rows(learned["labels"], run.data, data)
        return LinearClassifier(learned["coef"].astype(np.float64), learned["intercept"], rows=rows)


def choose_c(
    train: Labelled, val: Labelled, settings: LinearProbeSettings = OFFICIAL
) -> tuple[float, float, LogisticRegression]:
    """Return log10 of the official search's C, its validation accuracy from 0 to 1, and the model fitted with it.

    First the best of seven by validation accuracy (ties: the largest C), then ``search_steps`` times a fit at both ends
    of a bracket that starts a decade either side and halves towards the better end (ties: the smaller C). The better
    end of the last step is the choice.
    """
    from sklearn.linear_model import LogisticRegression

    @cache
    def fitted(log_c: float) -> tuple[float, LogisticRegression]:
        model = LogisticRegression(solver="lbfgs", max_iter=settings.iterations, C=10.0**log_c)
        with warnings.catch_warnings():
            # It warns of one image per class, and of ending at 1,000 steps, where the official probe ends too.
            warnings.simplefilter("ignore", UserWarning)
            model.fit(*train)
        return float((model.predict(val[0]) == val[1]).mean()), model

    best = max(START, key=lambda log_c: fitted(log_c)[0])  # max keeps the first of equals
    low, high = best - 1.0, best + 1.0
    for _ in range(settings.search_steps):
        middle = (low + high) / 2
        if fitted(low)[0] < fitted(high)[0]:
            chosen, low = high, middle
        else:
            chosen, high = low, middle
    return chosen, *fitted(chosen)
