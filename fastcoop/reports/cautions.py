"""Warnings printed at the top of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pandas as pd

from fastcoop import escape
from fastcoop.reports.frames import (
    ALL_SHOTS,
    Missing,
    in_shots,
    main_runs,
    main_setting,
    rows_of,
    shots_text,
    summarize,
)
from fastcoop.reports.series import GROUP_COLUMNS, plain_dataset
from fastcoop.reports.study import Slice, Study, evaluate_targets, schedule_note
from fastcoop.reports.style import name_of
from fastcoop.results.tables import find_collapsed

MAX_NAMED = 8  # cases that a warning names; it counts the others


def cautions(study: Study) -> list[str]:
    """Return one sentence per warning, the most serious first."""
    return list(_cautions(study))


def _cautions(study: Study) -> Iterator[str]:
    runs = study.runs
    if len(study.failed):
        cases = [f"{_case(row)} ({row.error})" for row in rows_of(study.failed)]
        yield f"Left out, because {'it' if len(cases) == 1 else 'they'} failed: {_some(cases)}."
    if len(study.untested):
        yield _untested(study)
    if len(bad := runs[runs.status != "done"]):
        yield f"{_count(bad)} diverged (a loss was not finite) but counted in the means: {_named(bad)}."
    if len(low := find_collapsed(runs, GROUP_COLUMNS)):
        yield f"{_count(low)} far below the other seeds of the same setting, but in the means: {_named(low)}."
    if len(low := runs[runs.accuracy <= pd.to_numeric(runs.chance, errors="coerce")]):
        yield f"{_count(low)} not better than chance: {_named(low)}."
    if len(bad := study.diverged):
        yield (
            f"Left out of every figure: {_count(bad, 'test')} of diverged runs without an accuracy (their outputs are"
            f" not finite): {_named(bad)}."
        )
    yield from _ambiguous_datasets(runs)
    if len(study.repeated):
        yield (
            f"Left out: {_count(study.repeated)} repeated later with the same settings and seed on features that were"
            f" computed again: {_named(study.repeated)}."
        )
    yield from _mixed_epochs(runs)
    yield from _classes_without_tests(runs)
    yield from _too_few_images(runs)
    yield from _few_seeds(runs)
    yield from _equal_images(study)
    slices = study.slices()
    for piece in slices:
        yield from _spread_above_gain(piece)
    schedules = list(dict.fromkeys(piece.schedule for piece in slices))
    for note in filter(None, map(schedule_note, schedules)):
        yield (
            f"Training used a {note}. The paper's schedule has 50 to 200 epochs and gives other accuracies."
        )
    if len(schedules) > 1:
        yield f"The runs have {len(schedules)} schedules; each is drawn and judged separately."


def _untested(study: Study) -> str:
    places = [word for option in study.places for word in option]
    words = [study.folder, "--targets", evaluate_targets(study.untested), *places]
    command = escape.shell_command("fastcoop", "evaluate", *words)
    cases = [_case(row) for row in rows_of(study.untested)]
    return f"Left out, because they were not tested yet: {_some(cases)}. To test them, run `{command}`."


def _ambiguous_datasets(runs: pd.DataFrame) -> Iterator[str]:
    """Yield datasets of one name with different classes, images or splits."""
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(runs.dataset):
        names.setdefault(plain_dataset(name), []).append(name)
    for name, found in names.items():
        if len(found) > 1:
            yield (
                f"{name} is the name of {len(found)} different sets of classes, images or splits, which are shown"
                f" separately: {' and '.join(found)}."
            )


def _mixed_epochs(runs: pd.DataFrame) -> Iterator[str]:
    """Yield points of curves whose seeds were trained for different numbers of epochs."""
    cases = []
    for _, group in runs.dropna(subset=["epochs"]).groupby(GROUP_COLUMNS, sort=False, dropna=False):
        if group.epochs.nunique() > 1:
            row = group.iloc[0]
            several = " and ".join(f"{n:g}" for n in sorted(group.epochs.unique()))
            name = name_of(row.series, row.context_length)
            cases.append(f"{name} on {row.dataset} at {in_shots(row.shots)}: {several}")
    if cases:
        yield f"Runs with different numbers of epochs are averaged in {_some(cases)}."


def _classes_without_tests(runs: pd.DataFrame) -> Iterator[str]:
    for dataset, frame in runs.dropna(subset=["per_class"]).groupby("dataset", sort=False):
        values = json.loads(frame.per_class.iloc[0])
        if empty := sum(value is None or value != value for value in values):
            yield f"{dataset}: {empty} of {len(values)} classes have no test images and do not count in accuracies."


def _few_shot(runs: pd.DataFrame) -> pd.DataFrame:
    own = runs[(runs.source == runs.dataset) & (runs.shots > 0) & (runs.shots != ALL_SHOTS)]
    return own.dropna(subset=["train_images"])


def _too_few_images(runs: pd.DataFrame) -> Iterator[str]:
    own = _few_shot(runs).dropna(subset=["per_class"])
    classes = pd.Series([len(json.loads(text)) for text in own.per_class], own.index, dtype=float)
    for dataset, frame in own[own.train_images < classes * own.shots].groupby("dataset", sort=False):
        shots = ", ".join(map(in_shots, sorted(frame.shots.unique())))
        yield f"{dataset} has classes with fewer training images than requested, at {shots}."


def _few_seeds(runs: pd.DataFrame) -> Iterator[str]:
    counts = runs[runs.shots > 0].groupby("dataset", sort=False).seed.nunique()
    if len(alone := counts.index[counts == 1]):
        yield f"Only one seed was run on {', '.join(alone)}: no deviation, and no test over seeds."


def _equal_images(study: Study) -> Iterator[str]:
    """Yield datasets whose few-shot subsets contain all training images."""
    own = _few_shot(study.runs)
    whole = {name: about.get("train") for name, about in study.known.items()}
    own = own[own.train_images == pd.to_numeric(own.source.map(whole), errors="coerce")]
    seeds = own.groupby(["source", "shots"], sort=False).seed.nunique()
    if cases := [f"{source} at {in_shots(shots)}" for source, shots in seeds.index[seeds > 1]]:
        yield (
            f"All seeds train on the same images, because there are no others: {_some(cases)}. The deviation there is"
            " that of training and validation images only, and smaller than with other subsets."
        )


def _spread_above_gain(piece: Slice) -> Iterator[str]:
    try:
        runs = main_runs(piece.runs)
    except Missing:
        return
    length, _ = main_setting(runs)
    zero = runs[runs.series == "zero_shot"].groupby("dataset").accuracy.mean()
    means = summarize(runs[runs.method == "coop"], ["series", "dataset", "shots"])
    means["gain"] = means["mean"] - means.dataset.map(zero)
    unclear = means[means.gain.abs() < means["std"]]
    cases = [
        f"{name_of(row.series, length)} on {row.dataset} at {shots_text(row.shots)} ({row.gain:+.1f} ± {row.std:.1f})"
        for row in rows_of(unclear)
    ]
    if cases:
        yield f"{piece.short_title}: the deviation over seeds exceeds the gain over zero-shot for {_some(cases)}."


def _case(row) -> str:  # type: ignore[no-untyped-def]
    """Name a run of a table without series."""
    return f"{row.label} on {row.dataset}, {row.shots} shot{'s' * (str(row.shots) != '1')}, seed {row.seed}"


def _named(runs: pd.DataFrame) -> str:
    cases = []
    for row in rows_of(runs):
        length = 0.0 if row.context_length is None or math.isnan(row.context_length) else row.context_length
        where = f"{row.dataset}, {in_shots(row.shots)}, seed {row.seed}"
        accuracy = "" if math.isnan(row.accuracy) else f": {row.accuracy:.1f}%"
        cases.append(f"{name_of(row.series, length)} on {where} ({row.backbone}){accuracy}")
    return _some(cases)


def _some(cases: list[str]) -> str:
    more = len(cases) - MAX_NAMED
    return "; ".join(cases[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _count(rows: pd.DataFrame, what: str = "run") -> str:
    return f"{len(rows)} {what}{'' if len(rows) == 1 else 's'}"
