"""Nearest words of every learned context in a results folder, written as JSON beside it for the reports."""

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
    PromptLayout,
    initial_contexts,
    mean_initial_distance,
    nearest_words,
    random_distances,
)
from fastcoop.prompts.vectors import NOT_LATIN
from fastcoop.results import load_contexts, load_predictions, load_runs
from fastcoop.results.parameters import load_parameters, parameters_path
from fastcoop.results.store import NEAREST_WORDS

log = logging.getLogger("fastcoop")

MAX_VECTORS = 1 << 16  # searched at once: 128 MB at CLIP's width
MAX_INITIAL_VECTORS = 256  # of a run's initial context: enough for their mean distance
SUMMARY_WORDS = 10


@dataclass(frozen=True, eq=False)
class _Context:
    """The learned vectors of one run, (M, width) or (classes, M, width), and how they were initialized."""

    key: str
    vectors: Tensor
    class_names: tuple[str, ...]  # () where the context is shared by all classes
    seed: int
    words: str | None  # initial words; None: random

    @property
    def start(self) -> tuple[Any, ...]:
        """What determines the initial context."""
        *classes, length, _ = self.vectors.shape
        return (self.words, length) if self.words is not None else (length, tuple(classes), self.seed)


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
    """Write the nearest words of learned contexts to ``nearest_words/<key>.json`` of a results folder.

    Each file holds ``vectors``: per context vector its ``position`` in the context (from 1), its ``class`` if the
    context is class-specific, the ``k`` nearest ``words``, their ``distances``, and ``chance``, the mean nearest
    distance of random vectors of the same length. It also holds the ``metric``; ``by_chance``, the mean nearest
    distance of random initial vectors; ``initial``, that of the run's initial context, and ``start_words``, its nearest
    words, where the run was initialized with words; and for class-specific contexts a ``summary`` over classes.

    Args:
        results: The results folder.
        backbone: CoOp runs of this backbone are read.
        runs: Keys, or their first characters. Empty: all runs.
        k: Number of words per vector.
        trained_only: Leave out tokens that the backbone has not seen in training, where this is known.
        metric: "euclidean" or "cosine".
        latin_only: Write "N/A" for words in other scripts.
        again: Also rewrite files that were written with the same options.

    Returns:
        The paths of the files of all selected runs, written now or before.

    Raises:
        UserError: There are no results, no such run, or none of this backbone; an option is out of range; or the
            files cannot be written.
    """
    k = whole_number(k, "the number of nearest words", 1)
    if metric not in get_args(Metric):
        raise UserError(f'Expected the metric "euclidean" or "cosine", got {shortened(metric)}.')
    folder, runs = Path(results), several(runs)
    frame = load_runs(folder)
    of_backbone = frame[(frame.method == "coop") & (frame.backbone_digest == backbone.digest)]
    rows: list[Any] = list(of_backbone.itertuples())
    rows = [row for row in rows if not runs or row.key.startswith(tuple(runs))]
    rows = [row for row in rows if parameters_path(folder, row.key).is_file()]
    missing = [run for run in runs if not any(row.key.startswith(run) for row in rows)]
    if missing or not rows:
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(
            f"{folder} has no CoOp run{f' {missing[0]}' if missing else ''} over {backbone.name}; `{command}` shows "
            "its runs."
        )
    with writing(folder / NEAREST_WORDS):
        (folder / NEAREST_WORDS).mkdir(exist_ok=True)
    writer = _Writer(folder, backbone, k, trained_only, metric, latin_only)
    pending: list[_Context] = []
    diverged: list[str] = []
    for row in rows:
        if again or not writer.is_current(row.key):
            context = _load_context(folder, row)
            if torch.isfinite(context.vectors.square().sum(dim=-1)).all():  # else no distance is finite
                pending.append(context)
            else:
                diverged.append(row.key)
        if sum(context.vectors.shape[:-1].numel() for context in pending) >= MAX_VECTORS:
            writer.write(pending)
            pending = []
    writer.write(pending)
    if diverged:
        count = f"{len(diverged)} of {len(rows)} runs of {folder} diverged ({diverged[0][:12]}, ...)"
        if runs or len(diverged) == len(rows):
            raise UserError(
                f"{count}: their contexts are not finite and have no nearest words; choose other runs (--run)."
            )
        log.warning("%s and are left out: their contexts are not finite.", count)
    return [writer.path(row.key) for row in rows if row.key not in set(diverged)]


def _load_context(folder: Path, row: Any) -> _Context:
    vectors = torch.from_numpy(load_contexts(folder, row.key))
    names: tuple[str, ...] = ()
    if vectors.ndim == 3:
        learned = load_parameters(folder, row.key)
        names = (learned.class_names if learned else ()) or load_predictions(folder, row.key).class_names
    words = None if row.init in (None, "random") else str(row.init)
    return _Context(row.key, vectors, names, int(row.seed), words)


