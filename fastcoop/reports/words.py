"""Nearest words of learned contexts, as a sweep or `fastcoop interpret` stores them beside the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fastcoop.errors import UserError
from fastcoop.results.store import NEAREST_WORDS

NEAR = 0.9  # share of a random vector's distance below which a word counts as near


class NearestWords(NamedTuple):
    """The nearest words of a run.

    Attributes:
        vectors: A row per context vector: its ``position`` from 1, the nearest ``token``, the ``word`` (a piece of one
            ends with a hyphen), its ``distance``, the nearest distance of random vectors of the same length
            (``chance``), whether it is ``near`` compared with that, and the ``class`` of a class-specific context.
        by_chance: Mean nearest distance of a random initial context.
        initial: Mean nearest distance of the run's initial context.
        start_words: Words of the initialization, none for random vectors.
        metric: "euclidean" or "cosine".
    """

    vectors: pd.DataFrame
    by_chance: float
    initial: float
    start_words: list[str]
    metric: str


def read_words(folder: Path, key: str) -> NearestWords | None:
    """Return the nearest words of a run in a results folder, None if there are none.

    Raises:
        UserError: the file is damaged or of another version.
    """
    path = folder / NEAREST_WORDS / f"{key}.json"
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            (int(one["position"]), str(one["words"][0]), float(one["distances"][0]), float(one["chance"]),
             one.get("class") or "")
            for one in stored["vectors"]
        ]  # fmt: skip
        vectors = pd.DataFrame(rows, columns=["position", "token", "distance", "chance", "class"])
        by_chance, initial, metric = float(stored["by_chance"]), float(stored["initial"]), stored["metric"]
        start_words = [str(word) for word in stored.get("start_words", ())]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}); delete it and run `fastcoop interpret` again."
        ) from None
    words = vectors.token.str.removesuffix("</w>")
    vectors = vectors.assign(word=words, near=vectors.distance < NEAR * vectors.chance)
    return NearestWords(vectors, by_chance, initial, start_words, metric)
