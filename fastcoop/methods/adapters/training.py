"""One small trainer for stacked runs: every tensor has an axis of runs, and no run affects another.

Optimizers are those of ``torch.optim``, with a learning rate per run and without its overhead per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastcoop import engine
from fastcoop.methods.adapters.stack import Stack, Weights, over
from fastcoop.methods.base import report_share
from fastcoop.methods.late import F, Tensor, torch

DRAWN_AT_ONCE = 16  # epochs whose batches are drawn at once
MOMENTUM = 0.9  # of SGD
BETAS = (0.9, 0.999)  # of Adam

Batch = tuple["Tensor", ...]  # (runs, batch, ...) each, such as features and labels
Loss = Callable[..., "Tensor"]  # parameters, and the tensors of a batch -> (runs,)
# (parameters, sums, momentum, the tensors of a batch) -> losses (runs,). It multiplies the sums, one per parameter and
# of its shape, by the momentum, and adds the gradients of each run's own loss: a product and a sum are one pass.
Gradient = Callable[..., "Tensor"]


@dataclass(frozen=True, eq=False)
class Optimizer:
    """How parameters change by their gradients.

    Attributes:
        kind: "sgd" (with momentum), "adam" (weight decay in the gradient), or "adamw" (decoupled).
        rates: float32 (steps, runs), the learning rate of each step.
        weight_decay: A number, or (runs,).
        eps: Of "adam" and "adamw".
    """

    kind: Literal["sgd", "adam", "adamw"]
    rates: Tensor
    weight_decay: Tensor | float = 0.0
    eps: float = 1e-8

    @property
    def momentum(self) -> float:
        """Factor on the sums of gradients before a batch's are added."""
        return MOMENTUM if self.kind == "sgd" else 0.0

    def prepare(self, parameters: Weights, sums: Weights) -> Callable[[int], None]:
        """Return a function that changes the parameters, (runs, ...) each, by the sums of gradients in a step from 0.

        It may change the sums too.
        """
        kind, (beta, beta_2) = self.kind, BETAS
        decays = torch.as_tensor(self.weight_decay).to(self.rates).expand(self.rates.shape[1])
        decay, rates, has_decay = _Factor(decays[None]), _Factor(self.rates), bool(decays.any())
        moments = [one.new_zeros(2, *one.shape) for one in sums.values() if kind != "sgd"]

        def step(number: int) -> None:
            shrink = math.sqrt(1 - beta_2 ** (number + 1))
            for place, (one, gradient) in enumerate(zip(parameters.values(), sums.values(), strict=True)):
                if has_decay and kind == "adamw":
                    one.mul_(over(1 - self.rates[number].double() * decays, one).to(one))
                elif has_decay:
                    decay.add(gradient, one, 0)
                if kind == "sgd":
                    rates.add(one, gradient, number, -1.0)
                else:
                    mean, square = moments[place]
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


