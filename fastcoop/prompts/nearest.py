"""The words nearest to learned context vectors (section 4.3, "Interpreting the Learned Prompts"; Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcoop.backbones import Backbone

VECTORS_AT_ONCE = 2048  # rows of the distance matrix held at a time: 2048 x 49,408 float32 is 400 MB
WORD_END = "</w>"  # CLIP's byte-pair encoding marks whole words and word ends by it


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each of n vectors its k nearest tokens.

    ``tokens`` int64 (n, k), ``distances`` float32 (n, k), nearest first; ``words`` the tokens as text, a trailing
    "-" marking a piece that only occurs inside or at the start of words.
    """

    tokens: Tensor
    distances: Tensor
    words: list[list[str]]


def nearest_words(backbone: Backbone, vectors: Tensor, k: int = 1, trained_only: bool = True) -> Nearest:
    """Return the vocabulary's ``k`` nearest tokens to each of ``vectors`` (n, width) by Euclidean distance.

    One matrix product over all vectors, in pieces that fit memory. Special tokens are left out. With
    ``trained_only``, so are tokens the backbone never saw in training, where it knows (``trained_tokens``).
    """
    embeddings = backbone.text.token_embedding.detach().to(torch.float32)
    vectors = vectors.to(embeddings.device, torch.float32)
    excluded = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
    tokenizer: Any = backbone.tokenizer
    excluded[tokenizer.all_special_ids] = True
    if trained_only and backbone.trained_tokens is not None:
        excluded |= ~backbone.trained_tokens.to(embeddings.device)

    squared = (embeddings**2).sum(1).masked_fill(excluded, torch.inf)
    tokens = []
    for piece in vectors.split(VECTORS_AT_ONCE):
        tokens.append(
            torch.topk(torch.addmm(squared, piece, embeddings.t(), alpha=-2), k, largest=False).indices
        )
    found = torch.cat(tokens)
    # The distances themselves without cancellation, and the order by them.
    distances, order = (embeddings[found] - vectors[:, None]).norm(dim=-1).sort(-1)
    found = found.gather(-1, order)
    words = [[token_text(backbone, int(token)) for token in row] for row in found]
    return Nearest(found.cpu(), distances.cpu(), words)


def token_text(backbone: Backbone, token: int) -> str:
    """Return a token as text; a piece that does not end a word ends in "-"."""
    tokenizer: Any = backbone.tokenizer
    text, raw = tokenizer.decode([token]), tokenizer.decoder[token]
    return text.strip() if raw.endswith(WORD_END) else f"{text}-"


def distance_by_chance(backbone: Backbone, vectors: int = 256, seed: int = 0) -> float:
    """Return the mean distance from a random initial context vector to its nearest token."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.02 * torch.randn(vectors, backbone.text.width, generator=generator)
    return float(nearest_words(backbone, noise).distances[:, 0].mean())
