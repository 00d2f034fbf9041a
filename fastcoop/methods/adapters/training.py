"""One small trainer for stacked runs: every tensor has an axis of runs, and no run affects another.

Optimizers are elementwise, with a learning rate per run. Their arithmetic is that of ``torch.optim``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastcoop.methods.adapters.stack import Stack, Weights, over

if TYPE_CHECKING:
    from torch import Tensor

Batch = tuple["Tensor", "Tensor"]  # images and views, int64 (runs, batch) each
Loss = Callable[[Weights, "Tensor", "Tensor"], "Tensor"]  # parameters, rows, views -> (runs,)


@dataclass(frozen=True, eq=False)
class Optimizer:
    """How parameters change by their gradients.

    Attributes:
        kind: "sgd" (momentum), "adam" (weight decay in the gradient), or "adamw" (decoupled).
        rates: float32 (steps, runs), the learning rate of each step; see `cosine_rates`.
        weight_decay: A number, or (runs,).
        momentum: Of "sgd".
        betas, eps: Of "adam" and "adamw".
    """

    kind: Literal["sgd", "adam", "adamw"]
    rates: Tensor
    weight_decay: Tensor | float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def state(self, parameter: Tensor) -> list[Tensor]:
        """Return the moments at the start."""
        return [parameter.new_zeros(parameter.shape) for _ in range(1 if self.kind == "sgd" else 2)]

    def step(self, number: int, parameter: Tensor, gradient: Tensor, moments: list[Tensor]) -> None:
        """Change a parameter (runs, ...) and its moments in place, in step ``number``, counted from 0."""
        rate, decay = over(self.rates[number], parameter), self.weight_decay
        if not isinstance(decay, float):
            decay = over(decay, parameter)
        if self.kind == "adamw":
            parameter.mul_(1 - rate * decay)
        elif not isinstance(decay, float) or decay:
            gradient = gradient + decay * parameter
        if self.kind == "sgd":
            moments[0].mul_(self.momentum).add_(gradient)
            parameter.sub_(rate * moments[0])
            return
        (first, second), mean, square = self.betas, *moments
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square.sqrt().div_(math.sqrt(1 - second ** (number + 1))).add_(self.eps)
        parameter.sub_(rate / (1 - first ** (number + 1)) * mean / root)


def cosine_rates(
    rate: Tensor,
    epochs: int,
    steps: int,
    per: Literal["step", "epoch", "warm_epoch"] = "step",
    warmup: int = 0,
) -> Tensor:
    """Return the learning rates (steps of all epochs, runs) of a cosine to zero.

    Args:
        rate: float32 (runs,), of the start.
        epochs: Number of epochs.
        steps: Steps of an epoch.
        per: "step": the rate changes at each step; "epoch": at each epoch; "warm_epoch": at each epoch as in CoOp,
            whose first epoch has 1e-5 and whose cosine starts one epoch late.
        warmup: Of "step": steps of a linear rise before the cosine.
    """
    from fastcoop.engine.runs import learning_rates

    every = 1 if per == "step" else steps
    if per == "warm_epoch":
        factors = np.stack([learning_rates(epochs, float(one)) for one in rate], 1)
    else:
        total = epochs * steps // every - warmup
        falling = (1 + np.cos(np.pi * np.arange(total) / total)) / 2
        rising = (1 + np.arange(warmup)) / max(1, warmup)
        factors = np.concatenate([rising, falling])[:, None] * rate.double().cpu().numpy()
    return rate.new_tensor(factors.repeat(every, axis=0))


def steps_of(stack: Stack, batch_size: int, keep_short: bool) -> int:
    """Return the steps of an epoch. The last, short batch is left out unless ``keep_short`` or it is the only one."""
    images = stack.labels.shape[1]
    return max(1, -(-images // batch_size) if keep_short else images // batch_size)


def epochs_of_batches(
    stack: Stack, epochs: int, batch_size: int, keep_short: bool = True
) -> Iterator[list[Batch]]:
    """Yield the batches of each epoch: each run's images in its own random order, at a random view of each image.

    Orders and views are drawn from the run's seed, so they are the same whichever runs train together.
    """
    import torch

    images, views = stack.views.shape[1:3]
    steps = steps_of(stack, batch_size, keep_short)
    draws = [np.random.default_rng(run.seed) for run in stack.runs]
    for _ in range(epochs):
        order = np.stack([rng.permutation(images) for rng in draws])
        view = np.stack([rng.integers(views, size=images) for rng in draws])
        rows, drawn = (torch.from_numpy(part).to(stack.labels.device) for part in (order, view))
        cuts = [slice(at * batch_size, (at + 1) * batch_size) for at in range(steps)]
        yield [(rows[:, cut], drawn[:, cut]) for cut in cuts]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each run's mean cross-entropy, (runs,), of logits (runs, batch, classes) and labels (runs, batch)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def train(
    start: Weights,
    epochs: Iterator[list[Batch]],
    loss: Loss,
    optimizer: Optimizer,
    on_epoch: Callable[[int, Weights], None] = lambda epoch, parameters: None,
) -> tuple[Weights, Tensor]:
    """Train the parameters of stacked runs.

    Args:
        start: Parameters at the start, (runs, ...) each. They are not changed.
        epochs: Of batches, such as `epochs_of_batches`.
        loss: Returns the loss of each run, (runs,), of parameters and a batch.
        optimizer: The optimizer.
        on_epoch: Called after each epoch, counted from 1, with the parameters, which later steps change.

    Returns:
        The parameters after the last step, and the mean loss of each epoch, float32 (runs, epochs).
    """
    import torch

    parameters = {name: one.clone().requires_grad_() for name, one in start.items()}
    moments = {name: optimizer.state(one.detach()) for name, one in parameters.items()}
    losses, number = [], 0
    for epoch, batches in enumerate(epochs, 1):
        total: Tensor | float = 0.0
        for batch in batches:
            each = loss(parameters, *batch)
            gradients = torch.autograd.grad(each.sum(), list(parameters.values()))
            with torch.no_grad():
                for (name, one), gradient in zip(parameters.items(), gradients, strict=True):
                    optimizer.step(number, one, gradient, moments[name])
            total, number = total + each.detach() / len(batches), number + 1
        losses.append(total)
        on_epoch(epoch, {name: one.detach() for name, one in parameters.items()})
    return {name: one.detach() for name, one in parameters.items()}, torch.stack(losses, 1)  # type: ignore[arg-type]
