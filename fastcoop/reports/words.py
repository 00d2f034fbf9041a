"""Nearest words of learned contexts, as a sweep or `fastcoop interpret` stores them beside the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcoop.errors import UserError

FOLDER = "nearest_words"


@dataclass(frozen=True)
class Reading:
    """One context vector: its place in the prompt (from 1), the vocabulary's nearest tokens and their
    Euclidean distances, nearest first, and for a class-specific context the class it belongs to."""

    position: int
    words: tuple[str, ...]
    distances: tuple[float, ...]
    class_name: str | None = None

    @property
    def word(self) -> str:
        """The nearest token as it is read: a whole word bare, a piece of a word with a hyphen after it."""
        return self.words[0].removesuffix("</w>")


@dataclass(frozen=True)
class Readings:
    """All vectors of a run, and the distance to the nearest token that a random context has (None: not
    measured)."""

    vectors: Sequence[Reading]
    by_chance: float | None

    @property
    def mean_distance(self) -> float:
        return sum(vector.distances[0] for vector in self.vectors) / len(self.vectors)


def read_words(folder: Path, key: str) -> Readings | None:
    """The readings of run ``key`` in a results folder, None where there are none.

    Raises UserError for a file that is not what `fastcoop interpret` writes.
    """
    path = folder / FOLDER / f"{key}.json"
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        vectors = [
            Reading(int(v["position"]), tuple(v["words"]), tuple(map(float, v["distances"])), v.get("class"))
            for v in stored["vectors"]
        ]
        chance = stored.get("by_chance")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a nearest-words file of this version ({error}); delete it and interpret again."
        ) from None
    return Readings(vectors, None if chance is None else float(chance))
