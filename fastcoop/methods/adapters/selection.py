"""What may be looked at to choose a method's values: the selection protocols, and the search over values.

Choices see validation images only. The exception is ``official``, where the official code looks at test labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastcoop.datasets.fewshot import FewShot, validation_images
from fastcoop.methods.adapters.stack import Stack, Weights
from fastcoop.methods.data import Labelled
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:
    from fastcoop.methods.adapters.base import Adapter

Selection = Literal["fixed", "few_val", "shots_val", "full_val", "imagenet_val", "official"]
# Of methods whose official code reads no test labels.
ValidationOnly = Literal["fixed", "few_val", "shots_val", "full_val", "imagenet_val"]
BLOCK_BYTES = 64 << 20  # of the logits of images that are judged at once


def drawn_for(run: RunSpec[Any], selection: Selection) -> np.ndarray:
    """Return the rows of the validation split that a run's values are chosen on."""
    if selection == "few_val":
        return run.subset.val
    shots = run.shots if selection == "shots_val" else "all"
    return validation_images(run.data.dataset, run.subset.train, shots, run.seed)


@dataclass(frozen=True, eq=False)
class Judge:
    """Labelled images that the values of stacked runs are chosen on, by accuracy.

    Attributes:
        adapter: The method.
        stack: The runs.
        images: float32 (runs, images, dim), raw features.
        labels: int64 (runs, images).
    """

    adapter: Adapter[Any]
    stack: Stack
    images: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls, adapter: Adapter[Any], stack: Stack, selection: Selection, on_test: bool = False
    ) -> Judge | None:
        """Return the judge of runs; None if they choose nothing. ``on_test``: of official codes that look there."""
        if selection == "fixed":
            return None
        if on_test:
            given: list[Labelled] = [stack.runs[0].data.split("test", adapter.kind)]
        else:
            drawn = [drawn_for(run, selection) for run in stack.runs]
            if all(np.array_equal(rows, drawn[0]) for rows in drawn):
                drawn = drawn[:1]
            given = [
                run.data.validation(FewShot(run.subset.train, rows), adapter.kind)
                for run, rows in zip(stack.runs, drawn, strict=False)
            ]
        stacked = (torch.from_numpy(np.stack(part)) for part in zip(*given, strict=True))
        images, labels = (one.to(stack.features.device) for one in stacked)
        runs = len(stack)
        return cls(adapter, stack, images.expand(runs, -1, -1), labels.expand(runs, -1))

    def accuracies(self, weights: Weights, grid: Sequence[Mapping[str, Tensor]] = ({},)) -> Tensor:
        """Return accuracies in percent, float64 (candidates, runs), with each candidate's values (runs,) by name.

        An image is right if the logit of its class is above all others.
        """
        given = {name: weights[name] for name in self.adapter.values}
        correct = torch.zeros(len(grid), len(self.stack), dtype=torch.int64, device=self.images.device)
        with torch.no_grad():
            for images, labels in self._blocks(weights):
                logits = self.adapter.scorer(weights, images, self.stack.texts)
                own, counts = labels[..., None], []
                for values in grid:
                    found = logits(**{**given, **values})
                    # The true class against the highest of the others; argmax takes ten times as long.
                    highest = found.gather(-1, own)[..., 0]
                    others = found.scatter_(-1, own, -math.inf).amax(-1)
                    counts.append((highest > others).sum(-1))
                correct += torch.stack(counts)
        return 100 * correct.double() / self.labels.shape[1]

    def _blocks(self, weights: Weights) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, BLOCK_BYTES // (len(self.stack) * self.adapter.image_bytes(weights, self.stack.texts)))
        for start in range(0, self.labels.shape[1], size):
            yield self.images[:, start : start + size], self.labels[:, start : start + size]

    def search(self, weights: Weights, values: Mapping[str, Sequence[float]]) -> tuple[Weights, Tensor]:
        """Return the best of all combinations of values, (runs,) by name, and its accuracy, (runs,).

        The first of equals is the best, with the values of the last name in the inner loop.
        """
        ones = torch.ones(len(self.stack), dtype=self.images.dtype, device=self.images.device)
        tensors = [[value * ones for value in several] for several in values.values()]
        grid = [dict(zip(values, row, strict=True)) for row in product(*tensors)]
        found, best = self.accuracies(weights, grid).max(0)
        chosen = torch.tensor(list(product(*values.values())), dtype=ones.dtype, device=ones.device)[best]
        return {name: chosen[:, place] for place, name in enumerate(values)}, found


class BestEpoch:
    """Keeps, for each run, the parameters of the epoch with the best accuracy: the first of equals, or the last."""

    def __init__(self, judge: Judge, fixed: Weights, last_of_equals: bool = False):
        self.judge, self.fixed, self.last_of_equals = judge, fixed, last_of_equals
        self.best: Weights = {}

    def __call__(self, epoch: int, parameters: Weights) -> None:
        """Look at the parameters after an epoch."""
        found = self.judge.accuracies(self.fixed | parameters)[0]
        epochs = found.new_full(found.shape, epoch)
        if not self.best:
            self.accuracy, self.epoch = found, epochs
            self.best = {name: one.clone() for name, one in parameters.items()}
            return
        better = found >= self.accuracy if self.last_of_equals else found > self.accuracy
        self.accuracy, self.epoch = found.where(better, self.accuracy), epochs.where(better, self.epoch)
        for name, one in parameters.items():
            self.best[name][better] = one[better]
