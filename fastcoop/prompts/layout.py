"""Prompt layouts, and the prompts they make: sequences of frozen tokens and learned vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from fastcoop.checks import shortened, whole_number
from fastcoop.errors import UserError, nearest
from fastcoop.prompts.pattern import CLASS, Pattern, parse

ClassPosition = Literal["end", "mid", "front"]
Tokenizer = Callable[..., Tensor]

PLACEHOLDER = "X"  # one token in every vocabulary; stands where a context vector goes


@dataclass(frozen=True)
class PromptLayout:
    """Where the class name stands among the context vectors, and whether classes share them (section 3.2).

    ``context_length`` is M. ``class_position`` is "end" (equation 2), "mid" (equation 4: M // 2 vectors before
    the name, the rest after it) or "front". With ``class_specific`` every class has M vectors of its own.
    ``prompt``: a prompt of another form, words and vectors mixed, in place of ``class_position``
    (``PromptLayout.written``).

    Raises UserError for a length below 1 or an unknown position.
    """

    context_length: int = 16
    class_position: ClassPosition = "end"
    class_specific: bool = False
    prompt: str | None = None

    @classmethod
    def written(cls, prompt: str, class_specific: bool = False) -> PromptLayout:
        """The layout of a prompt as one writes it, such as "[V]x4 [CLASS], a type of pet.".

        Raises UserError unless it has one [CLASS] and at least one [V].
        """
        pattern = parse(prompt)
        for position in get_args(ClassPosition):
            named = cls(pattern.vectors, position, class_specific)
            if named.pattern == pattern:
                return named
        return cls(pattern.vectors, "end", class_specific, prompt)

    def __post_init__(self) -> None:
        length = whole_number(self.context_length, "the context length M", 1)
        object.__setattr__(self, "context_length", length)
        if not isinstance(self.class_specific, bool | np.bool_):
            raise UserError(
                f"Expected class_specific to be True or False, got {shortened(self.class_specific)}."
            )
        object.__setattr__(self, "class_specific", bool(self.class_specific))
        positions = get_args(ClassPosition)
        if self.class_position not in positions:
            hint = nearest(str(self.class_position), positions)
            raise UserError(f'The class token position "{self.class_position}" is unknown.{hint}')

        if self.prompt is not None and self.class_position != "end":
            raise UserError(
                f"A prompt says itself where its vectors stand; leave out class_position={self.class_position}."
            )
        if self.prompt is not None and self.pattern.vectors != self.context_length:
            raise UserError(
                f'The prompt "{self.prompt}" has {self.pattern.vectors} vectors, but the context length is '
                f"{self.context_length}; make the layout with PromptLayout.written."
            )

    @property
    def pattern(self) -> Pattern:
        """The prompt, as written, taken apart. The three positions are cases of it."""
        if self.prompt is not None:
            return parse(self.prompt)
        m = self.context_length
        before = {"end": m, "mid": m // 2, "front": 0}[self.class_position]
        return parse(f"[V]x{before} {CLASS} [V]x{m - before}.")

    def shape(self, classes: int, width: int) -> tuple[int, ...]:
        """Shape of one run's contexts: (M, width), or (classes, M, width) if class-specific."""
        unified = (self.context_length, width)
        return (classes, *unified) if self.class_specific else unified


class Slot(NamedTuple):
    """One position of a prompt: a frozen token of the vocabulary, or learned vector ``number`` of the run.

    Learned vectors are counted through a run's contexts flattened to (-1, width): vector m of class k is
    ``k * M + m`` if class-specific, else ``m``.
    """

    learned: bool
    number: int


Prompt = tuple[Slot, ...]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int = 77) -> list[list[int]]:
    """Return each text's token ids from the start token to the end token, without padding.

    The tokenizer cuts silently at its context length, so it is asked for more than the tower has.

    Raises UserError for a text that does not fit ``context_length``, naming it and its token count.
    """
    roomy = max(4 * context_length, 3 * max((len(text) for text in texts), default=0) + 2)
    rows = tokenizer(list(texts), context_length=roomy).tolist()
    end = end_token(tokenizer)
    sequences = [row[: row.index(end) + 1] for row in rows]
    for text, sequence in zip(texts, sequences, strict=True):
        if len(sequence) > context_length:
            raise UserError(
                f'The prompt "{text}" has {len(sequence)} tokens with its start and end, but the text tower '
                f"reads at most {context_length}; shorten it."
            )
    return sequences


def end_token(tokenizer: Tokenizer) -> int:
    """Return the id the tokenizer puts at the end of a text (CLIP's 49407).

    Raises UserError for a tokenizer that puts none at the start, where a prompt's vectors would follow.
    """
    row, other = tokenizer([PLACEHOLDER, "a"], context_length=3).tolist()
    if row[0] != other[0]:
        raise UserError(
            "This backbone's tokenizer puts no start token before a text, as prompt learning needs it to; choose a "
            "backbone with CLIP's own tokenizer, such as RN50 or ViT-B-16."
        )
    return int(row[2])


def class_prompts(
    tokenizer: Tokenizer, class_names: Sequence[str], layout: PromptLayout, context_length: int = 77
) -> list[Prompt]:
    """Return one prompt per class: start, context vectors and class name as laid out, ".", end.

    Underscores in names read as spaces. A prompt's words are tokenised whole, so a name's last character may merge
    with the full stop (not across a space that ends the name); vectors stand after as many tokens as the words before
    them have by themselves.

    Raises UserError where there is no class, a name is empty, or a prompt does not fit ``context_length``
    (naming the class and its token count).
    """
    if not class_names:
        raise UserError("A prompt needs at least one class name, but none was given.")
    names = [name.replace("_", " ") for name in class_names]
    empty = [k for k, name in enumerate(names) if not name.strip()]
    if empty:
        raise UserError(f"Class {empty[0]} has an empty name; every class needs a name to be prompted by.")
    pattern, roomy = layout.pattern, 4096
    whole = tokenize(tokenizer, [pattern.words.replace(CLASS, name) for name in names], roomy)
    places = [_lengths(tokenizer, before, names, roomy) for before, _ in pattern.groups]
    prompts = []
    for k, (name, tokens) in enumerate(zip(names, whole, strict=True)):
        length = len(tokens) + layout.context_length
        if length > context_length:
            raise UserError(
                f'The prompt of class "{name}" has {length} tokens with its {layout.context_length} context '
                f"vectors, start and end, but the text tower reads at most {context_length}; shorten the name or "
                "use fewer context vectors."
            )
        words = [Slot(False, token) for token in tokens]
        vector = k * layout.context_length if layout.class_specific else 0
        prompt, at = [words[0]], 1
        for lengths, (_, count) in zip(places, pattern.groups, strict=True):
            stop = 1 + lengths[k]
            prompt += [*words[at:stop], *(Slot(True, vector + m) for m in range(count))]
            at, vector = stop, vector + count
        prompts.append((*prompt, *words[at:]))
    return prompts


def _lengths(tokenizer: Tokenizer, words: str, names: Sequence[str], roomy: int) -> list[int]:
    """How many tokens the words before some vectors have in each class's prompt."""
    texts = [words.replace(CLASS, name) for name in (names if CLASS in words else names[:1])]
    lengths = [len(tokens) - 2 for tokens in tokenize(tokenizer, texts, roomy)]
    return lengths if CLASS in words else lengths * len(names)
