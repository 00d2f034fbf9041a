"""Optimizers: the official SGD, and the fast schedule's Shampoo. Each changes the contexts of many runs in one step.

A step first computes all new numbers and then writes them, so that a step that runs out of memory can be repeated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones.precision import limit_threads
from fastcoop.engine.schedule import AVERAGE_KEPT, COVARIANCE_KEPT, REFRESH
from fastcoop.engine.weights import bmm

if TYPE_CHECKING:
    from fastcoop.engine.runs import ActiveRun

# Of the official SGD.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4  # this times the contexts is added to the gradient

Update = tuple[Tensor, Tensor]  # a tensor, and its value after the step


class Optimizer(ABC):
    """Steps of some runs that train together, each with its own settings and learning rates.

    Args:
        groups: The runs, in the order of their contexts. Runs of a group have equally many vectors.
        steps: Steps that these runs do together.

    Attributes:
        rates: Learning rates (steps, runs).
        momentum: (vectors of all runs, width).
    """

    def __init__(self, groups: Sequence[Sequence[ActiveRun]], steps: int):
        self.active = active = [a for group in groups for a in group]
        self.sizes = [len(a.contexts) for a in active]  # vectors of each run
        self.device, self.dtype = active[0].contexts.device, active[0].contexts.dtype
        rates = np.stack([a.rates[a.step : a.step + steps] for a in active], 1)
        self.rates = torch.as_tensor(rates, dtype=self.dtype).to(self.device)
        self.momentum = joined(active, "momentum")

    @staticmethod
    def new_tensors(contexts: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a run with these contexts (vectors, width) before its first step."""
        return {"momentum": torch.zeros_like(contexts)}

    def variant(self, step: int) -> int:
        """Return which operations a step consists of: only steps with equal values can be recorded as one."""
        return 0

    @abstractmethod
    def updates(
        self, vectors: Tensor, grad: Tensor, step: Tensor, frozen: Tensor, variant: int
    ) -> list[Update]:
        """Return what a step changes.

        Args:
            vectors: Contexts of these runs, (vectors, width).
            grad: Their gradients, of any float dtype.
            step: int64 (1,), of this batch, on the device.
            frozen: bool (runs,): diverged runs, whose contexts stay as they are.
            variant: Of this step.
        """


def joined(active: Sequence[ActiveRun], name: str) -> Tensor:
    """Return tensors of runs as one, and make each a view of it: a step of all runs is a step of each."""
    tensors = [a.tensors[name] for a in active]
    whole = torch.cat(tensors)
    for a, view in zip(active, whole.split([len(one) for one in tensors]), strict=True):
        a.tensors[name] = view
    return whole


def slices(sizes: Iterable[int]) -> list[slice]:
    """Return the slices of parts of these sizes, one after another."""
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


class SGD(Optimizer):
    """SGD with momentum and weight decay, of all runs in one step."""

    def __init__(self, groups: Sequence[Sequence[ActiveRun]], steps: int):
        super().__init__(groups, steps)
        runs = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.run_of_vector = torch.as_tensor(runs).to(self.device)

    def updates(
        self, vectors: Tensor, grad: Tensor, step: Tensor, frozen: Tensor, variant: int
    ) -> list[Update]:
        rate = self.rates.index_select(0, step)[0]
        grad = grad.to(vectors.dtype) + WEIGHT_DECAY * vectors
        momentum = (MOMENTUM * self.momentum).add_(grad)
        change = rate[self.run_of_vector, None] * momentum
        change.masked_fill_(frozen[self.run_of_vector, None], 0.0)
        return [(self.momentum, momentum), (vectors, torch.sub(vectors, change, out=change))]


