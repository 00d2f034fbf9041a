"""A frozen CLIP: the open_clip model, what it eats, and a fingerprint of what determines its features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import open_clip
import torch
from torch import Tensor

from fastcoop.backbones.precision import torch_defaults
from fastcoop.backbones.text_tower import TextTower
from fastcoop.errors import UserError

TEXT_BATCH = 256  # prompts encoded at once by the plain text path


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the (3, size, size) tensor that the image tower was trained on.

    Attributes:
        size: height and width in pixels.
        mean, std: per RGB channel, of values in [0, 1].
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" (shorter side to ``size``, centre crop) or "squash" (both sides to ``size``).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen CLIP.

    Attributes:
        name: short and safe as a folder name, e.g. "RN50" or "demo-resnet".
        model: the open_clip model, in eval mode, without gradients.
        digest: sha256 hex of weights, activation and preprocessing: equal digests, equal features.
        tokenizer: open_clip's; list of n strings -> int64 (n, context_length). It truncates silently.
        preprocess: the image facts of the weights.
        embed_dim: size of an image or text feature.
        quick_gelu: whether the towers use OpenAI's QuickGELU.
        trained_tokens: bool (vocabulary,), which token embeddings pretraining touched; None if all count.
    """

    name: str
    model: open_clip.CLIP | open_clip.CustomTextCLIP
    digest: str
    tokenizer: Callable[..., Tensor]
    preprocess: Preprocess
    embed_dim: int
    quick_gelu: bool
    trained_tokens: Tensor | None = None

    @property
    def image_size(self) -> int:
        return self.preprocess.size

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.preprocess.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.preprocess.std

    @cached_property
    def logit_scale(self) -> float:
        """The factor on cosine similarities, already exponentiated: about 100 for CLIP."""
        scale = self.model.logit_scale
        return float(scale.to(torch.promote_types(scale.dtype, torch.float32)).exp())

    @cached_property
    def text(self) -> TextTower:
        """The text tower's parts."""
        return TextTower.from_model(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype

    @property
    def device(self) -> torch.device:
        return self.text.device

    @torch_defaults()
    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Raw image features (b, embed_dim) of images (b, 3, image_size, image_size) in [0, 1], normalised by
        ``mean`` and ``std``; in the model's dtype and on its device, not of unit length."""
        features: Tensor = self.model.encode_image(images.to(self.device, self.dtype))
        return features

    @torch_defaults()
    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Raw text features (n, embed_dim) of n prompts, all positions computed: the plain path.

        Raises UserError for a prompt that does not fit the context length.
        """
        ids = self.tokenize(texts).to(self.device)
        parts = [self.model.encode_text(part) for part in ids.split(TEXT_BATCH)]
        return torch.cat(parts)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (n, context_length); raises UserError where open_clip would cut a text short."""
        context_length = self.text.context_length
        ids = self.tokenizer(list(texts), context_length=context_length)
        longer = self.tokenizer(list(texts), context_length=context_length + 1)
        cut = (longer[:, :context_length] != ids).any(dim=1)
        if cut.any():
            text = texts[int(cut.nonzero()[0])]
            raise UserError(
                f'The text "{text}" does not fit the {context_length} tokens of {self.name}; shorten it.'
            )
        return ids


def fingerprint(
    state: Mapping[str, Tensor],
    quick_gelu: bool,
    preprocess: Preprocess,
    unusual: Mapping[str, Any] | None = None,
) -> str:
    """sha256 hex over the tensors (as float32 where floating, sorted by name) and the other facts.

    ``unusual``: further settings of the model that change its features. Half-precision and full-precision files of the
    same values agree.
    """
    facts: dict[str, Any] = {"quick_gelu": quick_gelu, "preprocess": asdict(preprocess)}
    if unusual:
        facts["unusual"] = dict(unusual)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(state):
        tensor = state[key].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"\n{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