class _Writer:
    """Searches the vectors of many runs at once. Equal initial contexts are searched once."""

    def __init__(
        self, folder: Path, backbone: Backbone, k: int, trained_only: bool, metric: Metric, latin_only: bool
    ):
        self.folder, self.backbone = folder, backbone
        self._options: dict[str, Any] = {
            "metric": metric,
            "k": k,
            "trained_only": trained_only,
            "latin_only": latin_only,
        }
        self._chance_options: dict[str, Any] = {"trained_only": trained_only, "metric": metric}
        self._by_chance = mean_initial_distance(backbone, **self._chance_options)
        self._starts: dict[tuple[Any, ...], tuple[float, list[str]]] = {}  # mean distance, nearest words

    def path(self, key: str) -> Path:
        return self.folder / NEAREST_WORDS / f"{key}.json"

    def is_current(self, key: str) -> bool:
        """Whether the run's file exists and was written with these options."""
        try:
            return bool(self._options.items() <= json.loads(self.path(key).read_text("utf-8")).items())
        except (OSError, ValueError, AttributeError):
            return False

    def write(self, contexts: Sequence[_Context]) -> None:
        """Write one file per run, from one search."""
        if not contexts:
            return
        flat = [context.vectors.flatten(0, -2) for context in contexts]
        found = nearest_words(self.backbone, torch.cat(flat), **self._options)
        chance = random_distances(self.backbone, torch.cat(flat).norm(dim=-1), **self._chance_options)
        self._search_starts(contexts)
        end = 0
        for context, vectors in zip(contexts, flat, strict=True):
            rows = slice(end, end := end + len(vectors))
            content = self._content(
                context, found.words[rows], found.distances[rows].tolist(), chance[rows].tolist()
            )
            path = self.path(context.key)
            with writing(path), atomic_write(path) as part:
                part.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")

    def _content(
        self, context: _Context, words: list[list[str]], distances: list[list[float]], chance: list[float]
    ) -> dict[str, Any]:
        length = context.vectors.shape[-2]
        vectors = []
        for i in range(len(words)):
            vector: dict[str, Any] = {"position": i % length + 1}
            if context.class_names:
                vector["class"] = context.class_names[i // length]
            vector |= {"words": words[i], "distances": [_short(distance) for distance in distances[i]]}
            vectors.append(vector | {"chance": _short(chance[i])})
        initial, start_words = self._starts[context.start]
        content: dict[str, Any] = {**self._options, "by_chance": self._by_chance, "initial": initial}
        if context.words is not None:
            content["start_words"] = start_words
        if context.class_names:
            content["summary"] = _summary(vectors, len(context.class_names))
        return content | {"vectors": vectors}

    def _search_starts(self, contexts: Sequence[_Context]) -> None:
        """Find the mean nearest distance and the nearest words of initial contexts, in one search."""
        new = {context.start: context for context in contexts if context.start not in self._starts}
        if not new:
            return
        starts = [self._initial(context) for context in new.values()]
        found = nearest_words(self.backbone, torch.cat(starts), **self._options | {"k": 1})
        end = 0
        for key, start in zip(new, starts, strict=True):
            rows = slice(end, end := end + len(start))
            nearest = [words[0] for words in found.words[rows]]
            self._starts[key] = _short(found.distances[rows].mean()), nearest

    def _initial(self, context: _Context) -> Tensor:
        """Return vectors (n, width) of the run's initial context, as many as their mean needs."""
        *classes, length, _ = context.vectors.shape
        specific = bool(classes) and context.words is None
        layout = PromptLayout(length, class_specific=specific)
        start = initial_contexts(
            self.backbone, layout, classes[0] if specific else 1, context.seed, context.words
        )
        return start.flatten(0, -2)[:MAX_INITIAL_VECTORS]


def _summary(vectors: Sequence[dict[str, Any]], classes: int) -> dict[str, Any]:
    """Return means and the most frequent nearest words over all classes."""
    nearest = [vector["words"][0] for vector in vectors if vector["words"][0] != NOT_LATIN]
    return {
        "classes": classes,
        "mean_distance": _short(sum(vector["distances"][0] for vector in vectors) / len(vectors)),
        "chance": _short(sum(vector["chance"] for vector in vectors) / len(vectors)),
        "words": [list(pair) for pair in Counter(nearest).most_common(SUMMARY_WORDS)],
    }


def _short(number: Any) -> float:
    return float(f"{float(number):.5g}")
