"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022): a cache of training features beside zero-shot CLIP.

The logits of a feature x of length 1 are ``100 x W + alpha exp(-beta (1 - x K)) L``, with text features W, a key of K
per training image, and its class in L. Tip-Adapter-F trains K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Literal

from pydantic import Field

from fastcoop.methods.adapters.base import Adapter, AdapterSettings, Fitted
from fastcoop.methods.adapters.selection import BestEpoch, Judge
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.adapters.training import ImageBatches, Optimizer, cosine_rates, softmax_gradient, train
from fastcoop.methods.data import Data
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.schedule import BatchSize, Coefficient, EpochNumber, LearningRate

BETAS, ALPHAS = 200, 20  # numbers that the search tries, as many as in the official code


class TipSettings(AdapterSettings):
    """Settings of Tip-Adapter.

    Attributes:
        alpha: Factor on the cache's logits. None: chosen by ``selection``, 1.17 if it is "fixed".
        beta: Sharpness of the cache. None: chosen too, 1 if it is "fixed".
        alpha_max, beta_max: Ends of the ranges that are searched, which begin at 0.1.
    """

    alpha: Coefficient | None = None
    beta: Coefficient | None = None
    alpha_max: Coefficient = Field(3.0, gt=0.1)
    beta_max: Coefficient = Field(7.0, gt=0.1)

    def unused(self) -> Mapping[str, str | None]:
        unused = dict(super().unused())
        for name in ("alpha", "beta"):
            if self.selection == "fixed" or getattr(self, name) is not None:
                unused[f"{name}_max"] = f"{name} is not searched; leave out {name}_max"
        return unused


class TipAdapterMethod(Adapter[TipSettings]):
    """Keys are the training features: the mean over the views, scaled to length 1."""

    name = "tip_adapter"
    title = "Tip-Adapter"
    kinds = ("tip",)
    Settings = TipSettings
    values: ClassVar = {"beta": 1.0, "alpha": 1.17}  # as in the official configuration of ImageNet
    mixes = False

    def searched(self, settings: TipSettings) -> Mapping[str, Sequence[float]]:
        def numbers(largest: float, steps: int) -> list[float]:
            return [0.1 + step * (largest - 0.1) / steps for step in range(steps)]

        return {"beta": numbers(settings.beta_max, BETAS), "alpha": numbers(settings.alpha_max, ALPHAS)}

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        return Fitted(self.cache(stack))

    def cache(self, stack: Stack) -> Weights:
        """Return the keys of all images, class by class, and their labels."""
        labels, order = stack.labels.sort(dim=1, stable=True)
        keys = normalized(stack.views.mean(2))
        return {"keys": keys.take_along_dim(order[:, :, None], 1), "labels": labels}

    def scorer(self, weights: Weights, images: Tensor, texts: Texts) -> Callable[..., Tensor]:
        x = normalized(images)
        zero_shot, affinity = texts.zero_shot(x), weights["keys"] @ x.mT
        classes = KeyClasses(weights["labels"], len(texts))

        @lru_cache(maxsize=1)  # the search tries all alphas with one beta
        def cached(beta: Tensor) -> Tensor:
            return classes.sum(activation(affinity, beta)).mT.contiguous()

        return lambda alpha, beta: zero_shot.addcmul(over(alpha, zero_shot), cached(beta))

    def carry(self, weights: Weights, rows: Tensor, texts: Texts) -> Weights:
        """Keep the keys of the classes that the dataset has; none if it has others."""
        labels, known = weights["labels"][0], rows >= 0
        places = labels.new_full((1 + int(labels.max().clamp(min=int(rows.max()))),), -1)
        places[rows[known]] = known.nonzero()[:, 0]
        order = places[labels].argsort(stable=True)
        kept = order[places[labels][order] >= 0]
        return weights | {"keys": weights["keys"][:, kept], "labels": places[labels][None, kept]}


