"""Nearest words of every learned context of a results folder, kept beside it as JSON for the reports."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastcoop import escape
from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import several, shortened, whole_number
from fastcoop.errors import UserError, writing
from fastcoop.files import atomic_write
from fastcoop.prompts import (
    Metric,
    Nearest,
    PromptLayout,
    chance_at_lengths,
    distance_by_chance,
    initial_contexts,
    nearest_words,
)
from fastcoop.prompts.nearest import NOT_LATIN
from fastcoop.results.read import load_contexts, load_learned, load_predictions, load_runs
from fastcoop.results.store import NEAREST_WORDS, contexts_path

log = logging.getLogger("fastcoop")

VECTORS_AT_ONCE = 1 << 16  # of runs read together: 128 MB at CLIP's width
VECTORS_AT_START = 256  # of a run's initial context that are read: enough for their mean
MOST_OFTEN = 10  # words of a summary over classes


@dataclass(frozen=True, eq=False)
class _Learned:
    """A run's contexts, (M, width) or (classes, M, width), the classes they are of, and what they started from."""

    key: str
    contexts: Tensor
    class_names: tuple[str, ...]
    seed: int
    words: str | None


@fresh_state()
def interpret(
    results: str | Path,
    backbone: Backbone,
    *,
    runs: Sequence[str] = (),
    k: int = 5,
    trained_only: bool = True,
    metric: Metric = "euclidean",
    latin_only: bool = False,
    again: bool = False,
) -> list[Path]:
    """Write ``nearest_words/<key>.json`` for the CoOp runs of ``backbone`` that lack one made with the same options;
    return their paths.

    Each holds ``vectors``: per context vector its ``position`` in the context (from 1), its ``class`` if
    class-specific, the ``k`` nearest ``words``, their ``distances``, and ``chance``, the mean nearest distance of
    random vectors of the same length. Beside them: the ``metric``; ``by_chance``, the mean nearest distance of random
    initial vectors; ``initial``, that of the context the run started from, and ``start_words``, where it started from
    words; and for class-specific contexts a ``summary`` over classes.

    Args:
        runs: keys, or beginnings of keys; none is all.
        trained_only: leave out tokens that the backbone never saw in training, where it knows.
        metric: "euclidean", or "cosine".
        latin_only: write "N/A" for words in other scripts.
        again: write those that exist anew.

    Raises:
        UserError: no results, no such run, or none of this backbone; ``k`` is below 1; or the disk refuses.
    """
    k = whole_number(k, "the number of nearest words", 1)
    if metric not in get_args(Metric):
        raise UserError(f'Expected the metric "euclidean" or "cosine", got {shortened(metric)}.')
    folder = Path(results)
    frame = load_runs(folder)
    learned = frame[(frame.method == "coop") & (frame.backbone_digest == backbone.digest)]
    every: list[Any] = list(learned.itertuples())
    every = [row for row in every if contexts_path(folder, row.key).is_file()]
    runs = several(runs)
    rows = [row for row in every if not runs or row.key.startswith(tuple(runs))]
    lost = [run for run in runs if not any(row.key.startswith(run) for row in rows)]
    if lost or not rows:
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(
            f"{folder} has no CoOp run{f' {lost[0]}' if lost else ''} over {backbone.name}; `{command}` shows what it "
            "has."
        )
    with writing(folder / NEAREST_WORDS):
        (folder / NEAREST_WORDS).mkdir(exist_ok=True)
    reader = _Reader(folder, backbone, k, trained_only, metric, latin_only)
    pending: list[_Learned] = []
    diverged: list[str] = []
    for row in rows:
        if again or not reader.has(row.key):
            words = None if row.init in (None, "random") else str(row.init)
            contexts, names = _contexts_and_names(folder, row.key)
            if not torch.isfinite(contexts.square().sum(dim=-1)).all():  # or their distances would not be
                diverged.append(row.key)
                continue
            pending.append(_Learned(row.key, contexts, names, int(row.seed), words))
        if sum(one.contexts.shape[:-1].numel() for one in pending) >= VECTORS_AT_ONCE:
            reader.read(pending)
            pending = []
    reader.read(pending)
    if diverged:
        named = f"{len(diverged)} of {len(rows)} runs of {folder} diverged ({diverged[0][:12]}, ...)"
        if runs or len(diverged) == len(rows):
            raise UserError(
                f"{named}: their contexts are not finite and have no nearest words; choose other runs (--run)."
            )
        log.warning("%s and are left out: their contexts are not finite.", named)
    return [reader.path(row.key) for row in rows if row.key not in set(diverged)]


def _contexts_and_names(folder: Path, key: str) -> tuple[Tensor, tuple[str, ...]]:
    """A run's contexts, and the names of the classes if they are class-specific."""
    contexts = torch.from_numpy(load_contexts(folder, key))
    if contexts.ndim == 2:
        return contexts, ()
    learned = load_learned(folder, key)
    names = learned.class_names if learned else ()
    return contexts, names or load_predictions(folder, key).class_names


