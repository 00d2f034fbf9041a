"""From the runs of a grid, bound to what they name, to its distinct runs with their keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from fastcoop.errors import UserError
from fastcoop.grids.keys import RunKeys
from fastcoop.methods import METHODS, RunSpec
from fastcoop.methods.text import check_texts

log = logging.getLogger("fastcoop")


def plan_runs(runs: Iterable[RunSpec[Any]]) -> list[RunSpec[Any]]:
    """Return every distinct run with its key, method by method, then dataset by dataset.

    Runs of the same key are one run, such as those of equal epochs given as a number and as "paper".

    Raises:
        UserError: A run cannot be done.
    """
    keys = RunKeys()
    planned: dict[str, RunSpec[Any]] = {}
    for run in runs:
        _refuse_tower(run)
        METHODS[run.method].check(run)
        run = replace(run, key=keys.of(run))
        known = planned.setdefault(run.key, run)
        for kind, same in (("backbone", "weights"), ("dataset", "images and class names")):
            if (first := getattr(known, kind)) != (second := getattr(run, kind)):
                raise UserError(
                    f"The {kind}s {first} and {second} have the same {same}, so their runs would be the same; use "
                    "one of them."
                )
        if known is not run:  # it has the targets of both
            planned[run.key] = known.with_targets(tuple(dict.fromkeys((*known.targets, *run.targets))))
    check_texts(planned.values())
    return list(planned.values())


def _refuse_tower(run: RunSpec) -> None:
    """Refuse a run whose method cannot compute prompts with the backbone's text tower."""
    method, (path, reason) = METHODS[run.method], run.model.prompt_path
    if path != "shared" and (
        method.needs_causal_tower or (path is None and method.layout(run.settings, run.model, run.data))
    ):
        raise UserError(
            f'The method "{run.method}" cannot run on the backbone {run.model.name}: {reason}. Leave out the method '
            "there, or use a backbone such as RN50 or ViT-B-16; zero-shot, ensembles and probes run on every backbone."
        )


def log_notes(planned: Sequence[RunSpec]) -> None:
    """Log what the methods note of their runs."""
    for method in dict.fromkeys(run.method for run in planned):
        runs = [run for run in planned if run.method == method]
        for sentence in METHODS[method].notes(runs):
            log.warning(sentence)