def activation(affinity: Tensor, beta: Tensor) -> Tensor:
    """Return exp(-beta (1 - affinity)), of (runs, keys, n), with a sharpness per run."""
    sharpness = over(beta, affinity)
    return (-sharpness).addcmul(affinity, sharpness).exp_()


class KeyClasses:
    """The classes of keys, for sums over the keys of a class.

    Args:
        labels: int64 (runs, keys), sorted.
        classes: Their number.
    """

    def __init__(self, labels: Tensor, classes: int):
        self.labels, self.classes, keys = labels, classes, labels.shape[1]
        self.per_class = 0  # keys of each class, if all runs have as many of each
        if keys and keys % classes == 0:
            even = torch.arange(classes, device=labels.device).repeat_interleave(keys // classes)
            if bool((labels == even).all()):
                self.per_class = keys // classes
        self.onehot = None if self.per_class else torch.nn.functional.one_hot(labels, classes).mT.float()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums (runs, classes, n) of values (runs, keys, n); the values themselves if each has one key."""
        if self.onehot is not None:
            return self.onehot @ values
        return values if self.per_class == 1 else values.unflatten(1, (self.classes, -1)).sum(2)

    def multiply(self, values: Tensor, factors: Tensor) -> None:
        """Multiply values (runs, keys, n), in place, by the factors (runs, classes, n) of their classes."""
        if self.onehot is not None:
            values.mul_(factors.take_along_dim(self.labels[..., None], 1))
        else:
            values.unflatten(1, (self.classes, -1)).mul_(factors[:, :, None])


class TipFSettings(TipSettings):
    """Settings of Tip-Adapter-F: those of Tip-Adapter, with which keys are trained before others are searched.

    Attributes:
        learning_rate: Of AdamW, falling to zero along a cosine.
        epochs: Passes over the images, at a random view of each.
        batch_size: Images of a step.
    """

    learning_rate: LearningRate = 0.001
    epochs: EpochNumber = 20
    batch_size: BatchSize = 256


class TipAdapterFMethod(TipAdapterMethod):
    """Keys start at those of Tip-Adapter and are trained. The epoch is chosen as the values are."""

    name = "tip_adapter_f"
    title = "Tip-Adapter-F"
    Settings = TipFSettings
    chooses_epoch = True

    def official_split(self, data: Data, what: Literal["values", "epoch"]) -> Literal["val", "test"]:
        return "test" if what == "epoch" else super().official_split(data, what)

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        start, given, settings = self.cache(stack), self.given(stack), stack.settings
        labels = {"labels": start.pop("labels")}
        images = normalized(stack.views)
        batches = ImageBatches(stack, images, settings.epochs, settings.batch_size, keep_short=True)
        rates = cosine_rates(stack.value("learning_rate"), settings.epochs * batches.steps)
        classes = KeyClasses(labels["labels"], len(stack.texts))
        beta, alpha, texts = given["beta"], given["alpha"], stack.texts.scale * stack.texts.unit

        def gradient(
            parameters: Weights, sums: Weights, momentum: float, images: Tensor, targets: Tensor
        ) -> Tensor:
            values = activation(parameters["keys"] @ images.mT, beta)
            change = (texts @ images.mT).addcmul_(over(alpha, values), classes.sum(values))
            losses = softmax_gradient(change, targets)
            change.mul_(over(alpha * beta / targets.shape[1], change))
            classes.multiply(values, change)
            torch.baddbmm(sums["keys"], values, images, beta=momentum, out=sums["keys"])
            return losses

        best = BestEpoch(judge, labels | given) if judge else None
        optimizer = Optimizer("adamw", rates, weight_decay=0.01, eps=1e-4)
        keys, losses = train(start, batches, gradient, optimizer, *([best] if best else []))
        if best is None:
            return Fitted(keys | labels, losses, ("keys",))
        return Fitted(best.best | labels, losses, ("keys",), {"epoch": best.epoch})