class _Reader:
    """Reads many runs at a time. What runs have in common (where they started) is read once."""

    def __init__(
        self, folder: Path, backbone: Backbone, k: int, trained_only: bool, metric: Metric, latin_only: bool
    ):
        self.folder, self.backbone, self.k = folder, backbone, k
        self.trained_only, self.metric, self.latin_only = trained_only, metric, latin_only
        self.by_chance = distance_by_chance(backbone, trained_only=trained_only, metric=metric)
        self._starts: dict[tuple[Any, ...], tuple[float, list[str]]] = {}
        self._options = {"metric": metric, "k": k, "trained_only": trained_only, "latin_only": latin_only}

    def path(self, key: str) -> Path:
        return self.folder / NEAREST_WORDS / f"{key}.json"

    def has(self, key: str) -> bool:
        """Whether a run's file is there, and was made with these options."""
        try:
            stored = json.loads(self.path(key).read_text(encoding="utf-8"))
            return bool(self._options.items() <= stored.items())
        except (OSError, ValueError, AttributeError):
            return False

    def read(self, pending: Sequence[_Learned]) -> None:
        """One search for all of the runs' vectors, one file each."""
        if not pending:
            return
        flat = [one.contexts.flatten(0, -2) for one in pending]
        vectors = torch.cat(flat)
        found = self._nearest(vectors, self.k)
        chance = chance_at_lengths(
            self.backbone, vectors.norm(dim=-1), trained_only=self.trained_only, metric=self.metric
        )
        self._read_starts(pending)
        start = 0
        for one, own in zip(pending, flat, strict=True):
            rows = range(start, start + len(own))
            start += len(own)
            _write(self.path(one.key), self._stored(one, rows, found, chance))

    def _nearest(self, vectors: Tensor, k: int) -> Nearest:
        return nearest_words(self.backbone, vectors, k, self.trained_only, self.metric, self.latin_only)

    def _stored(self, one: _Learned, rows: range, found: Nearest, chance: Tensor) -> dict[str, Any]:
        length = one.contexts.shape[-2]
        names = one.class_names if one.contexts.ndim == 3 else None
        distances = found.distances[rows.start : rows.stop].tolist()
        vectors = []
        for i, row in enumerate(rows):
            vector: dict[str, Any] = {"position": i % length + 1}
            if names is not None:
                vector["class"] = names[i // length]
            vector |= {"words": found.words[row], "distances": [_short(d) for d in distances[i]]}
            vectors.append(vector | {"chance": _short(chance[row])})
        initial, words = self._starts[_start_of(one)]
        stored: dict[str, Any] = {**self._options, "by_chance": self.by_chance, "initial": initial}
        if one.words is not None:
            stored["start_words"] = words
        if names is not None:
            stored["summary"] = _summary(vectors, len(names))
        return stored | {"vectors": vectors}

    def _read_starts(self, pending: Sequence[_Learned]) -> None:
        """(mean nearest distance, nearest words) of the contexts that runs started from, in one search too."""
        asked = {key: one for one in pending if (key := _start_of(one)) not in self._starts}
        if not asked:
            return
        starts = [self._initial(one) for one in asked.values()]
        found = self._nearest(torch.cat(starts), 1)
        at = 0
        for key, start in zip(asked, starts, strict=True):
            rows = slice(at, at + len(start))
            at += len(start)
            words = [words[0] for words in found.words[rows]]
            self._starts[key] = (_short(found.distances[rows].mean()), words)

    def _initial(self, one: _Learned) -> Tensor:
        """Vectors (n, width) of the context that a run started from: as many as their mean needs."""
        *classes, length, _ = one.contexts.shape
        specific = bool(classes) and one.words is None
        layout = PromptLayout(length, class_specific=specific)
        start = initial_contexts(self.backbone, layout, classes[0] if specific else 1, one.seed, one.words)
        return start.flatten(0, -2)[:VECTORS_AT_START]


def _start_of(one: _Learned) -> tuple[Any, ...]:
    """What determines where a run's context started."""
    *classes, length, _ = one.contexts.shape
    if one.words is not None:
        return one.words, length
    return length, tuple(classes), one.seed


def _summary(vectors: Sequence[dict[str, Any]], classes: int) -> dict[str, Any]:
    """What class-specific readings have in common: how near they are, and the nearest words met most often."""
    nearest = [vector["words"][0] for vector in vectors if vector["words"][0] != NOT_LATIN]
    return {
        "classes": classes,
        "mean_distance": _short(sum(vector["distances"][0] for vector in vectors) / len(vectors)),
        "chance": _short(sum(vector["chance"] for vector in vectors) / len(vectors)),
        "words": [list(pair) for pair in Counter(nearest).most_common(MOST_OFTEN)],
    }


def _short(number: Any) -> float:
    return float(f"{float(number):.5g}")


def _write(path: Path, stored: dict[str, Any]) -> None:
    with writing(path), atomic_write(path) as part:
        part.write_text(json.dumps(stored, allow_nan=False), encoding="utf-8")
