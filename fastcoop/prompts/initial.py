"""First contexts: Gaussian noise, or the embeddings of given words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.checks import whole_number
from fastcoop.errors import UserError
from fastcoop.prompts.layout import PromptLayout, tokenize

STANDARD_DEVIATION = 0.02


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
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32) * STANDARD_DEVIATION
    tokens = word_tokens(backbone, words)
    if len(tokens) != layout.context_length:
        raise UserError(
            f'The words "{words}" are {len(tokens)} tokens, but the context length is {layout.context_length}; '
            f"set the context length to {len(tokens)}."
        )
    embeddings = backbone.text.token_embedding[tokens].detach().to("cpu", torch.float32)
    return embeddings.expand(shape).clone()


def word_tokens(backbone: Backbone, words: str) -> list[int]:
    """Return the token ids of ``words``, without start and end. Raises UserError if there are none."""
    tokens = tokenize(backbone.tokenizer, [words.replace("_", " ")], backbone.text.context_length)[0][1:-1]
    if not tokens:
        raise UserError(
            "Expected words to start the context from, got none; give some, or leave them out for random vectors."
        )
    return tokens
