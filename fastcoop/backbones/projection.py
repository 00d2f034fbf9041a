"""The last linear map of an image tower, from its own features to the space that it shares with texts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcoop.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageProjection:
    """Image features are ``before @ weight + bias``, where ``before`` are the features before the projection.

    Attributes:
        weight: float32 (before, dim), on the model's device. It may be the model's own memory.
        bias: float32 (dim,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def before_dim(self) -> int:
        """Size of a feature before the projection."""
        return self.weight.shape[0]


def image_projection(visual: nn.Module, name: str) -> ImageProjection:
    """Return the projection of an image tower of the backbone ``name``.

    That is ``proj`` of a vision transformer, ``c_proj`` of a ResNet's attention pool, or ``head.proj`` of a timm model.

    Raises:
        UserError: The tower does not end in a linear projection.
    """
    matrix, linear = getattr(visual, "proj", None), _last_linear(visual)
    if isinstance(matrix, Tensor):
        return ImageProjection(matrix.detach().float(), None)
    if linear is None:
        raise UserError(
            f"The image tower of {name} does not end in a linear projection, so there are no features before it; use "
            "another backbone, or methods that do not need them."
        )
    bias = None if linear.bias is None else linear.bias.detach().float()
    return ImageProjection(linear.weight.detach().float().T, bias)


def encode_both(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (b, dim) of an image tower with a projection, and those before it (b, before).

    The features have the same bits as without the latter.
    """
    if isinstance(matrix := getattr(visual, "proj", None), Tensor):
        headless = copy.copy(visual)
        headless._parameters = {**visual._parameters, "proj": None}
        before = _features(headless(images))
        return before @ matrix, before
    # The projection's input. A ResNet's attention pool does not call the layer, but reads its weights, so the pool is
    # computed again with an identity in its place.
    pool = getattr(visual, "attnpool", None)
    seen: list[Tensor] = []
    module = visual.head.proj if pool is None else pool
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        features = _features(visual(images))
    finally:
        hook.remove()
    if pool is None:
        return features, seen[0]
    width, headless = pool.c_proj.in_features, copy.copy(pool)
    identity = nn.Linear(width, width, device="meta")
    identity.weight = nn.Parameter(
        torch.eye(width, dtype=pool.c_proj.weight.dtype, device=images.device), False
    )
    identity.bias = nn.Parameter(identity.weight.new_zeros(width), False)
    headless._modules = {**pool._modules, "c_proj": identity}
    return features, headless(seen[0])


def _features(output: Any) -> Tensor:
    """Return the features of a tower that may put out its tokens, too (CoCa's)."""
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


def _last_linear(visual: nn.Module) -> nn.Linear | None:
    for parent, name in (("attnpool", "c_proj"), ("head", "proj")):
        layer = getattr(getattr(visual, parent, None), name, None)
        if isinstance(layer, nn.Linear):
            return layer
    return None
