"""Prompts as one writes them: words, context vectors and the class name, in any order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from string import punctuation

from fastcoop.errors import UserError

CLASS = "[CLASS]"
VECTORS = re.compile(r"\s*\[V\](?:x(\d+))?\s*")


@dataclass(frozen=True)
class Pattern:
    """A prompt such as "[V]x4 [CLASS], a type of pet.", taken apart.

    Attributes:
        words: the prompt without its vectors: "[CLASS], a type of pet."
        groups: for each run of vectors the words before it, and how many they are.
    """

    words: str
    groups: tuple[tuple[str, int], ...]

    @property
    def vectors(self) -> int:
        """M, all vectors together."""
        return sum(count for _, count in self.groups)


@lru_cache(maxsize=1024)
def parse(prompt: str) -> Pattern:
    """Take a prompt apart: "[V]" is a context vector, "[V]x4" are four, "[CLASS]" is the class name.

    Raises UserError unless there is one [CLASS] and at least one vector.
    """
    words, groups, at = "", [], 0
    for match in VECTORS.finditer(prompt):
        if len(match[1] or "") > 6:
            raise UserError(
                f"A number of vectors in a prompt may have at most 6 digits; {len(match[1])} came."
            )
        words += prompt[at : match.start()]
        groups.append((words.strip(), int(match[1] or 1)))
        at = match.end()
        # Punctuation stays with the word before the vectors, so that both are tokenised together.
        if at < len(prompt) and (prompt[at] not in punctuation or prompt.startswith("[", at)):
            words += " "
    pattern = Pattern((words + prompt[at:]).strip(), tuple(group for group in groups if group[1]))
    if prompt.count(CLASS) != 1 or not pattern.vectors or "[v" in pattern.words.lower():
        raise UserError(
            f'A prompt to learn needs one {CLASS} and at least one vector, such as "[V]x4 {CLASS}, a type of pet."; '
            f'"{prompt}" came.'
        )
    return pattern
