"""Nearest words of learned contexts, as a sweep or `fastcoop interpret` stores them beside the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from fastcoop.errors import UserError
from fastcoop.results.store import NEAREST_WORDS

NEAR = 0.9  # share of a random vector's distance below which a word counts as near
NOT_LATIN = "N/A"  # stands for a word in another script


@dataclass(frozen=True)
class Reading:
    """The nearest words of one context vector.

    Attributes:
        position: Place of the vector, from 1.
        words: Nearest tokens of the vocabulary, the nearest first.
        distance: Distance of the nearest one.
        chance: Nearest distance of random vectors of the same length; None if it was not measured.
        class_name: The class of a class-specific context, else empty.
    """

    position: int
    words: tuple[str, ...]
    distance: float
    chance: float | None
    class_name: str

    @property
    def word(self) -> str:
        """The nearest token, a piece of a word with a hyphen after it."""
        return self.words[0].removesuffix("</w>")

    @property
    def near(self) -> bool:
        """Whether the nearest word is nearer than `NEAR` of the distance of random vectors."""
        return self.chance is not None and self.distance < NEAR * self.chance


@dataclass(frozen=True)
class Readings:
    """The nearest words of all vectors of a run. Distances are None if they were not measured.

    Attributes:
        by_chance: Mean nearest distance of a random initial context.
        initial: Mean nearest distance of the run's initial context.
        start_words: Words of the initialization, none for random vectors.
        metric: "euclidean" or "cosine".
    """

    vectors: Sequence[Reading]
    by_chance: float | None
    initial: float | None
    start_words: tuple[str, ...]
    metric: str

    @property
    def mean_distance(self) -> float:
        """Mean of the vectors' nearest distances."""
        return fmean(vector.distance for vector in self.vectors)

    @property
    def mean_chance(self) -> float | None:
        """Mean distance of random vectors of the same lengths, else of a random initial context."""
        at_length = [vector.chance for vector in self.vectors if vector.chance is not None]
        return fmean(at_length) if len(at_length) == len(self.vectors) else self.by_chance

    @property
    def near(self) -> float:
        """Percentage of vectors that are near a word (`Reading.near`)."""
        return 100 * fmean(vector.near for vector in self.vectors)

    def of_classes(self) -> dict[str, Readings]:
        """Return the readings of each class of a class-specific context, in the classes' order."""
        names = dict.fromkeys(vector.class_name for vector in self.vectors)
        return {
            name: replace(self, vectors=[v for v in self.vectors if v.class_name == name]) for name in names
        }

    def most_frequent(self, number: int) -> str:
        """Return the most frequent nearest words with their counts, as text."""
        counts = Counter(vector.word for vector in self.vectors if vector.word != NOT_LATIN)
        return ", ".join(f"{word} ({count})" for word, count in counts.most_common(number))


def read_words(folder: Path, key: str) -> Readings | None:
    """Return the nearest words of a run in a results folder, None if there are none.

    Raises:
        UserError: the file is damaged or of another version.
    """
    path = folder / NEAREST_WORDS / f"{key}.json"
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        by_chance, initial = (_number(stored.get(name)) for name in ("by_chance", "initial"))
        start_words = tuple(map(str, stored.get("start_words", ())))
        vectors = [
            Reading(int(one["position"]), tuple(map(str, one["words"])), float(one["distances"][0]),
                    _number(one.get("chance")), one.get("class") or "")
            for one in stored["vectors"]
        ]  # fmt: skip
        return Readings(vectors, by_chance, initial, start_words, str(stored.get("metric", "euclidean")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}); delete it and run `fastcoop interpret` again."
        ) from None


def _number(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]
