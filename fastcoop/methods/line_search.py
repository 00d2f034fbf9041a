"""The line search of Moré and Thuente (1994), with the constants of L-BFGS-B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DECREASE, CURVATURE, INTERVAL = (
    1e-3,
    0.9,
    0.1,
)  # tolerances: of the loss, of the slope, of the bracket's width
LARGEST_STEP = 1e10
MAX_EVALUATIONS = 50  # scikit-learn's


@dataclass(frozen=True)
class _Point:
    step: float
    loss: float
    slope: float

    def tilted(self, slope: float) -> _Point:
        return _Point(self.step, self.loss - slope * self.step, self.slope - slope)


def search_line(
    evaluate: Callable[[float], tuple[float, float]], loss: float, slope: float, first: float
) -> float | None:
    """Return a step that meets the strong Wolfe conditions, or the last one if rounding prevents progress.

    The last evaluated step is the returned one.

    Args:
        evaluate: Loss and slope at a step.
        loss: At step 0.
        slope: At step 0, negative.
        first: The first step to try.

    Returns:
        The step; None if there is none within ``MAX_EVALUATIONS``.
    """
    step, required = first, DECREASE * slope
    best = other = _Point(0.0, loss, slope)
    bracketed, first_stage = False, True
    width, previous_width = LARGEST_STEP, 2 * LARGEST_STEP
    low, high = 0.0, 5 * step
    for _ in range(MAX_EVALUATIONS):
        point = _Point(step, *evaluate(step))
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

    Args:
        x: The best point so far.
        y: The other end of the bracket.
        p: The last point.
        bracketed: Whether the minimum is between x and y.
        low: Smallest next step without a bracket.
        high: Largest next step without a bracket.
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
