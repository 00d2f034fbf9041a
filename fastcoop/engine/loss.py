"""The loss of many runs at once: each run's own mean cross-entropy over its own batch (equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcoop.engine.rows import bmm


def cross_entropy(
    features: Tensor, images: Tensor, labels: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Return losses (runs,) and their gradients for the class features (runs, classes, dim).

    ``features`` (runs, classes, dim), not normalised; ``images`` (runs, batch, dim), normalised; ``labels``
    (runs, batch) int64, -1 where a batch is short. Logits are ``logit_scale`` times the cosine.
    """
    length = features.norm(dim=-1, keepdim=True)
    direction = features / length
    logits = logit_scale * bmm(images, direction.transpose(1, 2))
    real = (labels >= 0).to(features.dtype)
    weight = real / real.sum(1, keepdim=True)
    target = labels.clamp(min=0)[..., None]
    losses = -(torch.log_softmax(logits, -1).gather(-1, target)[..., 0] * weight).sum(1)

    # Not the exponential of the above: element by element, it would round by where in memory a run stands.
    grad_logits = torch.softmax(logits, -1)
    grad_logits.scatter_add_(-1, target, torch.full_like(grad_logits[..., :1], -1.0))
    grad_logits *= weight[..., None] * logit_scale
    grad = bmm(grad_logits.transpose(1, 2), images)
    grad -= direction * (grad * direction).sum(-1, keepdim=True)
    return losses, grad / length
