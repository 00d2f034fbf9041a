"""Nearest words of learned contexts, as a sweep or `fastcoop interpret` stores them beside the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcoop.errors import UserError

FOLDER = "nearest_words"
NEAR = 0.9  # a distance below this share of the one by chance makes a nearest word more than an accident
NOT_READ = "N/A"  # stands for a word in another script than Latin


@dataclass(frozen=True)
class Reading:
    """One context vector: its place in the prompt (from 1), the vocabulary's nearest tokens and their distances,
    nearest first, the nearest distance of random vectors of the same length (None: not measured), and for a
    class-specific context the class it belongs to."""

    position: int
    words: tuple[str, ...]
    distances: tuple[float, ...]
    chance: float | None = None
    class_name: str | None = None

    @property
    def word(self) -> str:
        """The nearest token as it is read: a whole word bare, a piece of a word with a hyphen after it."""
        return self.words[0].removesuffix("</w>")

    @property
    def near(self) -> bool:
        """Whether the nearest word is nearer than `NEAR` of what chance gives."""
        return self.chance is not None and self.distances[0] < NEAR * self.chance


@dataclass(frozen=True)
class Readings:
    """All vectors of a run. ``by_chance`` is the distance to the nearest token that a random context has,
    ``initial`` that of the context the run started from (None: not measured), ``start_words`` the words it
    started from, empty where it started from random vectors; ``metric`` "euclidean" or "cosine"."""

    vectors: Sequence[Reading]
    by_chance: float | None
    initial: float | None = None
    start_words: tuple[str, ...] = ()
    metric: str = "euclidean"

    @property
    def mean_distance(self) -> float:
        return sum(vector.distances[0] for vector in self.vectors) / len(self.vectors)

    @property
    def mean_chance(self) -> float | None:
        """What chance gives at the vectors' lengths, on average; else at the length of a random context."""
        at_length = [vector.chance for vector in self.vectors if vector.chance is not None]
        return sum(at_length) / len(at_length) if len(at_length) == len(self.vectors) else self.by_chance

    @property
    def near(self) -> float:
        """The percentage of vectors that are nearer to a word than an accident (`Reading.near`)."""
        return 100 * sum(vector.near for vector in self.vectors) / len(self.vectors)

    def of_classes(self) -> dict[str, Readings]:
        """The readings of each class of a class-specific context, in the classes' order."""
        found: dict[str, list[Reading]] = {}
        for vector in self.vectors:
            found.setdefault(vector.class_name or "", []).append(vector)
        rest = (self.by_chance, self.initial, self.start_words, self.metric)
        return {name: Readings(vectors, *rest) for name, vectors in found.items()}


def most_often(vectors: Iterable[Reading], how_many: int) -> str:
    """The nearest words met most often, and how often."""
    counts = Counter(vector.word for vector in vectors if vector.word != NOT_READ)
    return ", ".join(f"{word} ({count})" for word, count in counts.most_common(how_many))


def read_words(folder: Path, key: str) -> Readings | None:
    """The readings of run ``key`` in a results folder, None where there are none.

    Raises UserError for a file that is not what `fastcoop interpret` writes.
    """
    path = folder / FOLDER / f"{key}.json"
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Readings(
            [_reading(vector) for vector in stored["vectors"]],
            _number(stored.get("by_chance")),
            _number(stored.get("initial")),
            tuple(map(str, stored.get("start_words", ()))),
            str(stored.get("metric", "euclidean")),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a nearest-words file of this version ({error}); delete it and interpret again."
        ) from None


def _reading(vector: dict) -> Reading:
    distances = tuple(map(float, vector["distances"]))
    words = tuple(map(str, vector["words"]))
    chance = _number(vector.get("chance"))
    return Reading(int(vector["position"]), words, distances, chance, vector.get("class"))


def _number(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]
