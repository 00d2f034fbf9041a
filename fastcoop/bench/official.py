"""A training step the official way: images through the image tower, every prompt at 77 tokens, one run."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.engine.fit import free_bytes
from fastcoop.engine.weights import FoldedTower
from fastcoop.prompts.layout import PLACEHOLDER, tokenize

# Of the free memory, for what autograd keeps; the process grows by half as much again, and our forests need some, too.
KEPT_SHARE = 0.3


class OfficialStep:
    """One CoOp step by plain PyTorch on the model's own modules, class token at the end, unified context.

    ``tokens`` cuts the text tower's input (77, or the longest prompt's length: exact, the tower being causal).
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], context_length: int, tokens: int):
        self.model: Any = backbone.model
        self.scale, self.tokens = backbone.logit_scale, tokens
        filler = " ".join([PLACEHOLDER] * context_length)
        texts = [f"{filler} {name.replace('_', ' ')}." for name in class_names]
        ids = backbone.tokenizer(texts)[:, :tokens].to(backbone.device)
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
        """The image part: (batch, 3, size, size) to normalised features."""
        return F.normalize(self.model.encode_image(images), dim=-1)

    def learn(self, image_features: Tensor, labels: Tensor) -> float:
        """The text part: forward, loss, backward, optimiser step. Returns the loss."""
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
    """open_clip's transformer with positions before prompts, as the official code runs it, on the same weights.

    The other order, open_clip's own, makes one small product per prompt of the projection to queries, keys and values,
    and would flatter what is compared with it.
    """
    weights: dict[int, Any] = {id(weight): weight for weight in transformer.parameters()}
    copy = deepcopy(transformer, weights)
    for module in copy.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = False
    return copy


def longest_prompt(backbone: Backbone, class_names: Sequence[str], context_length: int) -> int:
    """Tokens of the longest prompt, start and end included."""
    filler = " ".join([PLACEHOLDER] * context_length)
    texts = [f"{filler} {name.replace('_', ' ')}." for name in class_names]
    return max(map(len, tokenize(backbone.tokenizer, texts, backbone.text.context_length)))


def class_bytes(tower: FoldedTower, tokens: int) -> int:
    """Bytes that autograd keeps for one prompt of ``tokens`` positions.

    Per layer and position: the residual stream twice, queries, keys, values and what they attend to, and what goes
    into the activation (QuickGELU keeps its sigmoid, too).
    """
    hidden = (2 if tower.activation == "silu" else 1) * tower.hidden
    numbers = tokens * len(tower.blocks) * (6 * tower.width + hidden)
    return numbers * torch.finfo(tower.dtype).bits // 8


def classes_that_fit(tower: FoldedTower, tokens: int) -> int:
    """How many prompts of ``tokens`` positions the official way can learn from at once in the memory now free."""
    return max(1, int(KEPT_SHARE * free_bytes(tower.device) / class_bytes(tower, tokens)))


def official_text_flops(classes: int, tokens: int, width: int, hidden: int, layers: int, dim: int) -> float:
    """Operations of the plain way: ``classes`` prompts of ``tokens`` positions, weights frozen, forward and backward.

    Backward goes through every product once, for the gradient of its input; attention's four products twice.
    """
    dense = 2 * 2 * (4 * width * width + 2 * width * hidden)
    attention = 12 * width * tokens
    return classes * (tokens * layers * (dense + attention) + 2 * 2 * width * dim)
