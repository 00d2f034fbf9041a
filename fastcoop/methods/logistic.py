"""Multinomial logistic regression in float64, on any device: by scikit-learn's iterates, or to the optimum.

Its iterates start at zero, follow gradients and are equivariant to rotations. With fewer images than features, they are
computed in the span of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.lbfgs import EPSILON, minimize

GRADIENT_TOLERANCE = 1e-4  # scikit-learn's, of the largest entry
OPTIMUM_TOLERANCE = 1e-8  # of the decrease that another Newton step promises, relative to the objective
MAX_NEWTON_STEPS, MAX_PRODUCTS = 200, 500  # steps; products with the Hessian in a step
RESIDUAL = 0.05  # of a Newton step, in the preconditioner's norm
PART_WORK, MAX_PARTS = 2**26, 8  # multiplications of a product with the images of a part; parts


class Fit(NamedTuple):
    """A fit in the rotated coordinates of its `LogisticProblem`, whose ``coefficients`` are those of the features."""

    weights: Tensor  # float64 (classes, rank + 1), intercepts last; a fit with a similar C may start there
    iterations: int
    converged: bool  # whether iterations ended by their own rules, not by the largest number of them


class _Part(NamedTuple):
    features: Tensor  # and a one (images of the part, rank + 1)
    transposed: Tensor
    labels: Tensor  # int64 (1, images of the part)
    minus_ones: Tensor  # of that shape


class LogisticProblem:
    """The training images of a logistic regression, which may be fitted for several C.

    Sums over many images are sums over parts of them, which ``map_parts`` may compute at the same time. The parts
    depend on the sizes alone, so that results do not depend on the number of threads.

    Args:
        features: float64 (images, dim), finite.
        labels: int (images,), from 0 to classes - 1, each of them.
        device: Where to compute.
        principal: Whether to compute in the principal axes of centered features, as `optimum` does; else with the
            features as they are, or rotated, as `scikit_learn_fit` does.
        map_parts: Applies a function to each part, such as the map of a thread pool.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        device: str | torch.device = "cpu",
        principal: bool = False,
        map_parts: Callable[..., Any] = map,
    ) -> None:
        (self.images, self.dim), self.classes = features.shape, int(labels.max()) + 1
        x = torch.as_tensor(features, dtype=torch.float64, device=device)
        self._mean = x.mean(0) if principal else torch.zeros_like(x[0])
        self._rotation: Tensor | None = None  # (rank, dim), orthonormal rows
        if principal:
            x = x - self._mean
        if self.images < self.dim:
            columns, upper = torch.linalg.qr(x.T)
            self._rotation, x = columns.T.contiguous(), upper.T
        if principal:
            self._variances, axes = torch.linalg.eigh(x.T @ x / self.images)
            self._rotation = axes.T if self._rotation is None else axes.T @ self._rotation
            x = x @ axes
        width = x.shape[1] + 1
        # Rows begin at multiples of 64 bytes: products with them take a tenth less time.
        with_ones = x.new_ones(self.images, -(-width // 8) * 8)[:, :width]
        with_ones[:, :-1] = x
        numbers = torch.as_tensor(labels, dtype=torch.int64, device=device)[None]
        count = 1 if x.device.type != "cpu" else with_ones.numel() * self.classes // PART_WORK
        count = max(1, min(count, self.images, MAX_PARTS))
        self._zeros, self._map_parts = x.new_zeros(self.classes, width), map_parts if count > 1 else map
        self._is_coef = x.new_ones(width)  # 0 for intercepts, which have no penalty
        self._is_coef[-1] = 0
        self._parts = [
            _Part(rows, rows.T.contiguous(), of_rows, x.new_full(of_rows.shape, -1))
            for rows, of_rows in zip(
                with_ones.tensor_split(count), numbers.tensor_split(count, 1), strict=True
            )
        ]

    def scikit_learn_fit(self, c: float, max_iterations: int) -> Fit:
        """Return the fit of scikit-learn's ``LogisticRegression(C=c, max_iter=max_iterations)``, up to rounding.

        For two classes, scikit-learn has another objective.
        """
        penalties = self._is_coef / (c * self.images)

        def evaluate(weights: Tensor) -> tuple[float, Tensor]:
            if weights is start:
                return self._at_zero
            loss, gradient, _ = self._derivatives(weights.view_as(self._zeros), penalties)
            return loss, gradient.view(-1)

        start, is_small = self._zeros.view(-1), _StoppingRule(self._zeros.shape, self._rotation)
        weights, iterations, converged = minimize(evaluate, start, is_small, max_iterations)
        return Fit(weights.view_as(self._zeros), iterations, converged)

    def optimum(self, c: float, start: Tensor | None = None) -> Fit:
        """Return the minimum of scikit-learn's objective, by Newton's method with conjugate gradients.

        Args:
            c: scikit-learn's C.
            start: The weights of the fit with another C.
        """
        # With two classes, scikit-learn penalizes the difference of their coefficients, whose square is twice theirs.
        penalties = self._is_coef * (2 if self.classes == 2 else 1) / (c * self.images)
        weights = self._zeros if start is None else start
        loss, gradient, residuals = self._derivatives(weights, penalties)
        for iteration in range(MAX_NEWTON_STEPS):
            direction = self._newton_direction(gradient, residuals, penalties)
            decrease = -float((gradient * direction).sum())
            if decrease <= OPTIMUM_TOLERANCE * loss:
                return Fit(weights, iteration, True)
            step = 1.0
            while True:
                point = weights.add(direction, alpha=step)
                found = self._derivatives(point, penalties)
                if found[0] <= loss - 1e-4 * step * decrease:
                    break
                step /= 2
                if step < EPSILON:
                    return Fit(weights, iteration, False)
            weights, (loss, gradient, residuals) = point, found
        return Fit(weights, MAX_NEWTON_STEPS, False)

    def coefficients(self, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
        """Return a fit's coefficients (classes, dim) and intercepts (classes,), float64."""
        rotated, intercept = fit.weights[:, :-1], fit.weights[:, -1]
        coef = rotated if self._rotation is None else rotated @ self._rotation
        return coef.cpu().numpy(), (intercept - coef @ self._mean).cpu().numpy()

    def columns(self, images: np.ndarray) -> Tensor:
        """Return images (n, dim) as columns (rank + 1, n), which a fit's weights multiply to logits."""
        x = torch.as_tensor(images, dtype=torch.float64, device=self._mean.device) - self._mean
        x = x if self._rotation is None else x @ self._rotation.T
        return torch.cat([x.T, x.new_ones(1, len(x))])

    @cached_property
    def _at_zero(self) -> tuple[float, Tensor]:
        """The objective and its gradient at zero weights, where classes are equally probable, whatever C is."""
        gradient = torch.zeros_like(self._zeros)
        for part in self._parts:
            probabilities = torch.full_like(part.transposed[:1], 1 / self.classes).repeat(self.classes, 1)
            gradient += self._residuals(probabilities, part) @ part.features
        return math.log(self.classes), gradient.view(-1)

    def _derivatives(self, weights: Tensor, penalties: Tensor) -> tuple[float, Tensor, list[Tensor]]:
        """Return the objective, its gradient (classes, rank + 1) and the residuals of each part (classes, images).

        The objective is the mean cross-entropy, and half the sum of the penalties, (rank + 1,), times the squared
        weights. Residuals are probabilities minus targets, divided by the number of images.
        """
        found = self._map_parts(partial(self._of_part, weights), self._parts)
        log_likelihoods, gradients, residuals = zip(*found, strict=True)
        decay = weights * penalties
        half_decay = 0.5 * float(decay.view(-1).dot(weights.view(-1)))
        loss = half_decay - sum(map(float, log_likelihoods)) / self.images
        return loss, _total([decay, *gradients]), [*residuals]

    def _newton_direction(self, gradient: Tensor, residuals: list[Tensor], penalties: Tensor) -> Tensor:
        """Return minus the inverse Hessian times the gradient, roughly, by preconditioned conjugate gradients.

        The preconditioner is the Hessian's diagonal if probabilities do not depend on the image: in principal axes,
        its part of one class is then diagonal.
        """
        # Of each part, its probabilities divided by the number of images: residuals plus targets.
        pairs = [
            (part, there.scatter_add(0, part.labels, part.minus_ones / -self.images))
            for part, there in zip(self._parts, residuals, strict=True)
        ]
        mass = _total((p * (1 - p * self.images).clamp(min=0)).sum(1, keepdim=True) for _, p in pairs)
        diagonal = gradient.new_ones(gradient.shape)
        diagonal[:, :-1] = self._variances.clamp(min=0)
        diagonal *= mass
        diagonal += penalties
        direction, residual = gradient.new_zeros(gradient.shape), -gradient
        scaled = residual / diagonal
        along, square = scaled, (residual * scaled).sum()
        enough = RESIDUAL**2 * square
        for _ in range(MAX_PRODUCTS):
            terms = self._map_parts(partial(self._curvature, along), pairs)
            product = _total([along * penalties, *terms])
            length = square / (along * product).sum()
            direction = direction + length * along
            residual = residual - length * product
            scaled = residual / diagonal
            square, previous = (residual * scaled).sum(), square
            if square <= enough:
                break
            along = scaled + square / previous * along
        return direction

    def _of_part(self, weights: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
        """Return a part's log-likelihood, its term of the gradient, and its residuals."""
        log_probabilities = torch.log_softmax(weights @ part.transposed, 0)
        log_likelihood = log_probabilities.gather(0, part.labels).sum()
        residuals = self._residuals(log_probabilities.exp_(), part)
        return log_likelihood, residuals @ part.features, residuals

    def _residuals(self, probabilities: Tensor, part: _Part) -> Tensor:
        """Return probabilities minus targets, divided by the number of images, in place of the probabilities."""
        return probabilities.scatter_add_(0, part.labels, part.minus_ones).mul_(1 / self.images)

    def _curvature(self, along: Tensor, pair: tuple[_Part, Tensor]) -> Tensor:
        """Return a part's term of the product of the Hessian with a vector."""
        part, probabilities = pair
        change = (along @ part.transposed).mul_(probabilities)
        return change.sub_(probabilities * (change.sum(0) * self.images)) @ part.features


class _StoppingRule:
    """Whether no entry of a gradient is over scikit-learn's tolerance, in the original coordinates.

    Args:
        shape: Classes, rank + 1.
        rotation: (rank, dim) to the original coordinates, or None.
    """

    def __init__(self, shape: torch.Size, rotation: Tensor | None) -> None:
        self._shape, self._rotation = shape, rotation
        self._large: tuple[int, Tensor] | None = None  # class and axis (rank,) of an entry that was large

    def __call__(self, gradient: Tensor) -> bool:
        rows = gradient.view(self._shape)
        if self._rotation is None:
            return bool(torch.linalg.vector_norm(rows, torch.inf) <= GRADIENT_TOLERANCE)
        if float(torch.linalg.vector_norm(rows[:, -1], torch.inf)) > GRADIENT_TOLERANCE:
            return False
        # An entry that was over the tolerance usually is again.
        if self._large and abs(float(rows[self._large[0], :-1].dot(self._large[1]))) > GRADIENT_TOLERANCE:
            return False
        rotated = rows[:, :-1]
        label = int(rotated.norm(dim=1).argmax())
        entries = (rotated[label] @ self._rotation).abs()
        self._large = label, self._rotation[:, entries.argmax()].clone()
        is_small = entries.max() <= GRADIENT_TOLERANCE
        return bool(is_small and (rotated @ self._rotation).abs().max() <= GRADIENT_TOLERANCE)


def _total(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for other in others:
        first.add_(other)
    return first
