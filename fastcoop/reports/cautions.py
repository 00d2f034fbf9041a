"""What a reader of the figures could be fooled by, in sentences."""

from __future__ import annotations

import json
import math

import pandas as pd

from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    main_runs,
    main_setting,
    rows_of,
    schedule_note,
    shots_text,
    summarise,
)
from fastcoop.reports.style import look, name_of

SISTERS = [
    "backbone",
    "dataset",
    "source",
    "classes",
    "series",
    "context_length",
    "init",
    "schedule",
    "shots",
    "prompt",
]
FAR = 5.0  # percentage points below the sisters' median from which a run can count as fallen
NAMED = 8  # so many cases are named, further ones counted


def cautions(study: Study) -> list[str]:
    """One sentence per thing to be careful about, the gravest first; empty where there is none."""
    found = [*_diverged(study.runs), *_fallen(study.runs), *_no_accuracy(study.runs), *_mixed(study.runs)]
    found += [*_untested_classes(study.runs), *_few_seeds(study.runs)]
    for piece in study.slices():
        found += _spread_above_gain(piece)
    for note in dict.fromkeys(schedule_note(piece.schedule) for piece in study.slices()):
        if note:
            found.append(
                f"Trained by a {note}. The paper's is 50 to 200 epochs by shots, and ends elsewhere."
            )
    return found


def _diverged(runs: pd.DataFrame) -> list[str]:
    bad = runs[runs.status != "done"]
    if bad.empty:
        return []
    return [
        f"{_count(len(bad), 'run')} diverged (a loss was not finite) yet count in the means: {_named(bad)}."
    ]


def _fallen(runs: pd.DataFrame) -> list[str]:
    """Runs far below the other seeds of the same setting: below the median by more than `FAR` points and
    more than four times the scaled median absolute deviation."""
    fallen = []
    for _, sisters in runs.groupby(SISTERS, sort=False, dropna=False):
        if len(sisters) < 3:
            continue
        median = sisters.accuracy.median()
        deviation = 1.4826 * (sisters.accuracy - median).abs().median()
        fallen.append(sisters[sisters.accuracy < median - max(FAR, 4 * deviation)])
    low = pd.concat(fallen) if fallen else runs.iloc[:0]
    if low.empty:
        return []
    return [
        f"{_count(len(low), 'run')} far below the other seeds of its setting, yet in means: {_named(low)}."
    ]


def _no_accuracy(runs: pd.DataFrame) -> list[str]:
    bad = runs[runs.accuracy.isna()]
    return [] if bad.empty else [f"{_count(len(bad), 'run')} without an accuracy, left out: {_named(bad)}."]


def _mixed(runs: pd.DataFrame) -> list[str]:
    """Runs that no figure tells apart, because they differ only in settings such as the learning rate."""
    twice = runs[runs.duplicated([*SISTERS, "seed"], keep=False)]
    if twice.empty:
        return []
    return [
        f"{len(twice)} runs share everything that figures tell apart and differ in other settings only;"
        f" they are averaged"
        f" together: {_named(twice)}. Report them from separate results folders."
    ]


def _untested_classes(runs: pd.DataFrame) -> list[str]:
    found = []
    for dataset, frame in runs.dropna(subset=["per_class"]).groupby("dataset", sort=False):
        values = json.loads(frame.per_class.iloc[0])
        empty = sum(value is None or value != value for value in values)
        if empty:
            found.append(
                f"{dataset}: {empty} of {len(values)} classes have no test images; accuracies say nothing"
                f" about them."
            )
    return found


def _few_seeds(runs: pd.DataFrame) -> list[str]:
    learned = runs[runs.shots > 0]
    counts = learned.groupby("dataset", sort=False).seed.nunique()
    alone = list(counts.index[counts == 1])
    return (
        [f"Only one seed was run on {', '.join(alone)}: no spread, and no test over seeds."] if alone else []
    )


def _spread_above_gain(piece: Slice) -> list[str]:
    try:
        runs = main_runs(piece.runs)
        length, _ = main_setting(runs)
    except Missing:
        return []
    zero = runs[runs.series == "zero_shot"].groupby("dataset").accuracy.mean()
    means = summarise(runs[runs.method == "coop"], ["series", "dataset", "shots"])
    means["gain"] = means["mean"] - means.dataset.map(zero)
    unclear = means[means.gain.abs() < means["std"]]
    if unclear.empty:
        return []
    cases = [
        f"{name_of(row.series, length)} on {row.dataset} at {shots_text(row.shots)} ({row.gain:+.1f} ±"
        f" {row[4]:.1f})"
        for row in rows_of(unclear)
    ]
    return [
        f"{piece.short}: the spread over seeds is larger than the gain over zero-shot for {_some(cases)}."
    ]


def _named(runs: pd.DataFrame) -> str:
    cases = []
    for row in rows_of(runs):
        known = row.context_length is not None and not math.isnan(row.context_length)
        name = name_of(row.series, row.context_length) if known else look(row.series).label
        where = f"{row.dataset}, {shots_text(row.shots)} shots, seed {row.seed}"
        cases.append(f"{name} on {where} ({row.backbone}): {row.accuracy:.1f}%")
    return _some(cases)


def _some(cases: list[str]) -> str:
    more = len(cases) - NAMED
    return "; ".join(cases[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
