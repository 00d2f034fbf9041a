"""Linear probe CLIP: logistic regression on image features, with C chosen on validation images (section 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits

from fastcoop import backbones
from fastcoop.methods.base import Method, MethodSettings, Outcome
from fastcoop.methods.data import Data, Labelled, class_rows
from fastcoop.methods.late import Backbone, Tensor, torch
from fastcoop.methods.logistic import Fit, LogisticProblem
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

START = (6, 4, 2, 0, -2, -4, -6)  # log10 of C
SMALL = 10_000  # coefficients; with fewer, calls take longer than products, and threads wait for each other
REPRODUCIBLE = 100  # iterations; after more, rounding may be visible


class LinearProbeSettings(MethodSettings):
    """Settings of a linear probe. The defaults are the official procedure; others are in the run's label.

    Attributes:
        solver: ``official``: scikit-learn's L-BFGS, which stops well before the minimum at large C. ``converged``: the
            minimum of the same objective.
        iterations: Largest number of iterations of L-BFGS.
        search_steps: Halvings of the bracket around the best of seven C.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"solver"})

    solver: Literal["official", "converged"] = "official"
    iterations: int = Field(default=1000, ge=1, le=1_000_000)
    search_steps: int = Field(default=8, ge=1, le=50)  # with more, the bracket is below float64

    def unused(self) -> Mapping[str, str | None]:
        reason = "solver: converged runs to the minimum; leave out iterations"
        return {"iterations": reason} if self.solver == "converged" else {}


OFFICIAL = LinearProbeSettings()


class LinearProbeMethod(Method[LinearProbeSettings]):
    """Logistic regression on unnormalized features of the test-time crop.

    It learns from the same subset as the prompt learners; the official code draws one of its own. Its weights are
    stored as float32, and scored as they are stored.
    """

    name = "linear_probe"
    Settings = LinearProbeSettings
    augments = False
    needs_backbone = False

    def label(self, settings: LinearProbeSettings) -> str:
        limits, steps = [], settings.search_steps
        if settings.solver == "converged":
            limits.append("converged")
        elif settings != OFFICIAL:
            limits.append(f"{settings.iterations} iteration{'s' * (settings.iterations > 1)}")
        if limits and (settings.solver == "official" or steps != OFFICIAL.search_steps):
            limits.append(f"{steps} search step{'s' * (steps > 1)}")
        return f"Linear probe CLIP ({', '.join(limits)})" if limits else "Linear probe CLIP"

    def validation_choice(self, settings: LinearProbeSettings) -> tuple[str, str]:
        return "the probe's C", "use another method"

    def is_class_specific(self, settings: LinearProbeSettings) -> bool:
        return True

    def run(self, *arguments: Any) -> None:
        import sklearn.linear_model  # noqa: F401  (its first import takes seconds, which are not a run's)

        super().run(*arguments)

    def learn(self, backbone: Backbone, run: RunSpec[LinearProbeSettings]) -> Outcome:
        features, labels = run.data.train(run.subset)
        train = features[:, 0].astype(np.float64), labels
        features, labels = run.data.validation(run.subset)
        val = features.astype(np.float64), labels
        with threadpool_limits(1, user_api="blas"):  # sums are equal on any number of cores
            log_c, accuracy, model = choose_c(train, val, run.settings, backbone.device)
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
    train: Labelled, val: Labelled, settings: LinearProbeSettings = OFFICIAL, device: Any = "cpu"
) -> tuple[float, float, LogisticRegression]:
    """Return log10 of the official search's C, its validation accuracy from 0 to 1, and the model fitted with it.

    First the best of seven by validation accuracy (ties: the largest C), then ``search_steps`` times a fit at both ends
    of a bracket that starts a decade either side and halves towards the better end (ties: the smaller C). The better
    end of the last step is the choice. Fits and their parts run at the same time in as many threads as torch uses.

    Args:
        train: Features float64 (images, dim), and labels.
        val: Images to choose C by, likewise.
        settings: How to fit and search.
        device: Where to compute.
    """
    is_small = len(np.unique(train[1])) * train[0].shape[1] < SMALL
    threads = 1 if is_small or torch.device(device).type != "cpu" else torch.get_num_threads()
    with backbones.precision.limit_threads(1), warnings.catch_warnings(), ExitStack() as stack:
        # scikit-learn warns of one image per class, and of ending at 1,000 steps, where the official probe ends too.
        warnings.simplefilter("ignore", UserWarning)
        pool = ThreadPoolExecutor(threads) if threads > 1 else _ThisThread()
        stack.callback(pool.shutdown, cancel_futures=True)  # no error waits for fits that have not begun
        fits = _Fits(train, val, settings, device, pool, threads)
        fits.start(START)
        best = START[0]
        for log_c in START[1:]:
            best = log_c if fits.is_better(log_c, best) else best
        low, high = best - 1.0, best + 1.0
        fits.start([low, high])
        for step in range(settings.search_steps):
            middle = (low + high) / 2
            if step + 1 < settings.search_steps:
                fits.start([middle])  # an end of the next bracket, whichever of these ends is better
            if fits.is_better(high, low):
                chosen, low = high, middle
            else:
                chosen, high = low, middle
        fits.settle([chosen])
        return chosen, fits[chosen].most / len(val[1]), fits.model(chosen)


