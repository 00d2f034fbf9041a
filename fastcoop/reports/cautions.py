"""What a reader of the figures could be fooled by, in sentences."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from fastcoop import escape
from fastcoop.reports.apart import plain_dataset
from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    in_shots,
    main_runs,
    main_setting,
    read_datasets,
    rows_of,
    schedule_note,
    shots_text,
    summarise,
    targets_of,
)
from fastcoop.reports.style import look, name_of
from fastcoop.results.collapsed import find_collapsed

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
NAMED = 8  # so many cases are named, further ones counted


def cautions(study: Study) -> list[str]:
    """One sentence per thing to be careful about, the gravest first; empty where there is none."""
    runs = study.runs
    found = [*_failed(study.failed), *_untested(study), *_diverged(runs), *_fallen(runs), *_at_chance(runs)]
    found += [*_lost(study.lost), *_other_tests(runs), *_repeated(study.repeated), *_mixed_epochs(runs)]
    found += [*_untested_classes(runs), *_too_few_images(runs), *_few_seeds(runs)]
    found += _same_images(study)
    for piece in study.slices():
        found += _spread_above_gain(piece)
    schedules = list(dict.fromkeys(piece.schedule for piece in study.slices()))
    for note in filter(None, map(schedule_note, schedules)):
        found.append(f"Trained by a {note}. The paper's is 50 to 200 epochs by shots, and ends elsewhere.")
    if len(schedules) > 1:
        found.append(f"There are runs of {len(schedules)} schedules: each is drawn and judged apart.")
    return found


def _failed(failed: pd.DataFrame) -> list[str]:
    if failed.empty:
        return []
    cases = [
        f"{row.label} on {row.dataset}, {row.shots} shot{'s' * (str(row.shots) != '1')}, seed {row.seed} ({row.error})"
        for row in rows_of(failed)
    ]
    return [f"Left out, because {'it' if len(failed) == 1 else 'they'} failed: {_some(cases)}."]


def _untested(study: Study) -> list[str]:
    runs = study.untested
    if runs.empty:
        return []
    cases = [
        f"{row.label} on {row.dataset}, {row.shots} shot{'s' * (str(row.shots) != '1')}, seed {row.seed}"
        for row in rows_of(runs)
    ]
    places = [word for option in study.places for word in option]
    words = [study.folder, "--targets", targets_of(runs), *places]
    command = escape.shell_command("fastcoop", "evaluate", *words)
    return [f"Left out, because they were tested on nothing yet: {_some(cases)}. `{command}` tests them."]


def _diverged(runs: pd.DataFrame) -> list[str]:
    bad = runs[runs.status != "done"]
    if bad.empty:
        return []
    return [
        f"{_count(len(bad), 'run')} diverged (a loss was not finite) yet count in the means: {_named(bad)}."
    ]


def _fallen(runs: pd.DataFrame) -> list[str]:
    """Runs that collapsed quietly beside the other seeds of their setting."""
    low = find_collapsed(runs, SISTERS)
    if low.empty:
        return []
    return [
        f"{_count(len(low), 'run')} far below the other seeds of the same setting, yet in means: {_named(low)}."
    ]


def _lost(lost: pd.DataFrame) -> list[str]:
    if lost.empty:
        return []
    return [
        f"{_count(len(lost), 'test')} of runs that diverged have no accuracy (outputs that are not finite) and are left"
        f" out of every figure: {_named(lost)}."
    ]


def _at_chance(runs: pd.DataFrame) -> list[str]:
    low = runs[runs.accuracy <= pd.to_numeric(runs.chance, errors="coerce")]
    return [] if low.empty else [f"{_count(len(low), 'run')} no better than guessing: {_named(low)}."]


def _other_tests(runs: pd.DataFrame) -> list[str]:
    """Datasets of one name of which runs saw different classes, images or splits."""
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(runs.dataset):
        names.setdefault(plain_dataset(name), []).append(name)
    return [
        f"{name} stands for {len(found)} different sets of classes, images or splits, which are shown apart:"
        f" {' and '.join(found)}."
        for name, found in names.items()
        if len(found) > 1
    ]


def _repeated(repeated: pd.DataFrame) -> list[str]:
    if repeated.empty:
        return []
    return [
        f"{_count(len(repeated), 'run')} left out, done again later with the same settings and seed over features that"
        f" were computed again: {_named(repeated)}."
    ]


def _mixed_epochs(runs: pd.DataFrame) -> list[str]:
    """Points of a curve whose seeds were trained for different numbers of epochs."""
    epochs = runs.dropna(subset=["epochs"]).groupby(SISTERS, sort=False, dropna=False).epochs
    cases = []
    for key, group in epochs:
        where: dict[str, Any] = dict(zip(SISTERS, key, strict=True))
        if group.nunique() > 1:
            name = name_of(where["series"], where["context_length"])
            several = " and ".join(f"{n:g}" for n in sorted(group.unique()))
            cases.append(f"{name} on {where['dataset']} at {in_shots(where['shots'])}: {several}")
    return [f"Runs of different numbers of epochs are averaged in {_some(cases)}."] if cases else []


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


def _too_few_images(runs: pd.DataFrame) -> list[str]:
    """Datasets with classes of fewer training images than the shots that a figure draws."""
    own = runs[(runs.source == runs.dataset) & (runs.shots > 0) & ~runs.shots.isin([float("inf")])]
    own = own.dropna(subset=["per_class", "train_images"])
    classes = pd.Series([len(json.loads(text)) for text in own.per_class], own.index, dtype=float)
    asked = classes * own.shots
    found = []
    for dataset, frame in own[own.train_images < asked].groupby("dataset", sort=False):
        shots = ", ".join(map(in_shots, sorted(frame.shots.unique())))
        found.append(f"{dataset} has classes with fewer training images than asked, at {shots}.")
    return found


def _few_seeds(runs: pd.DataFrame) -> list[str]:
    learned = runs[runs.shots > 0]
    counts = learned.groupby("dataset", sort=False).seed.nunique()
    alone = list(counts.index[counts == 1])
    return (
        [f"Only one seed was run on {', '.join(alone)}: no spread, and no test over seeds."] if alone else []
    )


def _same_images(study: Study) -> list[str]:
    """Datasets whose few-shot subsets at some number of shots are all the training images there are."""
    own = study.runs[(study.runs.shots > 0) & ~study.runs.shots.isin([float("inf")])]
    whole = {name: about.get("train") for name, about in read_datasets(study.folder).items()}
    own = own[own.train_images == pd.to_numeric(own.source.map(whole), errors="coerce")]
    seeds = own.groupby(["source", "shots"], sort=False).seed.nunique()
    cases = [f"{source} at {in_shots(shots)}" for source, shots in seeds.index[seeds > 1]]
    if not cases:
        return []
    return [
        f"Every seed learned from the same images, since there are no others: {_some(cases)}. The spread there is"
        " that of training and of validation images alone: less than other few images would give."
    ]


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
        where = f"{row.dataset}, {in_shots(row.shots)}, seed {row.seed}"
        accuracy = "" if math.isnan(row.accuracy) else f": {row.accuracy:.1f}%"
        cases.append(f"{name} on {where} ({row.backbone}){accuracy}")
    return _some(cases)


def _some(cases: list[str]) -> str:
    more = len(cases) - NAMED
    return "; ".join(cases[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
