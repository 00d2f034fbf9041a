"""A training step by the official code's method: images encoded in every step, all prompts at 77 tokens, one run."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.backbones.text_tower import TextTower
from fastcoop.engine.fit import free_bytes
from fastcoop.prompts.layout import PLACEHOLDER, tokenize

# Share of the free memory for what autograd keeps. The process grows by half as much again, and fastcoop's own steps
# need memory, too.
KEPT_SHARE = 0.3


class OfficialStep:
    """One CoOp step by plain PyTorch on the model's own modules, class token at the end, unified context.

    Args:
        backbone: Its open_clip model is used.
        class_names: Names of the classes.
        context_length: Number of context vectors.
        tokens: Length that prompts are cut to: 77, or that of the longest prompt (exact, since the tower is causal).
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], context_length: int, tokens: int):
        self.model: Any = backbone.model
        self.scale, self.tokens = backbone.logit_scale, tokens
        ids = backbone.tokenizer(_prompts(class_names, context_length))[:, :tokens].to(backbone.device)
        self.ends = ids.argmax(-1)
        self.text = text = getattr(self.model, "text", self.model)
        self.transformer = _sequence_first(text.transformer)
        embedded = text.token_embedding(ids)
        self.start, self.tail = embedded[:, :1], embedded[:, 1 + context_length :]
        width = embedded.shape[-1]
        contexts = 0.02 * torch.randn(context_length, width, device=backbone.device)
        self.contexts = contexts.to(embedded.dtype).requires_grad_()
        self.optimizer = torch.optim.SGD([self.contexts], lr=0.002, momentum=0.9, weight_decay=5e-4)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """The image part: pictures (batch, 3, size, size) to normalized features (batch, dim)."""
        return F.normalize(self.model.encode_image(images), dim=-1)

    def learn(self, image_features: Tensor, labels: Tensor) -> float:
        """The text part: forward, loss, backward, optimizer step. Returns the loss."""
        text = self.text
        contexts = self.contexts.expand(len(self.start), -1, -1)
        x = torch.cat([self.start, contexts, self.tail], 1) + text.positional_embedding[: self.tokens]
        mask = text.attn_mask[: self.tokens, : self.tokens]
        x = text.ln_final(self.transformer(x, attn_mask=mask))
        features = x[torch.arange(len(x), device=x.device), self.ends] @ text.text_projection
        logits = self.scale * image_features @ F.normalize(features, dim=-1).t()
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def _sequence_first(transformer: Any) -> Any:
    """Copy open_clip's transformer, sharing its weights, with positions before prompts as in the official code.

    In open_clip's own order the projection to queries, keys and values is one small product per prompt, which is slower
    and would make the comparison unfair.
    """
    weights: dict[int, Any] = {id(weight): weight for weight in transformer.parameters()}
    copy = deepcopy(transformer, weights)
    for module in copy.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = False
    return copy


def longest_prompt(backbone: Backbone, class_names: Sequence[str], context_length: int) -> int:
    """Return the number of tokens of the longest prompt, start and end included."""
    prompts = _prompts(class_names, context_length)
    return max(map(len, tokenize(backbone.tokenizer, prompts, backbone.text.context_length)))


def _prompts(class_names: Sequence[str], context_length: int) -> list[str]:
    filler = " ".join([PLACEHOLDER] * context_length)
    return [f"{filler} {name.replace('_', ' ')}." for name in class_names]


def class_bytes(text: TextTower, tokens: int) -> int:
    """Return the bytes that autograd keeps for one prompt of ``tokens`` positions.

    Per layer and position: the residual stream twice, queries, keys, values and the attention's output, and the input
    of the activation (QuickGELU also keeps its sigmoid).
    """
    hidden = (2 if text.activation == "quick_gelu" else 1) * text.blocks[0].fc.weight.shape[0]
    return tokens * len(text.blocks) * (6 * text.width + hidden) * text.dtype.itemsize


def classes_that_fit(text: TextTower, tokens: int) -> int:
    """Return how many prompts of ``tokens`` positions fit the free memory in one official step."""
    return max(1, int(KEPT_SHARE * free_bytes(text.device) / class_bytes(text, tokens)))


def official_text_flops(text: TextTower, classes: int, tokens: int) -> float:
    """Return the operations of the text part: ``classes`` prompts of ``tokens`` positions, forward and backward.

    With frozen weights, backward repeats every product once, for the gradient of its input; attention's products twice.
    """
    width, hidden = text.width, text.blocks[0].fc.weight.shape[0]
    dense = 2 * 2 * (4 * width * width + 2 * width * hidden)
    attention = 12 * width * tokens
    return classes * (tokens * len(text.blocks) * (dense + attention) + 2 * 2 * width * text.dim)
