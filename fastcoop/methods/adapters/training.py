"""One small trainer for stacked runs: every tensor has an axis of runs, and no run affects another.

Optimizers are those of ``torch.optim``, which work on each number by itself, with a learning rate per run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastcoop.methods.adapters.stack import Stack, Weights

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

    def prepare(self, parameters: Sequence[Tensor]) -> Callable[[int, Sequence[Tensor]], None]:
        """Return a function that changes the parameters, (runs, ...) each, by their gradients in a step from 0.

        Runs of equal rates and weight decay are one group of ``torch.optim``.
        """
        import torch

        rates, runs = self.rates.double().cpu().numpy(), self.rates.shape[1]
        decays = torch.as_tensor(self.weight_decay).double().expand(runs).tolist()
        members: dict[tuple[bytes, float], list[int]] = {}
        for run, decay in enumerate(decays):
            members.setdefault((rates[:, run].tobytes(), decay), []).append(run)
        rows = [of_group[0] for of_group in members.values()]
        places: list[list[Any]] = [[slice(None)]] if len(members) == 1 else [*members.values()]
        groups = [
            {"params": [one[place] for one in parameters for place in of_group], "weight_decay": decay}
            for (_, decay), of_group in zip(members, places, strict=True)
        ]
        optimizer: torch.optim.Optimizer
        if self.kind == "sgd":
            optimizer = torch.optim.SGD(groups, 0.0, momentum=self.momentum, fused=True)
        else:
            kind = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
            optimizer = kind(groups, 0.0, betas=self.betas, eps=self.eps, fused=True)

        def step(number: int, gradients: Sequence[Tensor]) -> None:
            given = [one.contiguous() for one in gradients]
            for group, row, of_group in zip(optimizer.param_groups, rows, places, strict=True):
                group["lr"] = float(rates[number, row])
                parts = (one[place] for one in given for place in of_group)
                for tensor, part in zip(group["params"], parts, strict=True):
                    tensor.grad = part
            optimizer.step()

        return step


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
    step = optimizer.prepare([one.detach() for one in parameters.values()])
    losses, number = [], 0
    for epoch, batches in enumerate(epochs, 1):
        total: Tensor | float = 0.0
        for batch in batches:
            each = loss(parameters, *batch)
            gradients = torch.autograd.grad(each.sum(), list(parameters.values()))
            step(number, gradients)
            total, number = total + each.detach() / len(batches), number + 1
        losses.append(total)
        on_epoch(epoch, {name: one.detach() for name, one in parameters.items()})
    return {name: one.detach() for name, one in parameters.items()}, torch.stack(losses, 1)  # type: ignore[arg-type]