def rounding_after(iterations: int) -> float:
    """Return the rounding error to expect in a fit's logits after ``iterations`` steps of L-BFGS.

    It is a share of the difference between an image's largest and smallest logit, and an empirical rule, no bound.
    """
    return float(10 ** (iterations / 25 - 7.5))


class _ThisThread(Executor):
    """Calls functions as they are submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(function(*args, **kwargs))
        return future


class _Fitted(NamedTuple):
    fewest: int  # validation images that are classified correctly, whatever the rounding error
    most: int  # the same, with those where the rounding error may decide
    iterations: int
    fit: Fit | LogisticRegression


class _Fits:
    """Fits by log10 of C.

    Official ones are scikit-learn's. `LogisticProblem` computes most of them in less work. scikit-learn computes those
    itself whose number of recognized validation images matters to the search and may depend on rounding, and long ones:
    after some hundred iterations, its fits depend on rounding. On a GPU, all are computed there.
    """

    def __init__(
        self,
        train: Labelled,
        val: Labelled,
        settings: LinearProbeSettings,
        device: Any,
        pool: Executor,
        threads: int,
    ) -> None:
        from sklearn.utils import assert_all_finite

        for features, _ in (train, val):
            assert_all_finite(features, input_name="X")
        self._train, self._val, self._iterations = train, val, settings.iterations
        self._classes, labels = np.unique(train[1], return_inverse=True)
        self._on_cpu, self._converges = torch.device(device).type == "cpu", settings.solver == "converged"
        self._problem = LogisticProblem(train[0], labels, device, self._converges, self._map_parts)
        self._pool, self._threads = pool, threads
        self._started: dict[float, Future[_Fitted]] = {}
        self._known: dict[float, _Fitted] = {}

    def start(self, log_cs: Sequence[float]) -> None:
        """Start fits. The first of converged ones start each other, from the smallest C."""
        is_chain = self._converges and not self._started
        for log_c in sorted(log_cs) if is_chain else log_cs:
            if log_c not in self._started:
                # The nearest C among those that the search has read, so that results do not depend on the threads.
                near = min(self._known, key=lambda other: abs(other - log_c), default=log_c)
                self._started[log_c] = self._pool.submit(self._fit, log_c, self._known.get(near))
            if is_chain:
                self[log_c]

    def __getitem__(self, log_c: float) -> _Fitted:
        """Wait for a fit that has started, and return it."""
        if log_c not in self._known:
            self._known[log_c] = self._started[log_c].result()
        return self._known[log_c]

    def is_better(self, log_c: float, other: float) -> bool:
        """Return whether the first recognizes more validation images than the other."""
        one, two = self[log_c], self[other]
        if one.fewest <= two.most and one.most > two.fewest:
            self.settle([log_c, other])
        return self[log_c].fewest > self[other].most

    def settle(self, log_cs: Sequence[float]) -> None:
        """Have scikit-learn compute those whose number of recognized images may depend on rounding."""
        unclear = [log_c for log_c in log_cs if self[log_c].fewest < self[log_c].most]
        fits = self._pool.map(lambda log_c: self._fitted(self._scikit_learn(log_c)), unclear)
        self._known |= dict(zip(unclear, [*fits], strict=True))

    def model(self, log_c: float) -> LogisticRegression:
        """Return a fit as scikit-learn's estimator."""
        fit = self[log_c].fit
        if not isinstance(fit, Fit):
            return fit
        model, (coef, intercept) = self._unfitted(log_c), self._problem.coefficients(fit)
        if len(self._classes) == 2:
            coef, intercept = np.diff(coef, axis=0), np.diff(intercept)
        model.classes_, model.coef_, model.intercept_ = self._classes, coef, intercept
        model.n_features_in_, model.n_iter_ = coef.shape[1], np.array([fit.iterations], dtype=np.int32)
        return model

    def _map_parts(self, function: Callable[..., Any], parts: Sequence[Any]) -> Iterable[Any]:
        """Apply a function to parts of a fit, at the same time if fits leave threads idle."""
        if sum(not fit.done() for fit in [*self._started.values()]) >= self._threads:
            return map(function, parts)
        futures = [self._pool.submit(function, part) for part in parts]
        # This thread computes parts that no other has begun, the last one first, so that fits never wait for a thread.
        own = {n: function(parts[n]) for n in reversed(range(len(parts))) if futures[n].cancel()}
        return [own[n] if n in own else future.result() for n, future in enumerate(futures)]

    def _fit(self, log_c: float, near: _Fitted | None) -> _Fitted:
        if not self._converges or len(self._classes) < 2:  # one class: scikit-learn raises its error
            return self._fitted(*self._official(log_c, near))
        start = near.fit.weights if near and isinstance(near.fit, Fit) else None
        return self._fitted(self._problem.optimum(10.0**log_c, start))

    def _official(self, log_c: float, near: _Fitted | None) -> tuple[Fit | LogisticRegression, float]:
        """Return a fit, and the rounding error of its logits as `rounding_after` gives it; 0 for scikit-learn's own."""
        is_small = len(self._classes) * self._problem.dim < SMALL
        is_long = near is not None and near.iterations > REPRODUCIBLE  # as the near one is
        # For two classes, scikit-learn has another objective.
        if len(self._classes) < 3 or (self._on_cpu and (is_small or is_long)):
            return self._scikit_learn(log_c), 0.0
        limit = min(self._iterations, REPRODUCIBLE) if self._on_cpu else self._iterations
        fit = self._problem.scikit_learn_fit(10.0**log_c, limit)
        if limit < self._iterations and not fit.converged:
            return self._scikit_learn(log_c), 0.0
        return fit, rounding_after(fit.iterations) if self._on_cpu else 0.0

    @cached_property
    def _val_columns(self) -> Tensor:
        return self._problem.columns(self._val[0])

    def _fitted(self, fit: Fit | LogisticRegression, rounding: float = 0.0) -> _Fitted:
        images, labels = self._val
        if not isinstance(fit, Fit):
            correct = int((fit.predict(images) == labels).sum())
            return _Fitted(correct, correct, int(fit.n_iter_[0]), fit)
        logits = (fit.weights @ self._val_columns).cpu().numpy()
        if not rounding:
            correct = int((self._classes[logits.argmax(0)] == labels).sum())
            return _Fitted(correct, correct, fit.iterations, fit)
        is_label = labels == self._classes[:, None]
        of_label, of_others = (np.where(chosen, logits, -np.inf).max(0) for chosen in (is_label, ~is_label))
        lead, unclear = of_label - of_others, rounding * np.ptp(logits, axis=0)
        return _Fitted(int((lead > unclear).sum()), int((lead >= -unclear).sum()), fit.iterations, fit)

    def _scikit_learn(self, log_c: float) -> LogisticRegression:
        """Return scikit-learn's own fit, or its error."""
        return self._unfitted(log_c).fit(*self._train)

    def _unfitted(self, log_c: float) -> LogisticRegression:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(solver="lbfgs", max_iter=self._iterations, C=10.0**log_c)
