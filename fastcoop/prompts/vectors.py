"""Context vectors: where they start, and the words nearest to learned ones (section 4.3; Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastcoop.backbones import Backbone
from fastcoop.checks import shortened, whole_number
from fastcoop.errors import UserError
from fastcoop.prompts.layout import PromptLayout, word_tokens

Metric = Literal["euclidean", "cosine"]

STANDARD_DEVIATION = 0.02  # of random initial contexts
VECTORS_AT_ONCE = 2048  # rows of the distance matrix held at a time: 2048 x 49,408 float32 is 400 MB
WORD_END = "</w>"  # CLIP's byte-pair encoding marks whole words and word ends by it
NOT_LATIN = "N/A"  # as the paper prints non-Latin characters
INITIAL_VECTORS = 256  # of `mean_initial_distance`
DIRECTIONS, PER_DOUBLING = 64, 8  # random directions, and lengths per doubling, of `random_distances`


def initial_contexts(
    backbone: Backbone, layout: PromptLayout, classes: int, seed: int, words: str | None = None
) -> Tensor:
    """Return a run's first contexts (section 4.1; with words, section 4.3, "Initialization").

    Args:
        backbone: Its text tower and tokenizer are used.
        layout: The prompt layout.
        classes: Number of classes.
        seed: Draws N(0, 0.02^2), where there are no words.
        words: Their token embeddings are the contexts, the same for each class.

    Returns:
        float32 on the CPU, (M, width), or (classes, M, width) if class-specific.

    Raises:
        UserError: If the words are not M tokens, or the tower reads fewer than M.
    """
    classes, seed = whole_number(classes, "the number of classes", 1), whole_number(seed, "the seed")
    if layout.context_length > backbone.text.context_length:
        raise UserError(
            f"Expected a context length of at most {backbone.text.context_length}, which the text tower reads, got "
            f"{layout.context_length}; use fewer context vectors."
        )
    shape = layout.shape(classes, backbone.text.width)
    if words is None:
        return STANDARD_DEVIATION * _normal_numbers(seed, *shape)
    tokens = word_tokens(backbone, words)
    if len(tokens) != layout.context_length:
        raise UserError(
            f'The words "{words}" are {len(tokens)} tokens, but the context length is {layout.context_length}; '
            f"set the context length to {len(tokens)}."
        )
    embeddings = backbone.text.token_embedding[tokens].detach().to("cpu", torch.float32)
    return embeddings.expand(shape).clone()


@dataclass(frozen=True, eq=False)
class Nearest:
    """The k nearest tokens of each of n vectors, nearest first."""

    tokens: Tensor  # int64 (n, k)
    distances: Tensor  # float32 (n, k)
    words: list[list[str]]  # the tokens as text; a trailing "-" marks a piece that does not end a word


def nearest_words(
    backbone: Backbone, vectors: Tensor | np.ndarray, k: int = 1, trained_only: bool = True,
    metric: Metric = "euclidean", latin_only: bool = False,
) -> Nearest:  # fmt: skip
    """Return the nearest tokens of the vocabulary to each vector. Special tokens are left out.

    Args:
        backbone: Its token embeddings are searched.
        vectors: (n, width), finite, such as the ``contexts_`` of a `CoOpClassifier`.
        k: Tokens per vector; fewer where the vocabulary has fewer.
        trained_only: Leave out tokens that never occurred in the backbone's training, where they are known.
        metric: "euclidean", or "cosine" for 1 minus the cosine.
        latin_only: Print words with other characters than Latin letters, signs and digits as "N/A".

    Raises:
        UserError: For vectors of another width or with numbers that are not finite.
    """
    k = whole_number(k, "the number of nearest words", 1)
    if metric not in get_args(Metric):
        raise UserError(f'Expected the metric "euclidean" or "cosine", got {shortened(metric)}.')
    vectors, width = torch.as_tensor(vectors), backbone.text.width
    if vectors.ndim != 2 or vectors.shape[1] != width or not bool(torch.isfinite(vectors).all()):
        raise UserError(
            f"Expected finite vectors of shape (n, {width}), got {tuple(vectors.shape)}, "
            f"{int((~torch.isfinite(vectors)).sum())} numbers of them not finite."
        )
    embeddings = backbone.text.token_embedding.detach().to(torch.float32)
    vectors = vectors.to(embeddings.device, torch.float32)
    if metric == "cosine":
        embeddings, vectors = normalize(embeddings, dim=-1), normalize(vectors, dim=-1)
    tokens = (~_excluded(backbone, trained_only)).nonzero()[:, 0]
    embeddings, k = embeddings[tokens], min(k, len(tokens))
    squared = (embeddings**2).sum(1)
    scores = (torch.addmm(squared, v, embeddings.t(), alpha=-2) for v in vectors.split(VECTORS_AT_ONCE))
    found = torch.cat([torch.topk(score, k, largest=False).indices for score in scores])
    # Distances without cancellation, and the order by them.
    gaps = torch.stack([(embeddings[column] - vectors).norm(dim=-1) for column in found.unbind(1)], dim=1)
    distances, order = (gaps**2 / 2 if metric == "cosine" else gaps).sort(-1)
    found = tokens[found.gather(-1, order)].cpu()
    texts = {token: _token_text(backbone, token, latin_only) for token in found.unique().tolist()}
    return Nearest(found, distances.cpu(), [[texts[token] for token in row] for row in found.tolist()])


def _excluded(backbone: Backbone, trained_only: bool) -> Tensor:
    """Return bool (vocabulary,): special tokens, rows without a token and, on request, untrained tokens."""
    table, tokenizer = backbone.text.token_embedding, _tokenizer(backbone)
    excluded = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    excluded[tokenizer.all_special_ids] = True
    excluded[len(_pieces(tokenizer) or tokenizer) :] = True
    if trained_only and backbone.trained_tokens is not None:
        excluded |= ~backbone.trained_tokens.to(table.device)
    return excluded


def _token_text(backbone: Backbone, token: int, latin_only: bool = False) -> str:
    """Return a token as text; a piece that does not end a word ends in "-"."""
    tokenizer = _tokenizer(backbone)
    text = tokenizer.decode([token])
    # Latin: up to Unicode's Latin Extended-B, or general punctuation and currency signs.
    if latin_only and not all(ord(char) < 0x250 or 0x2000 <= ord(char) < 0x20D0 for char in text):
        return NOT_LATIN
    if not (pieces := _pieces(tokenizer)):
        return text.strip() or str(tokenizer.convert_ids_to_tokens(token))
    return text.strip() if pieces[token].endswith(WORD_END) else f"{text}-"


def _tokenizer(backbone: Backbone) -> Any:
    return getattr(backbone.tokenizer, "tokenizer", backbone.tokenizer)  # open_clip wraps transformers'


def _pieces(tokenizer: Any) -> dict[int, str]:
    """Return the tokens of CLIP's own tokenizer by id; {} for transformers', whose decoder is no mapping."""
    pieces = getattr(tokenizer, "decoder", None)
    return pieces if isinstance(pieces, dict) else {}


def mean_initial_distance(
    backbone: Backbone, trained_only: bool = True, metric: Metric = "euclidean"
) -> float:
    """Return the mean distance from random initial context vectors to their nearest tokens."""
    noise = STANDARD_DEVIATION * _normal_numbers(0, INITIAL_VECTORS, backbone.text.width)
    return float(nearest_words(backbone, noise, 1, trained_only, metric).distances.mean())


def random_distances(
    backbone: Backbone, lengths: Tensor, trained_only: bool = True, metric: Metric = "euclidean"
) -> Tensor:
    """Return the mean distance to the nearest token of vectors of each of ``lengths`` (n,) in random directions.

    Learned vectors are longer than initial ones, so farther from every token: their distances compare with these.
    Measured at fixed lengths, a vector's next shorter and longer ones, and interpolated linearly, float32 (n,).
    """
    lengths = lengths.detach().cpu().double().clamp(min=1e-9)
    steps = (PER_DOUBLING * lengths.log2()).floor()
    # The cosine does not depend on the length.
    steps = torch.cat([steps, steps + 1]).unique() if metric == "euclidean" else torch.zeros(1)
    grid = 2 ** (steps / PER_DOUBLING)
    directions = normalize(_normal_numbers(0, DIRECTIONS, backbone.text.width), dim=-1)
    probes = (grid.float()[:, None, None] * directions).flatten(0, 1)
    found = nearest_words(backbone, probes, 1, trained_only, metric).distances
    means = found.view(len(grid), DIRECTIONS).mean(1)
    return torch.from_numpy(np.interp(lengths, grid, means).astype(np.float32))


def _normal_numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
