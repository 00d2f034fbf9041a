"""Nearest words of every learned context of a results folder, kept beside it as JSON for the reports."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.prompts import distance_by_chance, nearest_words
from fastcoop.sweeps.results import load_contexts, load_predictions, load_results
from fastcoop.sweeps.store import contexts_path

FOLDER = "nearest_words"
VECTORS_AT_ONCE = 1 << 16  # of runs read together: 128 MB at CLIP's width


def interpret(
    results: str | Path,
    backbone: Backbone,
    *,
    runs: Sequence[str] = (),
    k: int = 5,
    trained_only: bool = True,
    again: bool = False,
) -> list[Path]:
    """Write ``nearest_words/<key>.json`` for the CoOp runs of ``backbone`` that lack one; return their paths.

    Each holds ``vectors``: per context vector its ``position`` in the context (from 1), its class if
    class-specific, the ``k`` nearest ``words`` and their Euclidean ``distances``; and ``by_chance``, the mean
    nearest distance of random initial vectors.

    Args:
        runs: keys, or beginnings of keys; none is all.
        trained_only: leave out tokens that the backbone never saw in training, where it knows.
        again: write those that exist anew.

    Raises:
        UserError: no results, no such run, or none of this backbone.
    """
    folder = Path(results)
    frame = load_results(folder)
    learned = frame[
        (frame.method == "coop") & (frame.backbone == backbone.name) & (frame.dataset == frame.source)
    ]
    keys = [key for key in learned.key if not runs or any(key.startswith(run) for run in runs)]
    keys = [key for key in keys if contexts_path(folder, key).is_file()]
    if not keys:
        raise UserError(
            f"{folder} has no CoOp runs over {backbone.name}{f' called {list(runs)}' if runs else ''}; "
            "`fastcoop results list` shows what it has."
        )
    (folder / FOLDER).mkdir(exist_ok=True)
    wanted = [key for key in keys if again or not (folder / FOLDER / f"{key}.json").exists()]
    chance = distance_by_chance(backbone)
    pending: list[tuple[str, torch.Tensor]] = []
    for key in wanted:
        pending.append((key, torch.from_numpy(load_contexts(folder, key))))
        if sum(c.numel() // c.shape[-1] for _, c in pending) >= VECTORS_AT_ONCE:
            _write(folder, backbone, pending, k, trained_only, chance)
            pending = []
    _write(folder, backbone, pending, k, trained_only, chance)
    return [folder / FOLDER / f"{key}.json" for key in keys]


def _write(
    folder: Path,
    backbone: Backbone,
    pending: Sequence[tuple[str, torch.Tensor]],
    k: int,
    trained_only: bool,
    chance: float,
) -> None:
    """One search for all of the runs' vectors, one file each."""
    if not pending:
        return
    flat = [contexts.flatten(0, -2) for _, contexts in pending]
    found = nearest_words(backbone, torch.cat(flat), k, trained_only)
    start = 0
    for (key, contexts), vectors in zip(pending, flat, strict=True):
        rows = range(start, start + len(vectors))
        start += len(vectors)
        names = load_predictions(folder, key).class_names if contexts.ndim == 3 else None
        stored = {
            "vectors": [
                _vector(i, contexts.shape[-2], names, found.words[row], found.distances[row].tolist())
                for i, row in enumerate(rows)
            ],
            "by_chance": chance,
        }
        path = folder / FOLDER / f"{key}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(stored), encoding="utf-8")
        os.replace(part, path)


def _vector(
    i: int, length: int, names: Sequence[str] | None, words: list[str], distances: list[float]
) -> dict[str, Any]:
    vector: dict[str, Any] = {"position": i % length + 1}
    if names is not None:
        vector["class"] = names[i // length]
    return vector | {"words": words, "distances": [float(f"{d:.5g}") for d in distances]}
