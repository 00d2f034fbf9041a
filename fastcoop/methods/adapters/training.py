"""One small trainer for stacked runs: every tensor has an axis of runs, and no run affects another.

Optimizers are those of ``torch.optim``, with a learning rate per run and without its overhead per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastcoop.methods.adapters.stack import Stack, Weights, over
from fastcoop.methods.base import report_share

if TYPE_CHECKING:
    from torch import Tensor

DRAWN_AT_ONCE = 16  # epochs whose batches are drawn at once

Per = Literal["step", "epoch", "warm_epoch"]
Batch = tuple["Tensor", ...]  # int64 (runs, batch) each; of `Samples`, one tensor of places
Loss = Callable[..., "Tensor"]  # parameters, and the tensors of a batch -> (runs,)
# The same -> losses (runs,), and the gradient of each run's own loss for each parameter, in order
Gradient = Callable[..., tuple["Tensor", Sequence["Tensor"]]]


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

    def prepare(self, parameters: Sequence[Tensor]) -> Callable[[int, Sequence[Tensor]], None]:
        """Return a function that changes the parameters, (runs, ...) each, by their gradients in a step from 0.

        It may change the gradients too.
        """
        import torch

        decays, kind = (
            torch.as_tensor(self.weight_decay).to(self.rates).expand(self.rates.shape[1]),
            self.kind,
        )
        decay, rates = _Factor(decays[None]), _Factor(self.rates)
        has_decay = bool(decays.any())
        first = [torch.zeros_like(one) for one in parameters]
        second = [torch.zeros_like(one) for one in parameters] if kind != "sgd" else first
        beta, beta_2 = self.betas

        def step(number: int, gradients: Sequence[Tensor]) -> None:
            shrink = math.sqrt(1 - beta_2 ** (number + 1))
            for one, gradient, mean, square in zip(parameters, gradients, first, second, strict=True):
                if has_decay and kind == "adamw":
                    one.mul_(over(1 - self.rates[number].double() * decays, one).to(one))
                elif has_decay:
                    decay.add(gradient, one, 0)
                if kind == "sgd":
                    torch.add(gradient, mean, alpha=self.momentum, out=mean)
                    rates.add(one, mean, number, -1.0)
                else:
                    mean.lerp_(gradient, 1 - beta)
                    square.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
                    change = mean / square.sqrt().div_(shrink).add_(self.eps)
                    rates.add(one, change, number, -1 / (1 - beta ** (number + 1)))

        return step


class _Factor:
    """A number per step and run, by which a tensor (runs, ...) is added to another: in one pass if runs agree."""

    def __init__(self, values: Tensor):
        """``values``: (steps, runs)."""
        self.values = values
        self.shared = values[:, 0].tolist() if bool((values == values[:, :1]).all()) else None

    def add(self, to: Tensor, what: Tensor, step: int, times: float = 1.0) -> None:
        """Add ``times`` the number of a step times ``what``, in place."""
        if self.shared is not None:
            to.add_(what, alpha=times * self.shared[step])
        else:
            to.addcmul_(what, over(self.values[step], what), value=times)


def cosine_rates(
    rate: Tensor,
    epochs: int,
    steps: int,
    per: Per = "step",
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


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """The batches of each epoch, as places in `Samples` of the views of stacked runs.

    A run's images are in its own random order, at a random view of each. Orders and views are drawn from the run's
    seed, so they are the same whichever runs train together.

    Attributes:
        stack: The runs.
        epochs: Number of epochs.
        batch_size: Images of a step.
        keep_short: Whether the last, short batch of an epoch is a step although it is not the only one.
        pooled: Draw from all views of all images in random order, as CLAP's code does. An epoch has the steps that it
            would have over the images alone, and each step ``batch_size`` views, if there are as many.
    """

    stack: Stack
    epochs: int
    batch_size: int
    keep_short: bool = False
    pooled: bool = False

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        images, size = self.stack.labels.shape[1], self.batch_size
        return max(1, -(-images // size) if self.keep_short else images // size)

    def rates(self, rate: Tensor, per: Per) -> Tensor:
        """Return the `cosine_rates` of all steps."""
        return cosine_rates(rate, self.epochs, self.steps, per)

    def __iter__(self) -> Iterator[list[Batch]]:
        import torch

        (images, views), runs = self.stack.views.shape[1:3], self.stack.runs
        first, draws = (
            images * views * np.arange(len(runs)),
            [np.random.default_rng(run.seed) for run in runs],
        )

        def order(rng: np.random.Generator) -> np.ndarray:
            if self.pooled:
                return rng.permutation(images * views)[: self.steps * self.batch_size]
            return rng.permutation(images) * views + rng.integers(views, size=images)

        for start in range(0, self.epochs, DRAWN_AT_ONCE):
            epochs = range(start, min(start + DRAWN_AT_ONCE, self.epochs))
            drawn = np.array([[order(rng) for rng in draws] for _ in epochs]) + first[:, None]
            for places in torch.from_numpy(drawn).to(self.stack.labels.device):
                yield [(part,) for part in places.split(self.batch_size, 1)[: self.steps]]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each run's mean cross-entropy, (runs,), of logits (runs, batch, classes) and labels (runs, batch)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def softmax_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each run's mean cross-entropy, (runs,), and each image's gradient for its logits (runs, classes, batch).

    Classes come before images, so that products with images and classes need no transposed copy.
    """
    likelihoods, target = logits.log_softmax(1), labels[:, None]
    losses = -likelihoods.gather(1, target).mean((1, 2))
    change = likelihoods.exp_()
    return losses, change.scatter_add_(1, target, change.new_full((), -1.0).expand_as(target))


