"""Nearest words of every learned context in a results folder, written as JSON beside it for the reports."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcoop import escape
from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import several
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
from fastcoop.results.parameters import load_parameters
from fastcoop.results.read import unique_names
from fastcoop.results.store import NEAREST_WORDS

log = logging.getLogger("fastcoop")

MAX_VECTORS = 1 << 16  # searched at once: 128 MB at CLIP's width
MAX_INITIAL_VECTORS = 256  # of a run's initial context: enough for their mean distance
SUMMARY_WORDS = 10


class _Context(NamedTuple):
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

    Returns:
        The paths of the files.

    Raises:
        UserError: There are no results, no such run, or none of this backbone; an option is out of range; or the
            files cannot be written.
    """
    folder, runs = Path(results), several(runs)
    rows = _select(folder, backbone, runs)
    options = {"metric": metric, "k": k, "trained_only": trained_only, "latin_only": latin_only}
    paths = {row.key: folder / NEAREST_WORDS / f"{row.key}.json" for row in rows}
    search = _Search(backbone, options)
    with writing(folder / NEAREST_WORDS):
        (folder / NEAREST_WORDS).mkdir(exist_ok=True)
    problems: dict[str, str] = {}  # why runs have no nearest words, by key
    contexts: list[_Context] = []
    vectors = 0  # of the contexts
    for row in rows:
        try:
            context = _load_context(folder, row)
        except UserError as error:  # a missing or damaged file
            problems[row.key] = str(error)
        else:
            contexts.append(context)
            vectors += context.vectors[..., 0].numel()
        if contexts and (row is rows[-1] or vectors >= MAX_VECTORS):
            for context, content in zip(contexts, search.contents(contexts), strict=True):
                path = paths[context.key]
                with writing(path), atomic_write(path) as part:
                    part.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
            contexts.clear()
            vectors = 0
    if problems:
        first = next(iter(problems.values()))
        if runs or len(problems) == len(rows):
            raise UserError(first)
        log.warning(
            "%d of %d runs of %s are left out; the first: %s", len(problems), len(rows), folder, first
        )
    return [path for key, path in paths.items() if key not in problems]


def _select(folder: Path, backbone: Backbone, runs: Sequence[str]) -> list[Any]:
    """Return the CoOp runs over a backbone, those whose keys begin with one of ``runs`` or all, as rows."""
    frame, runs = load_runs(folder), [run.lower() for run in runs]
    frame = frame[frame.method == "coop"]
    own = frame[frame.backbone_digest == backbone.digest]
    rows: list[Any] = list(own.itertuples())
    rows = [row for row in rows if not runs or row.key.startswith(tuple(runs))]
    missing = [run for run in runs if not any(row.key.startswith(run) for row in rows)]
    if missing or not rows:
        names = ", ".join(frame.backbone.unique())
        others = f" (its CoOp runs are over {names})" if own.empty and names else ""
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(
            f"{folder} has no CoOp run{f' {missing[0]}' if missing else ''} over {backbone.name}{others}; `{command}` "
            "shows its runs."
        )
    return rows


def _load_context(folder: Path, row: Any) -> _Context:
    """Return the context of a run. Raises UserError if its file is missing or damaged, or no distance is finite."""
    vectors = torch.from_numpy(load_contexts(folder, row.key))
    if not torch.isfinite(vectors.square().sum(dim=-1)).all():
        raise UserError(
            f"The contexts of run {row.key[:12]} of {folder} diverged: they are not finite and have no nearest words; "
            "choose other runs (--run)."
        )
    names: tuple[str, ...] = ()
    if vectors.ndim == 3:
        learned = load_parameters(folder, row.key)
        known = (learned.class_names if learned else ()) or load_predictions(folder, row.key).class_names
        names = tuple(unique_names(known))
    words = None if row.init in (None, "random") else str(row.init)
    return _Context(row.key, vectors, names, int(row.seed), words)


class _Search:
    """Searches the vectors of many runs at once. Equal initial contexts are searched once."""

    def __init__(self, backbone: Backbone, options: dict[str, Any]):
        self._backbone, self._options = backbone, options
        self._of_random = {name: options[name] for name in ("trained_only", "metric")}
        self._by_chance = mean_initial_distance(backbone, **self._of_random)
        self._starts: dict[tuple[Any, ...], dict[str, Any]] = {}  # what files hold of initial contexts

    def contents(self, contexts: Sequence[_Context]) -> Iterator[dict[str, Any]]:
        """Yield what the file of each context holds."""
        new = {context.start: context for context in contexts if context.start not in self._starts}
        found = self._nearest([self._initial(context) for context in new.values()], k=1)
        for context, (words, distances) in zip(new.values(), found, strict=True):
            nearest = {"start_words": [word for (word,) in words]} if context.words is not None else {}
            self._starts[context.start] = {"initial": _short(distances.mean())} | nearest
        flat = [context.vectors.flatten(0, -2) for context in contexts]
        lengths = torch.cat(flat).norm(dim=-1)
        chance = random_distances(self._backbone, lengths, **self._of_random).split(list(map(len, flat)))
        found = self._nearest(flat)
        for context, (words, distances), random in zip(contexts, found, chance, strict=True):
            yield self._content(context, words, distances.tolist(), random.tolist())

    def _nearest(self, parts: Sequence[Tensor], **options: Any) -> list[tuple[list[list[str]], Tensor]]:
        """Return the nearest words of the vectors of each part, and their distances (n, k)."""
        if not parts:
            return []
        found = nearest_words(self._backbone, torch.cat(list(parts)), **self._options | options)
        words = iter(found.words)
        return [(list(islice(words, len(one))), one) for one in found.distances.split(list(map(len, parts)))]

    def _content(
        self, context: _Context, words: list[list[str]], distances: list[list[float]], chance: list[float]
    ) -> dict[str, Any]:
        length, names = context.vectors.shape[-2], context.class_names
        content = self._options | {"by_chance": self._by_chance} | self._starts[context.start]
        if names:  # means and the most frequent nearest words over all classes
            nearest = Counter(found[0] for found in words if found[0] != NOT_LATIN)
            content["summary"] = {
                "classes": len(names),
                "mean_distance": _short(fmean(_short(found[0]) for found in distances)),
                "chance": _short(fmean(map(_short, chance))),
                "words": [list(pair) for pair in nearest.most_common(SUMMARY_WORDS)],
            }
        content["vectors"] = [
            {"position": i % length + 1}
            | ({"class": names[i // length]} if names else {})
            | {"words": words[i], "distances": list(map(_short, distances[i])), "chance": _short(chance[i])}
            for i in range(len(words))
        ]
        return content

    def _initial(self, context: _Context) -> Tensor:
        """Return vectors (n, width) of the run's initial context, as many as their mean needs."""
        *classes, length, _ = context.vectors.shape
        specific = bool(classes) and context.words is None
        layout, count = PromptLayout(length, class_specific=specific), classes[0] if specific else 1
        start = initial_contexts(self._backbone, layout, count, context.seed, context.words)
        return start.flatten(0, -2)[:MAX_INITIAL_VECTORS]


def _short(number: Any) -> float:
    return float(f"{float(number):.5g}")