def cosine_rates(rate: Tensor, steps: int) -> Tensor:
    """Return learning rates (steps, runs) that fall from ``rate``, float32 (runs,), to zero along a cosine."""
    factors = (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    return rate.new_tensor(factors[:, None] * rate.double().cpu().numpy())


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """The batches of each epoch: features (runs, batch, dim) and labels (runs, batch) of stacked runs.

    A run's images are in its own random order, at a random view of each. Orders and views are drawn from the run's
    seed, so they are the same whichever runs train together. A batch has its memory until the next one takes it over.

    Attributes:
        stack: The runs.
        features: float32 (runs, images, views, dim), of the views.
        epochs: Number of epochs.
        batch_size: Images of a step.
        keep_short: Whether the last, short batch of an epoch is a step although it is not the only one.
        pooled: Draw from all views of all images in random order, as CLAP's code does. An epoch has the steps that it
            would have over the images alone, and each step ``batch_size`` views, if there are as many.
    """

    stack: Stack
    features: Tensor
    epochs: int
    batch_size: int
    keep_short: bool = False
    pooled: bool = False

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        images, size = self.stack.labels.shape[1], self.batch_size
        return max(1, -(-images // size) if self.keep_short else images // size)

    def coop_rates(self, rate: Tensor) -> Tensor:
        """Return the learning rates of all steps, (steps, runs), which change at each epoch as in CoOp."""
        factors = np.stack([engine.schedule.learning_rates(self.epochs, float(one)) for one in rate], 1)
        return rate.new_tensor(factors.repeat(self.steps, axis=0))

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        runs, images, views, _ = self.features.shape
        features = self.features.flatten(0, 2)
        labels = self.stack.labels.repeat_interleave(views, 1).flatten()
        memory = features.new_empty(runs * min(self.batch_size, images * views), features.shape[1])
        first = images * views * np.arange(runs)
        draws = [np.random.default_rng(run.seed) for run in self.stack.runs]

        def order(rng: np.random.Generator) -> np.ndarray:
            if self.pooled:
                return rng.permutation(images * views)[: self.steps * self.batch_size]
            return rng.permutation(images) * views + rng.integers(views, size=images)

        def take(places: Tensor) -> Batch:
            rows, shape = places.flatten(), (runs, -1)
            taken = torch.index_select(features, 0, rows, out=memory[: len(rows)])
            return taken.unflatten(0, shape), labels[rows].view(shape)

        for start in range(0, self.epochs, DRAWN_AT_ONCE):
            epochs = range(start, min(start + DRAWN_AT_ONCE, self.epochs))
            drawn = np.array([[order(rng) for rng in draws] for _ in epochs]) + first[:, None]
            for places in torch.from_numpy(drawn).to(labels.device):
                yield map(take, places.split(self.batch_size, 1)[: self.steps])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each run's mean cross-entropy, (runs,), of logits (runs, batch, classes) and labels (runs, batch)."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def softmax_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each run's mean cross-entropy, (runs,), and replace the logits by each image's gradient for them.

    A softmax over the second axis of three takes four times as long as these passes.

    Args:
        logits: float32 (runs, classes, batch). Classes come before images, so that products with images and classes
            need no transposed copy.
        labels: int64 (runs, batch).
    """
    target = labels[:, None]
    own = logits.sub_(logits.amax(1, keepdim=True)).gather(1, target)
    others = logits.exp_().scatter_(1, target, 0.0).sum(1, keepdim=True)
    losses = F.softplus(others.log() - own).mean((1, 2))
    # Where an image is surely right, its class's probability minus 1, and its logarithm, would have no digits left.
    totals = own.exp_().add_(others)
    logits.scatter_(1, target, others.neg_()).div_(totals)
    return losses


def cosine_cross_entropy(
    classes: Tensor, images: Tensor, labels: Tensor, total: Tensor, momentum: float = 0.0
) -> Tensor:
    """Return each run's mean cross-entropy, (runs,), and add its gradient for ``classes`` to ``momentum * total``.

    Autograd's steps through the normalization of the classes would double the time of a step.

    Args:
        classes: Class vectors (runs, classes, dim), of any length.
        images: Image features (runs, batch, dim), as long as the factor on the cosine similarities.
        labels: int64 (runs, batch).
        total: (runs, classes, dim), changed in place.
        momentum: Factor on ``total``.
    """
    share = 1 / labels.shape[1]
    inverse = torch.linalg.vector_norm(classes, dim=-1, keepdim=True).reciprocal_()
    products = torch.bmm(classes, images.mT)
    change = products * inverse
    losses = softmax_gradient(change, labels)
    torch.baddbmm(total, change.mul_(inverse), images, beta=momentum, alpha=share, out=total)
    along = products.mul_(change).sum(2, keepdim=True)  # of classes' gradients, their part along the classes
    total.addcmul_(classes, along.mul_(inverse.square_()), value=-share)
    return losses


def by_autograd(loss: Loss) -> Gradient:
    """Return the gradient of a loss, computed by autograd."""

    def gradient(parameters: Weights, sums: Weights, momentum: float, *batch: Tensor) -> Tensor:
        with torch.enable_grad():
            given = {name: one.detach().requires_grad_() for name, one in parameters.items()}
            losses = loss(given, *batch)
            found = torch.autograd.grad(losses.sum(), list(given.values()))
        for total, one in zip(sums.values(), found, strict=True):
            total.mul_(momentum).add_(one)
        return losses.detach()

    return gradient


def train(
    start: Weights,
    epochs: Iterable[Iterable[Batch]],
    gradient: Gradient,
    optimizer: Optimizer,
    on_epoch: Callable[[int, Weights], None] = lambda epoch, parameters: None,
) -> tuple[Weights, Tensor]:
    """Train the parameters of stacked runs.

    Args:
        start: Parameters at the start, (runs, ...) each. They are not changed.
        epochs: Of batches, such as `ImageBatches`.
        gradient: Adds the gradients of a batch; see `by_autograd`.
        optimizer: The optimizer.
        on_epoch: Called after each epoch, counted from 1, with the parameters, which later steps change.

    Returns:
        The parameters after the last step, and the mean loss of each epoch, float32 (runs, epochs).
    """
    parameters = {name: one.clone() for name, one in start.items()}
    sums = {name: torch.zeros_like(one) for name, one in parameters.items()}
    step = optimizer.prepare(parameters, sums)
    losses: list[Tensor] = []
    steps = []  # of each epoch
    with torch.no_grad():
        for epoch, batches in enumerate(epochs, 1):
            before = len(losses)
            for batch in batches:
                losses.append(gradient(parameters, sums, optimizer.momentum, *batch))
                step(len(losses) - 1)
            steps.append(len(losses) - before)
            on_epoch(epoch, parameters)
            report_share(steps[-1] / len(optimizer.rates))
    number = torch.tensor(steps, device=losses[0].device)
    epoch_of = torch.arange(len(steps), device=number.device).repeat_interleave(number)
    each = torch.stack(losses, 1)
    return parameters, each.new_zeros(len(each), len(steps)).index_add_(1, epoch_of, each) / number