def cosine_cross_entropy(
    classes: Tensor,
    images: Tensor,
    labels: Tensor,
    scale: float,
    anchors: Tensor | None = None,
    pull: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each run's mean cross-entropy, (runs,), and its gradient for ``classes``, (runs, classes, dim).

    Autograd's steps through the normalization of the classes and the penalty would double the time of a step.

    Args:
        classes: Class vectors (runs, classes, dim), of any length.
        images: Image features (runs, batch, dim), of length 1.
        labels: int64 (runs, batch).
        scale: Factor on the cosine similarities.
        anchors: (classes, dim), where a penalty holds the class vectors.
        pull: (runs, classes), weights of the penalty: the sum over classes of ``pull * |classes - anchors| ** 2`` is
            added to the loss.
    """
    import torch

    norms = torch.linalg.vector_norm(classes, dim=-1)
    factor = (scale / norms)[..., None]
    logits = (classes @ images.mT).mul_(factor)
    losses, change = softmax_gradient(logits, labels)
    along = logits.mul_(change).mean(2)  # of classes' gradients, their part along the classes
    gradient = change.mul_(factor / labels.shape[1]) @ images
    gradient.addcmul_(classes, along.div_(norms.square_())[..., None], value=-1)
    if pull is not None and anchors is not None:
        moved = classes - anchors
        gradient.addcmul_(moved, pull[..., None], value=2)
        losses += (pull * torch.linalg.vector_norm(moved, dim=-1).square()).sum(-1)
    return losses, gradient


def by_autograd(loss: Loss) -> Gradient:
    """Return the gradient of a loss, computed by autograd."""
    import torch

    def gradient(parameters: Weights, *batch: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.enable_grad():
            given = {name: one.detach().requires_grad_() for name, one in parameters.items()}
            losses = loss(given, *batch)
            return losses.detach(), torch.autograd.grad(losses.sum(), list(given.values()))

    return gradient


def train(
    start: Weights,
    epochs: Iterable[list[Batch]],
    gradient: Gradient,
    optimizer: Optimizer,
    on_epoch: Callable[[int, Weights], None] = lambda epoch, parameters: None,
) -> tuple[Weights, Tensor]:
    """Train the parameters of stacked runs.

    Args:
        start: Parameters at the start, (runs, ...) each. They are not changed.
        epochs: Of batches, such as `ImageBatches`.
        gradient: Returns the losses of parameters and a batch, and their gradients; see `by_autograd`.
        optimizer: The optimizer.
        on_epoch: Called after each epoch, counted from 1, with the parameters, which later steps change.

    Returns:
        The parameters after the last step, and the mean loss of each epoch, float32 (runs, epochs).
    """
    import torch

    parameters = {name: one.clone() for name, one in start.items()}
    step = optimizer.prepare([*parameters.values()])
    losses, number = [], 0
    with torch.no_grad():
        for epoch, batches in enumerate(epochs, 1):
            total: Tensor | float = 0.0
            for batch in batches:
                each, gradients = gradient(parameters, *batch)
                step(number, gradients)
                total, number = total + each / len(batches), number + 1
            losses.append(total)
            on_epoch(epoch, parameters)
            report_share(len(batches) / len(optimizer.rates))
    return parameters, torch.stack(losses, 1)  # type: ignore[arg-type]
