"""ProLIP: the last linear map of the image tower, trained near its start on features before it (Fahes et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from fastcoop.methods.adapters.base import Adapter, AdapterSettings, Fitted
from fastcoop.methods.adapters.selection import Judge, ValidationOnly
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized
from fastcoop.methods.adapters.training import (
    Batch,
    Optimizer,
    by_autograd,
    cosine_rates,
    cross_entropy,
    train,
)
from fastcoop.methods.late import Backbone, Tensor, torch
from fastcoop.methods.schedule import Coefficient, EpochNumber, LearningRate, shots_per_class
from fastcoop.methods.spec import RunSpec

EPS = 1e-4  # of Adam
LEARNING_RATE = 1e-5
RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # tried in this order; the first of equals is kept
LAMBDAS = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001, 0.0)


class ProLIPSettings(AdapterSettings):
    """Settings of ProLIP.

    Attributes:
        selection: What a learning rate or lambda that is not given is chosen on, among seven of each. "fixed": they
            are 1e-5 and 1 / shots.
        learning_rate: Of Adam, falling to zero along a cosine.
        lmbda: Weight of the penalty.
        epochs: Steps, each on one view of all images.
    """

    selection: ValidationOnly = "fixed"
    learning_rate: LearningRate | None = None
    lmbda: Coefficient | None = None
    epochs: EpochNumber = 300


class ProLIPMethod(Adapter[ProLIPSettings]):
    """Adam on P in the image features ``before @ P + b``, with the penalty lambda |P - P_0|^2; b stays as it is.

    It learns nothing that belongs to a class, so it can be tested on any.
    """

    name = "prolip"
    title = "ProLIP"
    Settings = ProLIPSettings
    kinds = ("pre",)

    def chooses(self, settings: ProLIPSettings) -> bool:
        return settings.learning_rate is None or settings.lmbda is None

    def tries(self, run: RunSpec[ProLIPSettings]) -> Sequence[Mapping[str, Any]]:
        rate, lmbda = run.settings.learning_rate, run.settings.lmbda
        rates, lambdas = RATES if rate is None else (rate,), LAMBDAS if lmbda is None else (lmbda,)
        return [{"learning_rate": rate, "lmbda": number} for rate, number in product(rates, lambdas)]

    def run_bytes(self, images: int, views: int, classes: int, dim: int) -> int:
        return super().run_bytes(images, views, classes, dim) + 32 * dim**2  # P, its gradient and its moments

    def key_settings(self, run: RunSpec[ProLIPSettings], backbone: Backbone) -> dict[str, Any]:
        resolved = super().key_settings(run, backbone)
        if self.selection(run.settings) == "fixed":
            rate = run.settings.learning_rate or LEARNING_RATE
            resolved |= {"learning_rate": rate, "lmbda": penalty(run)}
        return resolved

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        settings, texts, runs = stack.settings, stack.texts, stack.runs
        first, bias = projection(stack)
        factor = stack.features.new_tensor([penalty(run) for run in runs])

        def loss(parameters: Weights, images: Tensor, labels: Tensor) -> Tensor:
            found = cross_entropy(self.logits({**parameters, "bias": bias}, images, texts), labels)
            return found + factor * (parameters["P"] - first).square().sum((1, 2))

        rates = cosine_rates(stack.value("learning_rate", LEARNING_RATE), settings.epochs)
        start = {"P": first.expand(len(stack), -1, -1)}
        batches = view_by_view(stack, settings.epochs)
        learned, losses = train(start, batches, by_autograd(loss), Optimizer("adam", rates, eps=EPS))
        return Fitted(learned | {"bias": bias}, losses, trained=("P",))

    def logits(self, weights: Weights, images: Tensor, texts: Texts) -> Tensor:
        return texts.zero_shot(normalized(images @ weights["P"] + weights["bias"][:, None]))


def penalty(run: RunSpec[ProLIPSettings]) -> float:
    """Return lambda: the setting, or one divided by the shots (see `shots_per_class`)."""
    return 1 / shots_per_class(run) if run.settings.lmbda is None else run.settings.lmbda


def projection(stack: Stack) -> tuple[Tensor, Tensor]:
    """Return P_0 (before, dim) and b (runs, dim) of the backbone.

    Without a backbone, features as wide as texts are adapted by a square P that starts at the identity: the regularized
    linear adapter of the same paper.
    """
    width, dim = stack.features.shape[-1], stack.texts.raw.shape[1]
    given = getattr(stack.backbone, "image_projection", None)
    if given is not None:
        weight, bias = given.weight, given.bias
    else:
        weight, bias = torch.eye(width, dim), None
    bias = stack.features.new_zeros(dim) if bias is None else bias
    return weight.to(stack.features), bias.to(stack.features).expand(len(stack), -1)


def view_by_view(stack: Stack, epochs: int) -> Iterator[list[Batch]]:
    """Yield all images in each epoch, at view 1, 2, ... and then 0 again, as the official code counts them."""
    for epoch in range(1, epochs + 1):
        yield [(stack.views[:, :, epoch % stack.views.shape[2]].contiguous(), stack.labels)]