class Shampoo(Optimizer):
    """One-sided Shampoo (docs/fast.md): momentum times the inverse root of the gradients' covariance, at length 1.

    Products, norms and the inverse root are computed run by run in float64: the root amplifies rounding.

    Attributes:
        statistics: float64 (runs, width, width), moving average of G'G.
        root: float64 (runs, width, width), inverse root of the statistics when they were last used.
    """

    def __init__(self, groups: Sequence[Sequence[ActiveRun]], steps: int):
        super().__init__(groups, steps)
        self.statistics, self.root = (
            joined(self.active, name).unflatten(0, (len(self.active), -1)) for name in ("statistics", "root")
        )
        # A tensor, so that 1 - kept is what kept, rounded to the contexts' dtype, leaves.
        self.kept = torch.tensor(AVERAGE_KEPT, dtype=self.dtype, device=self.device)
        ridges = [a.run.schedule.ridge for a in self.active if a.run.schedule]
        self.ridge = torch.tensor(ridges, dtype=torch.float64, device=self.device)[:, None, None]
        self.least_ridge = min(ridges)
        vectors = slices(sum(len(a.contexts) for a in group) for group in groups)
        self.groups = list(zip(slices(map(len, groups)), vectors, strict=True))  # of runs and vectors
        # Runs that started at other times refresh their roots in other steps: few patterns, and the host knows them.
        at = np.array([a.step for a in self.active]) + np.arange(steps)[:, None]
        refreshed = (at < REFRESH) | (at % REFRESH == 0)
        patterns, self._pattern = np.unique(refreshed, axis=0, return_inverse=True)
        self._due = [
            [torch.as_tensor(np.flatnonzero(due[runs])).to(self.device) for runs, _ in self.groups]
            for due in patterns
        ]

    @staticmethod
    def new_tensors(contexts: Tensor) -> dict[str, Tensor]:
        square = contexts.new_zeros(contexts.shape[1], contexts.shape[1], dtype=torch.float64)
        return Optimizer.new_tensors(contexts) | {"statistics": square, "root": square.clone()}

    def variant(self, step: int) -> int:
        return int(self._pattern.reshape(-1)[step])

    def updates(
        self, vectors: Tensor, grad: Tensor, step: Tensor, frozen: Tensor, variant: int
    ) -> list[Update]:
        rates = self.rates.index_select(0, step)[0]
        updates: list[Update] = []
        for (runs, own), due in zip(self.groups, self._due[variant], strict=True):
            g = grad[own].to(vectors.dtype).unflatten(0, (runs.stop - runs.start, -1))
            momentum = self.kept * self.momentum[own].view_as(g) + (1 - self.kept) * g
            exact = g.double()
            covariance = bmm(exact.transpose(1, 2), exact)
            statistics = COVARIANCE_KEPT * self.statistics[runs] + (1 - COVARIANCE_KEPT) * covariance
            root = self.root[runs]
            if len(due):
                chosen = statistics.index_select(0, due)
                roots = inverse_root(chosen, self.ridge[runs].index_select(0, due), self.least_ridge)
                root = root.index_copy(0, due, roots)
            change = bmm(momentum.double(), root)
            # Row by row, and then over rows: the order of a sum must not depend on the other runs.
            norm = change.square().sum(-1).sum(-1)[:, None, None].sqrt()
            change = change / norm.clamp(min=TINY)  # at a root mean square of 1 / sqrt(numbers)
            change = (rates[runs, None, None] * change[0].numel() ** 0.5 * change).to(vectors.dtype)
            change.masked_fill_(frozen[runs, None, None], 0.0)
            after = vectors[own] - change.flatten(0, 1)
            updates += [(self.momentum[own], momentum.flatten(0, 1)), (self.statistics[runs], statistics)]
            updates += [(self.root[runs], root)] * bool(len(due)) + [(vectors[own], after)]
        return updates


TINY = float(np.finfo(np.float64).tiny)


def inverse_root(matrices: Tensor, ridge: Tensor, least_ridge: float) -> Tensor:
    """Return (A / mean(diag A) + ridge I)^(-1/2) of symmetric float64 matrices A (n, width, width), ridge (n, 1, 1).

    A matrix that is not finite, of a run that has diverged, counts as zero. On a CPU by eigenvalues; elsewhere by
    Newton-Schulz iterations, which are products alone, so that a GPU can record them.
    """
    is_finite = torch.isfinite(matrices).flatten(1).all(1)[:, None, None]
    matrices = torch.where(is_finite, matrices, 0.0)
    mean = matrices.diagonal(dim1=1, dim2=2).contiguous().sum(-1) / matrices.shape[-1]
    scaled = matrices / mean.clamp(min=TINY)[:, None, None]
    if matrices.device.type != "cpu":
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        return newton_schulz(scaled + ridge * identity, least_ridge)
    with limit_threads(1):  # small matrices: threads would mostly wait for one another
        values, vectors = torch.linalg.eigh(scaled)
    # Not a power, which rounds by a number's place in memory: roots and reciprocals are exact to the last bit.
    roots = (values.clamp(min=0) + ridge[:, 0]).sqrt().reciprocal()
    return bmm(vectors * roots[:, None], vectors.transpose(1, 2))


def newton_schulz(matrices: Tensor, least: float) -> Tensor:
    """Return M^(-1/2) of M = A + ridge I (n, width, width): A >= 0, its mean diagonal <= 1, ridges >= ``least``.

    Coupled Newton-Schulz iterations for M^(1/2) and M^(-1/2), to the last bits of float64. With x the square root of
    an eigenvalue of Z Y, in [low, 1], each maps x to a x (3 - (a x)^2) / 2, where a is chosen so that the ends of the
    interval become equal: about 2.6 times larger for small x, where a plain iteration has 1.5.
    """
    width = matrices.shape[-1]
    scale = matrices.square().sum((1, 2), keepdim=True).sqrt()  # at least the largest eigenvalue
    identity = torch.eye(width, dtype=matrices.dtype, device=matrices.device)
    y, z, low = matrices / scale, identity.expand_as(matrices), (least / (width + least * width**0.5)) ** 0.5
    is_close = False
    while not is_close:
        is_close = 1 - low <= 1e-9  # this iteration squares what is left
        a = (3 / (1 + low + low * low)) ** 0.5
        t = 0.5 * a * (3 * identity - a * a * (z @ y))
        y, z, low = y @ t, t @ z, 0.5 * a * low * (3 - a * a * low * low)
    return z / scale.sqrt()
