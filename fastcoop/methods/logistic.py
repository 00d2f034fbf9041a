"""Logistic regression: the iterates of scikit-learn's L-BFGS, with less work.

The objective, the start, the directions, the line search and the stopping rules are those of scikit-learn and SciPy, so
the fits agree to rounding. The work is less for three reasons:

- L-BFGS from zero is equivariant to rotations. With fewer images than features, the fit runs in the images' span.
- The logits are linear in the coefficients. A line search needs one product for its direction, and none for its steps.
- SciPy's L-BFGS-B supports bounds; without bounds, a direction is two products with the stored corrections.

NumPy's products release the interpreter's lock, so fits in several threads run at the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastcoop.methods.line_search import search_line

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

GRADIENT_TOLERANCE = 1e-4  # scikit-learn's; of the largest entry
LOSS_TOLERANCE = 64 * np.finfo(float).eps  # scikit-learn's; relative, between two iterations
CORRECTIONS = 10  # SciPy's; of the inverse Hessian
MAX_EVALUATIONS = 15_000  # SciPy's


class LogisticProblem:
    """The training images of a multinomial logistic regression, which may be fitted for several C.

    Args:
        features: float64 (images, dim).
        labels: Integers (images,).

    Raises:
        ValueError: If features are not finite.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        from sklearn.utils import assert_all_finite

        assert_all_finite(features, input_name="X")
        images, self.dim = features.shape
        self.classes, self.labels = np.unique(labels, return_inverse=True)
        self.images = np.arange(images)
        self._rotation: np.ndarray | None = None  # (images, dim), orthonormal rows
        self._features = np.ascontiguousarray(features)  # (images, rank), rank = min(images, dim)
        if images < self.dim and len(self.classes) > 2:
            columns, upper = np.linalg.qr(features.T)
            self._rotation, self._features = np.ascontiguousarray(columns.T), np.ascontiguousarray(upper.T)

    def fit(self, c: float, max_iterations: int) -> LogisticRegression:
        """Return the fit of scikit-learn's ``LogisticRegression(C=c, max_iter=max_iterations)``."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=c, max_iter=max_iterations)
        if len(self.classes) < 3:  # scikit-learn's other objective, for two classes; or its error
            return model.fit(self._features, self.classes[self.labels])
        weights, iterations = self._minimize(1 / (c * len(self._features)), max_iterations)
        coef = weights[:, :-1] if self._rotation is None else weights[:, :-1] @ self._rotation
        model.classes_, model.coef_, model.intercept_ = self.classes, coef, weights[:, -1]
        model.n_features_in_, model.n_iter_ = self.dim, np.array([iterations], dtype=np.int32)
        return model

    def _minimize(self, penalty: float, max_iterations: int) -> tuple[np.ndarray, int]:
        """Return the weights (classes, rank + 1), the intercepts last, and the number of iterations."""
        weights = np.zeros((len(self.classes), self._features.shape[1] + 1))
        logits = np.zeros((len(self.classes), len(self._features)))
        loss, probabilities = self.cross_entropy(logits)
        gradient = self._gradient(weights, probabilities, penalty)
        history = _History(weights.size)
        evaluations, iteration = 1, 0
        while iteration < max_iterations and evaluations <= MAX_EVALUATIONS and not self._is_small(gradient):
            direction = history.direction(gradient.ravel()).reshape(weights.shape)
            slope = float(np.vdot(gradient, direction))
            change = self._logits(direction)
            line = _Line(self, weights, direction, logits, change, penalty)
            first = 1.0 if iteration else 1 / float(np.linalg.norm(direction))
            step = search_line(line, loss, slope, first) if slope < 0 else None
            evaluations += line.evaluations
            if step is None:  # as in L-BFGS-B: restart with the gradient, or end
                if not len(history):
                    break
                history.clear()
                continue
            weights, logits = weights + step * direction, logits + step * change
            previous_loss, previous_gradient = loss, gradient
            loss, gradient = line.loss, self._gradient(weights, line.probabilities, penalty)
            iteration += 1
            if previous_loss - loss <= LOSS_TOLERANCE * max(abs(previous_loss), abs(loss), 1):
                break
            curvature = (line.slope - slope) * step
            if curvature > -slope * step * np.finfo(float).eps:
                history.add((step * direction).ravel(), (gradient - previous_gradient).ravel(), curvature)
        return weights, iteration

    def _logits(self, weights: np.ndarray) -> np.ndarray:
        """Return the logits (classes, images) of weights (classes, rank + 1)."""
        logits: np.ndarray = weights[:, :-1] @ self._features.T
        logits += weights[:, -1:]
        return logits

    def cross_entropy(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy and the probabilities (classes, images) of logits of this shape."""
        shifted = logits - logits.max(0)
        of_labels = shifted[self.labels, self.images]
        np.exp(shifted, out=shifted)
        sums = shifted.sum(0)
        loss = float((np.log(sums) - of_labels).mean())
        shifted /= sums
        return loss, shifted

    def _gradient(self, weights: np.ndarray, probabilities: np.ndarray, penalty: float) -> np.ndarray:
        """Return the gradient (classes, rank + 1). The intercepts have no penalty."""
        error = probabilities / len(self.images)
        error[self.labels, self.images] -= 1 / len(self.images)
        gradient = np.empty_like(weights)
        np.multiply(weights[:, :-1], penalty, out=gradient[:, :-1])
        gradient[:, :-1] += error @ self._features
        gradient[:, -1] = error.sum(1)
        return gradient

    def _is_small(self, gradient: np.ndarray) -> bool:
        """Return whether no entry of the gradient, in the original coordinates, is over the tolerance."""
        if self._rotation is None or np.abs(gradient[:, -1]).max() > GRADIENT_TOLERANCE:
            return bool(np.abs(gradient).max() <= GRADIENT_TOLERANCE)
        norms = np.linalg.norm(gradient[:, :-1], axis=1)
        if norms.max() > GRADIENT_TOLERANCE * self.dim**0.5:  # the largest entry is at least norm / sqrt(dim)
            return False
        unclear = gradient[norms > GRADIENT_TOLERANCE, :-1]  # the largest entry is at most the norm
        return not unclear.size or bool(np.abs(unclear @ self._rotation).max() <= GRADIENT_TOLERANCE)


