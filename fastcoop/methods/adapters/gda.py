"""GDA (Wang et al., ICLR 2024): Gaussian discriminant analysis of image features beside zero-shot CLIP.

Classes are Gaussians of one covariance. The logits of a feature x of length 1 are ``100 x T + alpha (x W + b)`` with
``W = P mu`` and ``b = -log C - mu P mu / 2``, for class means mu and the precision P of the shrunk covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

from fastcoop.methods.adapters.base import Adapter, AdapterSettings, Fitted
from fastcoop.methods.adapters.selection import Judge
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.schedule import Coefficient

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)  # searched, as in the official code
# Of the mean of a class without images: the nearest features, and how often its text counts.
NEIGHBORS, COPIES = 64, 16
ROUNDING = 1e-12  # squared: the spread of equal features


class GDASettings(AdapterSettings):
    """Settings of GDA.

    Attributes:
        alpha: Factor on the discriminant. None: chosen by ``selection``, 1 if it is "fixed".
        variant: "few_shot": one covariance, shrunk towards the identity. "base_to_new": the mean of the classes'
            covariances, and Gaussians also for classes of other datasets, from the features nearest to their text. The
            training features are kept for that.
    """

    alpha: Coefficient | None = None
    variant: Literal["few_shot", "base_to_new"] = "few_shot"


class GDAMethod(Adapter[GDASettings]):
    """Each view of an image is a sample, scaled to length 1."""

    name = "gda"
    title = "GDA"
    kinds = ("tip",)
    Settings = GDASettings
    values: ClassVar = {"alpha": 1.0}
    mixes = False

    def searched(self, settings: GDASettings) -> Mapping[str, Sequence[float]]:
        return {"alpha": ALPHAS}

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        x = normalized(stack.views)
        views = x.shape[2]
        counts = (stack.counts * views)[..., None]
        means = stack.class_sums(x.sum(2)) / counts.clamp(min=1)
        own = means.take_along_dim(stack.labels[..., None], 1)[:, :, None]
        centered = (x - own).flatten(1, 2)
        if stack.settings.variant == "few_shot":
            P = precision(centered.mT @ centered, centered.shape[1])
            kept = {}
        else:
            weight = 1 / (counts[..., 0] - 1).clamp(min=1)
            weight = weight.take_along_dim(stack.labels, 1).repeat_interleave(views, 1)[..., None]
            centered = centered.double()  # in float32 pseudoinverses of few samples differ by their rounding
            covariance = (centered * weight).mT @ centered / (stack.counts > 0).sum(1)[:, None, None]
            rank_bound = torch.finfo(x.dtype).eps * x.shape[-1]
            P = torch.linalg.pinv(covariance, hermitian=True, rtol=rank_bound)
            kept = {"support": x.flatten(1, 2)}
        W, b = discriminant(means, P)
        empty = stack.counts == 0
        return Fitted({"W": filled(W, empty), "b": filled(b, empty), **kept})

    def class_weights(self, weights: Weights, texts: Texts) -> tuple[Tensor, Tensor | None]:
        alpha, W = weights["alpha"], weights["W"]
        return texts.unit + over(alpha, W) * W / texts.scale, over(alpha, weights["b"]) * weights["b"]

    def scorer(self, weights: Weights, images: Tensor, texts: Texts) -> Callable[..., Tensor]:
        x = normalized(images)
        zero_shot, found = texts.zero_shot(x), x @ weights["W"].mT + weights["b"][:, None]
        return lambda alpha: zero_shot + over(alpha, found) * found

    def carry(self, weights: Weights, rows: Tensor, texts: Texts) -> Weights:
        """Give classes of which none was learned W = 0 and b = 0, or Gaussians of "base_to_new"."""
        W, b = (weights[name][:, rows.clamp(min=0)] for name in ("W", "b"))
        if bool((rows < 0).any()):
            W, b = torch.zeros_like(W), torch.zeros_like(b)
            if "support" in weights:
                W[0], b[0] = from_texts(texts.unit, weights["support"][0])
        return weights | {"W": W, "b": b}


def precision(scatter: Tensor, samples: int) -> Tensor:
    """Return the shrunk precision (..., dim, dim): ``dim (scatter + trace(scatter) / (samples - 1) I)^-1``.

    It is 0 where the scatter is, as of one view of one image, by the official code's pseudoinverse.
    """
    dim, trace = scatter.shape[-1], scatter.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    spread = trace > ROUNDING * samples
    ridge = (trace / max(1, samples - 1)).where(spread, torch.ones_like(trace))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scatter + ridge * torch.eye(dim).to(scatter)))
    return dim * inverse * spread


def discriminant(means: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (..., classes, dim) and b (..., classes) of class means (..., classes, dim)."""
    W = means.to(P) @ P
    b = -math.log(means.shape[-2]) - (W * means).sum(-1) / 2
    return W.to(means), b.to(means)


def filled(rows: Tensor, empty: Tensor) -> Tensor:
    """Return rows (runs, classes, ...) with the mean of the others where ``empty`` (runs, classes)."""
    empty = empty.view(*empty.shape, *[1] * (rows.ndim - 2))
    mean = (rows * ~empty).sum(1, keepdim=True) / (~empty).sum(1, keepdim=True).clamp(min=1)
    return rows.where(~empty, mean)


def from_texts(texts: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (classes, dim) and b (classes,) of classes known by text features (classes, dim) of length 1.

    Args:
        texts: Text features.
        support: float32 (samples, dim), features of other classes, of length 1.
    """
    near = support[(texts @ support.T).topk(min(NEIGHBORS, len(support)), 1).indices]
    means = (near.sum(1) + COPIES * texts) / (near.shape[1] + COPIES)
    P = texts.new_zeros(texts.shape[1], texts.shape[1])
    for one in near - texts[:, None]:
        P += precision(one.T @ one, len(one)) / len(texts)
    return discriminant(means, P)
