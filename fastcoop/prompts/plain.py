"""Prompts as the tokenizer makes them, for towers that compute all positions: vectors stand where words would."""

from __future__ import annotations

from collections.abc import Sequence
from string import punctuation
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastcoop.backbones.planned import count_tokens
from fastcoop.errors import UserError
from fastcoop.prompts.layout import (
    CLASS,
    Pattern,
    PromptLayout,
    Slot,
    Tokenizer,
    class_prompts,
    spaced,
    too_long,
)
from fastcoop.prompts.tree import Tree, build_tree

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone

# Pairs of words. Where a tokenizer makes one token of either word, the positions that differ are those of the words.
PLACEHOLDERS = (("X", "Q"), ("x", "q"), ("a", "the"), ("one", "two"), ("of", "the"), ("photo", "this"))


class PlainPrompts(NamedTuple):
    """The prompts of the classes, padded to one length.

    Attributes:
        ids: int64 (classes, positions), the tokens; a placeholder's where a context vector stands.
        vectors: int64 (classes, positions), the vector at each position, numbered as `Slot`'s; -1 at tokens.
        lengths: int64 (classes,), tokens of each prompt without padding.
    """

    ids: np.ndarray
    vectors: np.ndarray
    lengths: np.ndarray

    def tree(self) -> Tree:
        """Return the tree that these prompts would have in a causal tower."""
        is_learned, numbers = self.vectors >= 0, np.where(self.vectors >= 0, self.vectors, self.ids)
        rows = zip(is_learned.tolist(), numbers.tolist(), self.lengths.tolist(), strict=True)
        return build_tree([tuple(map(Slot, learned[:n], number[:n])) for learned, number, n in rows])


def plain_prompts(
    tokenizer: Tokenizer, class_names: Sequence[str], layout: PromptLayout, context_length: int
) -> PlainPrompts:
    """Return the prompts of the classes at ``context_length`` positions.

    The tokenizer reads a placeholder word for each vector, so that its own rules hold: some write a word after
    another word differently, and some drop the full stop.

    Raises UserError for no class, an empty name, or a prompt of more than ``context_length`` tokens.
    """
    names = spaced(class_names)
    for pair in PLACEHOLDERS:
        if not all(_is_one_token(tokenizer, word) for word in pair):
            continue
        prompts = (written(layout.pattern, word) for word in pair)
        texts, others = ([prompt.replace(CLASS, name) for name in names] for prompt in prompts)
        lengths = [count_tokens(tokenizer, text) for text in texts]
        for name, length in zip(names, lengths, strict=True):
            if length > context_length:
                raise too_long(name, length, layout.context_length, context_length)
        ids, other = (tokenizer(some, context_length=context_length).numpy() for some in (texts, others))
        differs = ids != other
        if (differs.sum(1) == layout.context_length).all():
            number = differs.cumsum(1) - 1
            if layout.class_specific:
                number += layout.context_length * np.arange(len(names))[:, None]
            return PlainPrompts(ids, np.where(differs, number, -1), np.array(lengths))
    words = ", ".join(f'"{one}" or "{two}"' for one, two in PLACEHOLDERS)
    raise UserError(
        "This backbone cannot learn prompts: its tokenizer has no word that is always one token, in place of a vector; "
        f"expected {words}."
    )


def _is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    counts = [count_tokens(tokenizer, text) for text in ("", word, f"{word} {word}")]
    return counts == [counts[0], counts[0] + 1, counts[0] + 2]


def written(pattern: Pattern, word: str) -> str:
    """Return the prompt with ``word`` in place of each vector."""
    text, at = "", 0
    for before, count in pattern.groups:
        text = _joined(_joined(text, pattern.words[at : len(before)]), " ".join([word] * count))
        at = len(before)
    return _joined(text, pattern.words[at:])


def _joined(text: str, more: str) -> str:
    """Return both with a space between them, where the second part begins a word."""
    begins_word = more[:1] not in (*punctuation, " ", "") or more.startswith("[")
    return text + " " * (begins_word and bool(text)) + more


def check_class_prompts(backbone: Backbone, class_names: Sequence[str], layout: PromptLayout) -> None:
    """Raise UserError for a class whose prompt does not fit the text tower."""
    prompts = class_prompts if backbone.text.is_shared else plain_prompts
    prompts(backbone.tokenizer, class_names, layout, backbone.text.context_length)


def drops_full_stop(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer leaves out punctuation, so that prompts have no full stop."""
    with_it, without = tokenizer(["a.", "a"], context_length=8)
    return bool((with_it == without).all())
