"""LP++: a linear probe with text logits blended in, alpha_c x.t_c, and step sizes from the data (CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastcoop.methods.adapters.base import Adapter, AdapterSettings, Fitted
from fastcoop.methods.adapters.selection import BestEpoch, Judge, ValidationOnly
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.adapters.training import softmax_gradient
from fastcoop.methods.base import report_share
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.schedule import EpochNumber

MOMENTUM = 0.9
ALPHA_EVERY = 10  # epochs between steps of alpha
ALPHA_START = 250  # times the mean cosine of training images with their classes' texts


class LPPlusPlusSettings(AdapterSettings):
    """Settings of LP++.

    Attributes:
        selection: What the best epoch is chosen on; "fixed": the last epoch is kept.
        epochs: Steps, each on all images.
        sum_alpha_gradients: Whether a step of alpha uses the sum of its gradients in all epochs so far, as in the
            official code, which never sets them to zero; otherwise the last epoch's.
    """

    selection: ValidationOnly = "shots_val"
    epochs: EpochNumber = 300
    sum_alpha_gradients: bool = True


class LPPlusPlusMethod(Adapter[LPPlusPlusSettings]):
    """Gradient descent on W, b and alpha of the logits x W^T + b + alpha (x.t), for features x and texts t of length 1.

    W starts at the sums of each class's features. It belongs to the classes that the run has learned, so a dataset
    with other classes is refused.
    """

    name = "lp_plus_plus"
    title = "LP++"
    Settings = LPPlusPlusSettings
    kinds = ("tip",)
    chooses_epoch = True
    by_class: ClassVar = {"W": "", "b": "", "alpha": ""}

    def is_class_specific(self, settings: LPPlusPlusSettings) -> bool:
        return True

    def chosen(self, extra: Mapping[str, float]) -> dict[str, Any]:
        return {"epochs": int(extra["epoch"])}  # no schedule depends on the number of epochs

    def start(self, stack: Stack, images: Tensor) -> Weights:
        """Return W, b and alpha at the start, for one feature of length 1 per image, (runs, images, dim).

        b is drawn from each run's seed as ``torch.nn.Linear`` draws it. Classes without images have W = 0.
        """
        limit, size = images.shape[-1] ** -0.5, len(stack.texts)
        drawn = [np.random.default_rng([run.seed, 1]).uniform(-limit, limit, size) for run in stack.runs]
        cosines = ((images @ stack.texts.unit.T) * stack.onehot).sum(1) / stack.counts.clamp(min=1)
        mean = cosines.sum(1) / (stack.counts > 0).sum(1)
        alpha = ALPHA_START * mean[:, None].expand(-1, size)
        b = images.new_tensor(np.stack(drawn))
        return {"W": stack.class_sums(images), "b": b, "alpha": alpha}

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        images, number = one_view(stack), stack.labels.shape[1]
        text_logits = stack.texts.unit @ images.mT
        parameters = self.start(stack, images)
        W, b, alpha = parameters.values()
        (rate, alpha_rate), sums = step_sizes(images, text_logits), stack.settings.sum_alpha_gradients
        momentum_W, momentum_b, alpha_sum = (torch.zeros_like(one) for one in (W, b, alpha))
        best = BestEpoch(judge, {}, last_of_equals=True) if judge else None
        losses = []
        for epoch in range(1, stack.settings.epochs + 1):
            # Logits, which softmax_gradient turns into their gradient.
            gradient = torch.baddbmm(b[..., None], W, images.mT).addcmul_(alpha[..., None], text_logits)
            losses.append(softmax_gradient(gradient, stack.labels))
            gradient.div_(number)
            momentum_W.baddbmm_(gradient, images, beta=MOMENTUM)
            momentum_b.mul_(MOMENTUM).add_(gradient.sum(2))
            W -= over(rate, W) * momentum_W
            b -= over(rate, b) * momentum_b
            alpha_gradient = gradient.mul_(text_logits).sum(2)
            alpha_sum += alpha_gradient
            if epoch % ALPHA_EVERY == 0:
                alpha -= over(alpha_rate, alpha) * (alpha_sum if sums else alpha_gradient)
            if best:
                best(epoch, parameters)
            report_share(1 / stack.settings.epochs)
        if best is None:
            return Fitted(parameters, torch.stack(losses, 1), tuple(parameters))
        extra = {"epoch": best.epoch}
        return Fitted(best.best, torch.stack(losses, 1), tuple(parameters), extra, best.accuracy)

    def class_weights(self, weights: Weights, texts: Texts) -> tuple[Tensor, Tensor]:
        return (weights["W"] + weights["alpha"][..., None] * texts.unit) / texts.scale, weights["b"]


def one_view(stack: Stack) -> Tensor:
    """Return one feature of length 1 per image, (runs, images, dim): a view drawn from each run's seed."""
    images, views = stack.views.shape[1:3]
    drawn = [np.random.default_rng(run.seed).integers(views, size=images) for run in stack.runs]
    place = torch.from_numpy(np.stack(drawn)).to(stack.labels.device)
    return normalized(stack.views.take_along_dim(place[..., None, None], 2)[:, :, 0])


def step_sizes(images: Tensor, text_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the learning rates (runs,) of W and b, and of alpha (section 3.3).

    ``text_logits``: (runs, classes, images).

    They are 4n / lambda_max(X^T X), and n / (4 max_c sum_i (x_i.t_c)^2), for n images X.
    """
    number, dim = images.shape[1:]
    gram = images.mT @ images if dim <= number else images @ images.mT  # their largest eigenvalues are equal
    largest = torch.linalg.eigvalsh(gram)[:, -1]
    return 4 * number / largest, number / (4 * text_logits.square().sum(2).amax(-1))