class _Line:
    """The objective on a line. Loss, slope and probabilities of the last step are kept as attributes.

    Args:
        problem: The images.
        weights: At step 0, (classes, rank + 1).
        direction: Of the same shape.
        logits: Of the weights, (classes, images).
        change: Logits of the direction, (classes, images).
        penalty: Factor of half the squared coefficients.
    """

    def __init__(
        self,
        problem: LogisticProblem,
        weights: np.ndarray,
        direction: np.ndarray,
        logits: np.ndarray,
        change: np.ndarray,
        penalty: float,
    ) -> None:
        self._problem, self._logits, self._change = problem, logits, change
        self._mean_change = float(change[problem.labels, problem.images].mean())
        at, to = weights[:, :-1], direction[:, :-1]
        self._squares = [
            penalty * float(product) for product in (np.vdot(at, at), np.vdot(at, to), np.vdot(to, to))
        ]
        self.evaluations = 0

    def __call__(self, step: float) -> tuple[float, float]:
        """Return the objective and its slope at a step."""
        cross_entropy, self.probabilities = self._problem.cross_entropy(self._logits + step * self._change)
        square, mixed, direction_square = self._squares
        self.loss = cross_entropy + 0.5 * square + step * (mixed + 0.5 * step * direction_square)
        mean_change = float(np.vdot(self.probabilities, self._change)) / len(self._problem.images)
        self.slope = mean_change - self._mean_change + mixed + step * direction_square
        self.evaluations += 1
        return self.loss, self.slope


class _History:
    """The last corrections of L-BFGS, and the direction that they give.

    This is the compact form of the inverse Hessian (Byrd, Nocedal and Schnabel 1994, equation 3.1).
    """

    def __init__(self, size: int) -> None:
        self._changes = np.empty((2, CORRECTIONS, size))  # of weights, and of gradients
        self._products = np.zeros(
            (2, CORRECTIONS, CORRECTIONS)
        )  # of weights' or gradients' changes with gradients'
        self.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows: list[int] = []  # oldest first
        self._scale = 1.0  # of the first inverse Hessian

    def add(self, weights_change: np.ndarray, gradient_change: np.ndarray, curvature: float) -> None:
        """Add a correction, in place of the oldest if there are too many."""
        row = len(self._rows) if len(self._rows) < CORRECTIONS else self._rows.pop(0)
        self._rows.append(row)
        self._changes[0, row], self._changes[1, row] = weights_change, gradient_change
        filled = len(self._rows)
        column = self._changes[:, :filled] @ gradient_change
        self._products[:, :filled, row] = column
        self._products[1, row, :filled] = column[1]
        self._products[0, row, row] = curvature
        self._scale = curvature / column[1, row]

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        """Return minus the inverse Hessian times a gradient (size,)."""
        from scipy.linalg import solve_triangular

        if not self._rows:
            return -gradient
        rows, filled, scale = np.array(self._rows), len(self._rows), self._scale
        with_weights, with_gradients = (self._changes[:, :filled] @ gradient)[:, rows]
        mixed, squares = self._products[:, rows[:, None], rows]
        mixed = np.triu(mixed)
        solved = solve_triangular(mixed, with_weights)
        middle = np.diag(mixed) * solved + scale * (squares @ solved - with_gradients)
        coefficients = np.empty((2, filled))
        coefficients[:, rows] = -solve_triangular(mixed, middle, trans=1), scale * solved
        direction: np.ndarray = coefficients[0] @ self._changes[0, :filled]
        direction += coefficients[1] @ self._changes[1, :filled]
        direction -= scale * gradient
        return direction
