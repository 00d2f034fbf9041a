"""L-BFGS in torch float64, with the iterates of SciPy's L-BFGS-B without bounds.

Directions, line search, restarts and stopping rules are SciPy's, so that results differ from its by rounding only. It
runs on any device and passes over the stored corrections twice in an iteration, SciPy about six times on one core.
L-BFGS amplifies rounding: within about a hundred iterations on features of unequal scales, any two computations of the
same iterates differ visibly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import mul

import numpy as np

from fastcoop.methods.late import Tensor, torch

CORRECTIONS = 10
DECREASE, CURVATURE, INTERVAL = 1e-3, 0.9, 0.1  # line search: in loss, in slope, in the bracket's width
LARGEST_STEP = 1e10
LINE_EVALUATIONS = 50  # the most, in an iteration; scikit-learn's
EVALUATIONS = 15_000  # the most in all; SciPy's
EPSILON = float(np.finfo(float).eps)
LOSS_TOLERANCE = 64 * EPSILON  # scikit-learn's

Evaluate = Callable[["Tensor"], tuple[float, "Tensor"]]


def minimize(
    evaluate: Evaluate, start: Tensor, is_small: Callable[[Tensor], bool], max_iterations: int
) -> tuple[Tensor, int, bool]:
    """Minimize a function.

    Args:
        evaluate: Returns the function's value and gradient, of the point's shape.
        start: float64 (n,).
        is_small: Whether the iterations end at a gradient. They also end at a decrease below `LOSS_TOLERANCE`, relative
            to the value if that is over 1.
        max_iterations: Largest number of iterations.

    Returns:
        The point, the number of iterations, and whether they converged.
    """
    point, (loss, gradient) = start, evaluate(start)
    history, evaluations, iteration = _History(start), 1, 0
    while not is_small(gradient):
        if iteration == max_iterations or evaluations > EVALUATIONS:
            return point, iteration, False
        line = _Line(evaluate, point, history.direction(gradient))
        slope = line.slope_of(gradient)
        first = 1.0 if iteration else 1 / float(torch.linalg.vector_norm(line.direction))
        try:
            step = _search(line, loss, slope, first) if slope < 0 else None
        except ZeroDivisionError:  # an interpolation between equal points
            step = None
        evaluations += line.evaluations
        if step is None:
            if not len(history):
                return point, iteration, False
            history = _History(start)
            continue
        iteration += 1
        previous_loss, previous_gradient = loss, gradient
        point, loss, gradient = line.point, line.loss, line.gradient
        if previous_loss - loss <= LOSS_TOLERANCE * max(abs(previous_loss), abs(loss), 1):
            break
        curvature = (line.slope - slope) * step
        if curvature > -slope * step * EPSILON:
            history.add(line.direction, step, gradient, previous_gradient, curvature)
    return point, iteration, True


class _Line:
    """A function on a line. Point, loss, gradient and slope of the last evaluated step are kept as attributes."""

    loss: float
    slope: float
    gradient: Tensor

    def __init__(self, evaluate: Evaluate, start: Tensor, direction: Tensor) -> None:
        self._evaluate, self._start, self.direction = evaluate, start, direction
        self.evaluations, self.point = 0, start

    def slope_of(self, gradient: Tensor) -> float:
        return float(gradient.dot(self.direction))

    def __call__(self, step: float) -> tuple[float, float]:
        self.evaluations += 1
        self.point = self._start.add(self.direction, alpha=step)
        self.loss, self.gradient = self._evaluate(self.point)
        self.slope = self.slope_of(self.gradient)
        return self.loss, self.slope


class _History:
    """The last corrections, and the direction that they give.

    It is the two-loop recursion (Nocedal 1980) on products of vectors, which are computed in one pass over them. On a
    few numbers, lists take less time than arrays.
    """

    def __init__(self, like: Tensor) -> None:
        self._vectors = like.new_empty(2 * CORRECTIONS, len(like))  # changes of point and gradient, by turns
        self._rows: list[int] = []  # of pairs of vectors, oldest first
        # By correction, oldest first: products of the change of the point, or the gradient, with each one's change of
        # the gradient, and with the last gradient.
        self._mixed: list[list[float]] = []
        self._squares: list[list[float]] = []
        self._of_gradient: list[tuple[float, float]] = []
        # Products of the newest corrections with the newest change of the gradient, until the others are computed.
        self._newest: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, direction: Tensor, step: float, gradient: Tensor, previous_gradient: Tensor, curvature: float
    ) -> None:
        """Add a correction, in place of the oldest if there are too many."""
        row = len(self._rows)
        if row == CORRECTIONS:
            row = self._rows.pop(0)
            self._of_gradient = self._of_gradient[1:]
            self._mixed, self._squares = ([one[1:] for one in of[1:]] for of in (self._mixed, self._squares))
        self._rows.append(row)
        torch.mul(direction, step, out=self._vectors[2 * row])
        change = torch.sub(gradient, previous_gradient, out=self._vectors[2 * row + 1])
        self._newest = curvature, float(change.dot(change))

    def direction(self, gradient: Tensor) -> Tensor:
        """Return minus the inverse Hessian times a gradient."""
        if not self._rows:
            return -gradient
        count, vectors = len(self._rows), self._vectors[: 2 * len(self._rows)]
        products = (vectors @ gradient).tolist()
        of_gradient = [(products[2 * row], products[2 * row + 1]) for row in self._rows]
        if self._newest:
            # The newest change of the gradient is the difference of this gradient and the previous one.
            pairs = zip(of_gradient, self._of_gradient, strict=False)  # the newest has no previous one
            changes = [*((s - t, y - z) for (s, y), (t, z) in pairs), self._newest]
            self._newest = None
            self._mixed.append([0.0] * (count - 1))  # products with older changes are not needed
            self._squares.append([square for _, square in changes[:-1]])
            for mixed, squares, change in zip(self._mixed, self._squares, changes, strict=True):
                mixed.append(change[0])
                squares.append(change[1])
        self._of_gradient = of_gradient
        scale = self._mixed[-1][-1] / self._squares[-1][-1]  # of the first inverse Hessian
        back, weights = [0.0] * count, [0.0] * len(products)
        for n in reversed(range(count)):
            mixed = self._mixed[n]
            back[n] = (of_gradient[n][0] - sum(map(mul, back[n + 1 :], mixed[n + 1 :]))) / mixed[n]
        forth: list[float] = []
        for n, row in enumerate(self._rows):
            of_change = scale * (of_gradient[n][1] - sum(map(mul, back, self._squares[n])))
            of_change += sum(weight * mixed[n] for weight, mixed in zip(forth, self._mixed, strict=False))
            forth.append(back[n] - of_change / self._mixed[n][n])
            weights[2 * row], weights[2 * row + 1] = -forth[n], scale * back[n]
        of_vectors = torch.as_tensor(weights, dtype=gradient.dtype, device=gradient.device)
        return gradient.addmv(vectors.T, of_vectors, beta=-scale)


@dataclass(frozen=True)
class _Point:
    step: float
    loss: float
    slope: float

    def tilted(self, slope: float) -> _Point:
        return _Point(self.step, self.loss - slope * self.step, self.slope - slope)


def _search(line: _Line, loss: float, slope: float, step: float) -> float | None:
    """Return a step that meets the strong Wolfe conditions, or the last one if rounding prevents progress; else None.

    It is the line search of Moré and Thuente (1994), with ``step`` as the first to try. ``loss`` and ``slope`` are
    those at step 0. The last evaluated step is the returned one.
    """
    required = DECREASE * slope
    best = other = _Point(0.0, loss, slope)
    bracketed, first_stage = False, True
    width, previous_width = LARGEST_STEP, 2 * LARGEST_STEP
    low, high = 0.0, 5 * step
    for _ in range(LINE_EVALUATIONS):
        point = _Point(step, *line(step))
        limit = loss + step * required
        first_stage = first_stage and not (point.loss <= limit and point.slope >= 0)
        stuck = bracketed and (step <= low or step >= high or high - low <= INTERVAL * high)
        at_end = (step == LARGEST_STEP and point.loss <= limit and point.slope <= required) or (
            step == 0 and (point.loss > limit or point.slope >= required)
        )
        if stuck or at_end or (point.loss <= limit and abs(point.slope) <= CURVATURE * -slope):
            return step
        # While no step decreases the loss enough, interpolate the loss minus the required decrease.
        tilt = required if first_stage and best.loss >= point.loss > limit else 0.0
        x, y, p = (one.tilted(tilt) for one in (best, other, point))
        step, bracketed = _next_step(x, y, p, bracketed, low, high)
        if p.loss > x.loss:
            other = point
        else:
            if p.slope * x.slope < 0:
                other = best
            best = point
        if bracketed:
            if abs(other.step - best.step) >= 0.66 * previous_width:
                step = best.step + 0.5 * (other.step - best.step)
            width, previous_width = abs(other.step - best.step), width
            low, high = sorted((best.step, other.step))
        else:
            low, high = step + 1.1 * (step - best.step), step + 4 * (step - best.step)
        step = min(max(step, 0.0), LARGEST_STEP)
        if bracketed and (step <= low or step >= high or high - low <= INTERVAL * high):
            step = best.step
    return None


def _next_step(
    x: _Point, y: _Point, p: _Point, bracketed: bool, low: float, high: float
) -> tuple[float, bool]:
    """Return the next step, and whether the minimum is bracketed (MINPACK's dcstep).

    x is the best point so far, y the other end of the bracket, or else ``low`` and ``high`` limit the step, and p is
    the last point.
    """
    if p.loss > x.loss:  # a higher loss
        cubic = _cubic(x, p, p.step < x.step)
        chord = (x.loss - p.loss) / (p.step - x.step)
        quadratic = x.step + x.slope / (chord + x.slope) / 2 * (p.step - x.step)
        is_nearer = abs(cubic - x.step) <= abs(quadratic - x.step)
        return (cubic if is_nearer else cubic + (quadratic - cubic) / 2), True
    if p.slope * x.slope < 0:  # a lower loss, slopes of opposite sign
        cubic, secant = _cubic(p, x, p.step > x.step), _secant(x, p)
        return (cubic if abs(cubic - p.step) > abs(secant - p.step) else secant), True
    if abs(p.slope) < abs(x.slope):  # a lower loss, and a smaller slope of the same sign
        cubic, secant = _cubic(p, x, p.step > x.step, low=low, high=high), _secant(x, p)
        is_nearer = abs(cubic - p.step) < abs(secant - p.step)
        if not bracketed:
            return min(max(secant if is_nearer else cubic, low), high), False
        step, bound = (cubic if is_nearer else secant), p.step + 0.66 * (y.step - p.step)
        return (min(bound, step) if p.step > x.step else max(bound, step)), True
    if bracketed:
        return _cubic(p, y, p.step > y.step), True
    return (high if p.step > x.step else low), False


def _secant(x: _Point, p: _Point) -> float:
    return p.step + p.slope / (p.slope - x.slope) * (x.step - p.step)


def _cubic(
    a: _Point, b: _Point, negative_root: bool, low: float | None = None, high: float | None = None
) -> float:
    """Return the minimizer of the cubic through two points, measured from ``a``.

    With limits, one of them is returned if the cubic has no minimum beyond ``a``.
    """
    theta = 3 * (a.loss - b.loss) / (b.step - a.step) + a.slope + b.slope
    scale = max(abs(theta), abs(a.slope), abs(b.slope))
    root = scale * np.sqrt(max(0.0, (theta / scale) ** 2 - (a.slope / scale) * (b.slope / scale)))
    gamma = -root if negative_root else root
    ratio = (gamma - a.slope + theta) / (2 * gamma - a.slope + b.slope)
    if low is not None and high is not None and not (ratio < 0 and gamma != 0):
        return high if a.step > b.step else low
    return float(a.step + ratio * (b.step - a.step))
