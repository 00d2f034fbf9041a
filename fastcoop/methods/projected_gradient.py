"""ProGrad's objective. Two gradients of a run, and a rule that merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastcoop.engine.objectives import CrossEntropy, Images, Objective


@dataclass(frozen=True, eq=False)
class ProjectedGradient(Objective):
    """Cross-entropy, whose gradient may not run against that of the hand-written prompt's.

    The second part is the cross-entropy to the prompt's own probabilities (its KL divergence up to a constant). Where
    the gradients g and g' of a run's contexts have g.g' < 0, g - strength (g.g' / g'.g') g' takes the place of g.

    Args:
        reference: Text features of the hand-written prompt (classes, dim), of length 1.
        strength: lambda; with 1, nothing of g against g' is left.
    """

    parts: ClassVar[int] = 2

    reference: Tensor
    strength: float | Tensor  # (runs,) of several runs

    def gradients(self, texts: Tensor, images: Images) -> tuple[Tensor, list[Tensor]]:
        loss, grads = CrossEntropy().gradients(texts, images)
        soft = torch.softmax(images.logits(texts), -1) - torch.softmax(images.logits(self.reference), -1)
        soft *= images.weights[..., None] * images.logit_scale
        return loss, [*grads, images.product(soft.transpose(1, 2), images.features)]

    def combine(self, grads: Sequence[Tensor]) -> Tensor:
        grad, other = grads
        # Row by row, and then over rows: the order of a sum must not depend on the other runs.
        along, length = ((one * other).sum(-1).sum(-1)[:, None, None] for one in (grad, other))
        strength = torch.as_tensor(self.strength)[:, None, None]
        share = torch.where(along < 0, strength * along / length, 0.0)
        return grad - share * other
