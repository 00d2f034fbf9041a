"""Prompt layouts, and their prompts: sequences of frozen tokens and learned vectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import punctuation
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from fastcoop.checks import shortened, whole_number
from fastcoop.errors import UserError, nearest
from fastcoop.memo import memoize

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone

ClassPosition = Literal["end", "mid", "front"]
Tokenizer = Callable[..., Any]  # list of n strings -> int64 (n, context_length), an array or a tensor

CLASS = "[CLASS]"
VECTORS = re.compile(r"\s*\[V\](?:x(\d+))?\s*")
PLACEHOLDER = "X"  # stands for a context vector in the official code
FRAME_LENGTH = 8  # tokens; more than any tokenizer puts around a text


@dataclass(frozen=True)
class Pattern:
    """A prompt such as "[V]x4 [CLASS], a type of pet." in parts."""

    words: str  # without its vectors: "[CLASS], a type of pet."
    groups: tuple[tuple[str, int], ...]  # for each group of vectors the words before it, and their number

    @property
    def vectors(self) -> int:
        """M, the vectors of all groups."""
        return sum(count for _, count in self.groups)


@lru_cache(maxsize=1024)
def parse_prompt(prompt: str) -> Pattern:
    """Parse a prompt: "[V]" is a context vector, "[V]x4" are four, "[CLASS]" is the class name.

    Raises UserError unless there is one [CLASS] and at least one vector.
    """
    words, groups, at = "", [], 0
    for match in VECTORS.finditer(prompt):
        if len(match[1] or "") > 6:
            raise UserError(f"Expected at most 6 digits after [V]x, got {len(match[1])}.")
        words += prompt[at : match.start()]
        groups.append((words.strip(), int(match[1] or 1)))
        at = match.end()
        # Punctuation stays with the word before the vectors, so that both are tokenized together.
        if at < len(prompt) and (prompt[at] not in punctuation or prompt.startswith("[", at)):
            words += " "
    pattern = Pattern((words + prompt[at:]).strip(), tuple(group for group in groups if group[1]))
    if prompt.count(CLASS) != 1 or not pattern.vectors or "[v" in pattern.words.lower():
        raise UserError(
            f'A prompt to learn needs one {CLASS} and at least one vector, such as "[V]x4 {CLASS}, a type of pet."; '
            f'got "{prompt}".'
        )
    return pattern


@dataclass(frozen=True)
class PromptLayout:
    """Where the class name stands among the context vectors, and whether classes share them (section 3.2).

    Args:
        context_length: M, the number of context vectors.
        class_position: "end" (equation 2), "mid" (equation 4: M // 2 vectors before the name, the others after it) or
            "front".
        class_specific: Whether every class has M vectors of its own.
        prompt: A prompt of words and vectors in place of ``class_position``; see `PromptLayout.written`.

    Raises:
        UserError: For a length below 1 or an unknown position.
    """

    context_length: int = 16
    class_position: ClassPosition = "end"
    class_specific: bool = False
    prompt: str | None = None

    @classmethod
    def written(cls, prompt: str, class_specific: bool = False) -> PromptLayout:
        """Return the layout of a written prompt, such as "[V]x4 [CLASS], a type of pet.".

        Raises UserError unless it has one [CLASS] and at least one [V].
        """
        pattern = parse_prompt(prompt)
        for position in get_args(ClassPosition):
            named = cls(pattern.vectors, position, class_specific)
            if named.pattern == pattern:
                return named
        return cls(pattern.vectors, "end", class_specific, prompt)

    def __post_init__(self) -> None:
        length, specific = whole_number(self.context_length, "the context length M", 1), self.class_specific
        if not isinstance(specific, bool | np.bool_):
            raise UserError(f"Expected class_specific to be True or False, got {shortened(specific)}.")
        object.__setattr__(self, "context_length", length)
        object.__setattr__(self, "class_specific", bool(specific))
        position, positions = self.class_position, get_args(ClassPosition)
        if position not in positions:
            hint = nearest(str(position), positions)
            raise UserError(f'The class token position "{position}" is unknown.{hint}')
        if self.prompt is not None and position != "end":
            raise UserError(f"A written prompt places its own vectors; leave out class_position={position}.")
        if self.prompt is not None and self.pattern.vectors != length:
            raise UserError(
                f'The prompt "{self.prompt}" has {self.pattern.vectors} vectors, but the context length is {length}; '
                "make the layout with PromptLayout.written."
            )

    @property
    def pattern(self) -> Pattern:
        """The prompt in parts; the three positions are written prompts, too."""
        if self.prompt is not None:
            return parse_prompt(self.prompt)
        m = self.context_length
        before = {"end": m, "mid": m // 2, "front": 0}[self.class_position]
        return parse_prompt(f"[V]x{before} {CLASS} [V]x{m - before}.")

    def shape(self, classes: int, width: int) -> tuple[int, ...]:
        """Return the shape of one run's contexts: (M, width), or (classes, M, width) if class-specific."""
        unified = (self.context_length, width)
        return (classes, *unified) if self.class_specific else unified


class Slot(NamedTuple):
    """One position of a prompt: a frozen token of the vocabulary, or a learned vector of the run.

    Learned vectors are numbered through a run's contexts flattened to (-1, width): vector m of class k is
    ``k * M + m`` if class-specific, else ``m``.
    """

    learned: bool
    number: int


Prompt = tuple[Slot, ...]


class Frame(NamedTuple):
    """The tokens that a tokenizer puts before and after the tokens of every text.

    CLIP's puts one before and one after it, mT5's one after it. Padding may be the end token, too.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]


@memoize(1)
def frame_of(tokenizer: Tokenizer) -> Frame:
    """Return the frame of an empty text."""
    empty, other = tokenizer(["", "a"], context_length=FRAME_LENGTH).tolist()
    start = next(n for n, (one, two) in enumerate(zip(empty, other, strict=True)) if one != two)
    stop = max((n for n, token in enumerate(empty) if token != empty[-1]), default=-1) + 1
    return Frame(tuple(empty[:start]), tuple(empty[start : max(stop, start + 1)]))


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int | None = 77) -> list[list[int]]:
    """Return each text's token ids from the start token to the end token, without padding.

    Raises UserError for a text of more than ``context_length`` tokens (None: of any number).
    """
    start, end = frame_of(tokenizer)
    # The tokenizer cuts silently at its length. Most write a character as at most four tokens, one per byte.
    long = FRAME_LENGTH + 4 * max(map(len, texts), default=0)
    while True:
        rows = tokenizer(list(texts), context_length=long).tolist()
        sequences = [row[: row.index(end[0], len(start)) + len(end)] for row in rows]
        if max(map(len, sequences), default=0) < long:
            break
        long *= 2  # a text fills the length, so it may be cut
    for text, sequence in zip(texts, sequences, strict=True):
        if context_length is not None and len(sequence) > context_length:
            raise UserError(
                f'The prompt "{text}" has {len(sequence)} tokens with its start and end, but the text tower '
                f"reads at most {context_length}; shorten it."
            )
    return sequences


def word_tokens(backbone: Backbone, words: str) -> list[int]:
    """Return the token ids of ``words``, without start and end. Raises UserError if there are none."""
    (tokens,) = tokenize(backbone.tokenizer, [words.replace("_", " ")], backbone.text.context_length)
    start, end = frame_of(backbone.tokenizer)
    tokens = tokens[len(start) : -len(end)]
    if not tokens:
        raise UserError(
            "Expected words to start the context from, got none; give some, or leave them out for random vectors."
        )
    return tokens


def class_prompts(
    tokenizer: Tokenizer, class_names: Sequence[str], layout: PromptLayout, context_length: int = 77
) -> list[Prompt]:
    """Return one prompt per class: start, context vectors and class name as laid out, ".", end.

    Underscores in names read as spaces. A prompt's words are tokenized whole, so a name's last character may merge
    with the full stop (not across a space that ends the name); vectors stand after as many tokens as the words before
    them have by themselves.

    Raises UserError for no class, an empty name, or a prompt of more than ``context_length`` tokens.
    """
    return list(_class_prompts(tokenizer, tuple(spaced(class_names)), layout, context_length))


@memoize(256)
def _class_prompts(
    tokenizer: Tokenizer, names: tuple[str, ...], layout: PromptLayout, context_length: int
) -> tuple[Prompt, ...]:
    pattern, (start, end) = layout.pattern, frame_of(tokenizer)
    whole = tokenize(tokenizer, [pattern.words.replace(CLASS, name) for name in names], None)
    before = list(dict.fromkeys(words.replace(CLASS, name) for words, _ in pattern.groups for name in names))
    tokenized = zip(before, tokenize(tokenizer, before, None), strict=True)
    stops = {text: len(ids) - len(end) for text, ids in tokenized}
    prompts = []
    for k, (name, tokens) in enumerate(zip(names, whole, strict=True)):
        length = len(tokens) + layout.context_length
        if length > context_length:
            raise too_long(name, length, layout.context_length, context_length)
        slots = [Slot(False, token) for token in tokens]
        vector = k * layout.context_length if layout.class_specific else 0
        prompt, at = slots[: len(start)], len(start)
        for words_before, count in pattern.groups:
            stop = stops[words_before.replace(CLASS, name)]
            prompt += [*slots[at:stop], *(Slot(True, vector + m) for m in range(count))]
            at, vector = stop, vector + count
        prompts.append((*prompt, *slots[at:]))
    return tuple(prompts)


def spaced(class_names: Sequence[str]) -> list[str]:
    """Return class names with spaces for underscores. Raises UserError for no class, or a name of no text."""
    if not class_names:
        raise UserError("Expected at least one class name, got none.")
    if odd := [name for name in class_names if not isinstance(name, str)]:
        raise UserError(f"Expected class names that are text, got {shortened(odd[0])}.")
    names = [name.replace("_", " ") for name in class_names]
    for k, name in enumerate(names):
        if not name.strip():
            raise UserError(f"Expected a name for every class, got an empty name of class {k}.")
    return names


def too_long(name: str, length: int, vectors: int, context_length: int) -> UserError:
    """Return the error for a class whose prompt has more tokens than the text tower reads."""
    return UserError(
        f'The prompt of class "{name}" has {length} tokens with its {vectors} context vectors, start and end, but the '
        f"text tower reads at most {context_length}; shorten the name or use fewer context vectors."
    )
