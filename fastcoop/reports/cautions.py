"""Warnings of a report: in full on a list, and in a few words at the figures that they concern."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pandas as pd

from fastcoop import escape
from fastcoop.errors import abbreviate
from fastcoop.progress import counted
from fastcoop.reports import frames
from fastcoop.reports.series import GROUP_COLUMNS, other_settings, plain_dataset
from fastcoop.reports.study import Slice, Study, evaluate_targets, schedule_note
from fastcoop.reports.style import name_of
from fastcoop.results.tables import find_collapsed

MAX_NAMED = 8  # cases that a warning names; it counts the others
CURVE_COLUMNS = ["backbone", "series", "context_length", "init", "schedule", "kind", "classes"]


class Caution(NamedTuple):
    """A warning: one or two sentences, a few words for figures, and the datasets that it concerns (none: all)."""

    text: str
    short: str = ""
    datasets: Iterable[object] = ()


def cautions(study: Study) -> Iterator[Caution]:
    """Yield the warnings, the most serious first. Those on damaged files are known once the items are made."""
    runs = study.runs
    if cases := [f"{_case(row)} ({row.error})" for row in frames.rows_of(study.failed)]:
        text = f"Left out, because {'it' if len(cases) == 1 else 'they'} failed: {_some(cases)}."
        yield Caution(text, "failed runs left out", study.failed.dataset)
    if cases := [_case(row) for row in frames.rows_of(study.untested)]:
        words = ("fastcoop", "evaluate", study.folder, "--targets", evaluate_targets(study.untested))
        command = escape.shell_command(*words, *study.places)
        text = f"Left out, because they were not tested yet: {_some(cases)}. To test them, run `{command}`."
        yield Caution(text, "untested runs left out", study.untested.dataset)
    for text in study.damaged:
        yield Caution(f"Left out: {text}")
    guessing = runs[runs.accuracy <= pd.to_numeric(runs.chance, errors="coerce")]
    collapsed = find_collapsed(runs, GROUP_COLUMNS)
    for text, noun, short, rows in (
        ("The means include {} (a loss was not finite)", "diverged run", "means include diverged runs",
         runs[runs.status != "done"]),
        ("The means include {} far below the other seeds of the same setting", "run",
         "means include runs far below the other seeds", collapsed),
        ("The means include {} not better than chance", "run", "means include runs not better than chance", guessing),
        ("Left out of every figure: {} of diverged runs without an accuracy (their outputs are not finite)", "test",
         "diverged runs left out", study.diverged),
        ("Left out: {} repeated later with the same settings and seed (on features that were computed again, or with a"
         " default written out)", "run", "", study.repeated),
    ):  # fmt: skip
        if len(rows):
            count = len(rows) if noun == "test" else rows.key.nunique()
            yield Caution(f"{text.format(counted(count, noun))}: {_named(rows)}.", short, rows.dataset)
    yield from _ambiguous_datasets(runs)
    yield from _mixed_epochs(runs)
    yield from _mixed_settings(study)
    yield from _few_tests(runs)
    yield from _few_images(study)
    slices = study.slices()
    for piece in slices:
        yield from _spread_above_gain(piece)
    schedules = list(dict.fromkeys(piece.schedule for piece in slices))
    others = "The paper's schedule has 50 to 200 epochs and gives other accuracies."
    for note in filter(None, map(schedule_note, schedules)):
        yield Caution(f"Training used a {note}. {others}")  # every figure's subtitle names the schedule
    if len(schedules) > 1:
        yield Caution(f"The runs have {len(schedules)} schedules; each is averaged and judged separately.")


def _ambiguous_datasets(runs: pd.DataFrame) -> Iterator[Caution]:
    """Yield datasets of one name with different classes, images or splits."""
    names = pd.Series(runs.dataset.unique())
    for name, found in names.groupby(names.map(plain_dataset), sort=False):
        if len(found) > 1:
            yield Caution(
                f"{name} is the name of {len(found)} different sets of classes, images or splits, which are shown"
                f" separately: {' and '.join(found)}."
            )


def _mixed_epochs(runs: pd.DataFrame) -> Iterator[Caution]:
    """Yield points of curves whose seeds were trained for different numbers of epochs."""
    cases, datasets = [], []
    for _, group in runs.dropna(subset=["epochs"]).groupby(GROUP_COLUMNS, sort=False, dropna=False):
        if group.epochs.nunique() > 1:
            several = " and ".join(f"{n:g}" for n in sorted(group.epochs.unique()))
            cases.append(f"{_point(group.iloc[0])}: {several}")
            datasets.append(group.dataset.iloc[0])
    if cases:
        text = f"Runs with different numbers of epochs are averaged in {_some(cases)}."
        yield Caution(text, "averages over different numbers of epochs", datasets)


def _mixed_settings(study: Study) -> Iterator[Caution]:
    """Yield curves whose datasets or numbers of shots were run with different settings."""
    cases, datasets = [], list[object]()
    for _, group in study.runs.groupby(CURVE_COLUMNS, sort=False, dropna=False):
        given = [other_settings(row, study.known) for row in frames.rows_of(group)]
        values = {
            name: dict.fromkeys(str(one.get(name, "default")) for one in given)
            for one in given
            for name in one
        }
        if several := [f"{name} {' and '.join(found)}" for name, found in values.items() if len(found) > 1]:
            first = group.iloc[0]
            cases.append(f"{name_of(first.series, first.context_length)} ({', '.join(several)})")
            datasets += group.dataset.unique().tolist()
    if cases:
        text = f"One name has different settings on other datasets or at other shots: {_some(cases)}."
        yield Caution(text, "one name has different settings", dict.fromkeys(datasets))


def _few_tests(runs: pd.DataFrame) -> Iterator[Caution]:
    """Yield datasets with classes that have no test images."""
    for dataset, frame in runs.dropna(subset=["per_class"]).groupby("dataset", sort=False):
        values = json.loads(frame.per_class.iloc[0])
        if empty := sum(value is None or value != value for value in values):
            short = f"{empty} of {len(values)} classes have no test images"
            yield Caution(f"{dataset}: {short} and do not count in accuracies.", short, [dataset])


def _few_images(study: Study) -> Iterator[Caution]:
    """Yield datasets with few training images, and those whose few-shot subsets contain all training images."""
    runs = study.runs[study.runs.shots > 0]
    own = runs[(runs.source == runs.dataset) & (runs.shots != frames.ALL_SHOTS) & runs.train_images.notna()]
    tested = own.dropna(subset=["per_class"])
    classes = tested.per_class.map(lambda text: len(json.loads(text))).astype(float)
    lacking: dict[str, list[object]] = {}
    for dataset, frame in tested[tested.train_images < classes * tested.shots].groupby("dataset", sort=False):
        shots = ", ".join(map(frames.in_shots, sorted(frame.shots.unique())))
        lacking.setdefault(shots, []).append(dataset)
    for shots, datasets in lacking.items():
        text = f"Some classes have fewer training images than requested at {shots}: {', '.join(map(str, datasets))}."
        yield Caution(text, f"classes with too few images at {shots}", datasets)
    seeds = runs.groupby("dataset", sort=False).seed.nunique()
    if len(alone := seeds.index[seeds == 1]):
        text = f"Only one seed was run on {', '.join(alone)}: no deviation, and no test over seeds."
        yield Caution(text, "one seed, so no deviation", alone)
    whole = {name: about.get("train") for name, about in study.known.items()}
    own = own[own.train_images == pd.to_numeric(own.source.map(whole), errors="coerce")]
    seeds = own.groupby(["source", "shots"], sort=False).seed.nunique()
    if cases := [f"{source} at {frames.in_shots(shots)}" for source, shots in seeds.index[seeds > 1]]:
        text = (
            f"All seeds train on the same images, because there are no others: {_some(cases)}. Their"
            " deviation does not include the choice of training images, and is smaller than with different subsets."
        )
        most = ", ".join(dict.fromkeys(frames.in_shots(shots) for _, shots in seeds.index[seeds > 1]))
        short = f"all seeds share their images at {most}: the deviation is too small"
        yield Caution(text, short, [source for source, _ in seeds.index[seeds > 1]])


def _spread_above_gain(piece: Slice) -> Iterator[Caution]:
    try:
        runs = frames.main_runs(piece.runs)
    except frames.Missing:
        return
    length = frames.main_setting(runs).length
    zero = runs[runs.series == "zero_shot"].groupby("dataset").accuracy.mean()
    means = frames.summarize(runs[runs.method == "coop"], ["series", "dataset", "shots"])
    means["gain"] = means["mean"] - means.dataset.map(zero)
    means["context_length"] = length
    unclear = frames.rows_of(means[means.gain.abs() < means["std"]])
    if cases := [f"{_point(row)} ({row.gain:+.1f} ± {row.std:.1f})" for row in unclear]:
        text = f"the deviation over seeds exceeds the gain over zero-shot for {_some(cases)}"
        yield Caution(f"{piece.short_title}: {text}.")


def _case(row: Any) -> str:
    """Name a run of a table without series."""
    shots = frames.in_shots(float(str(row.shots).replace("all", "inf")))
    return f"{row.label} on {row.dataset} at {shots}, seed {row.seed}"


def _point(row: Any) -> str:
    """Name a point of a curve."""
    shots = f" at {frames.in_shots(row.shots)}" if row.shots else ""
    return f"{name_of(row.series, row.context_length)} on {row.dataset}{shots}"


def _named(runs: pd.DataFrame) -> str:
    cases = []
    for row in frames.rows_of(runs):
        accuracy = "" if math.isnan(row.accuracy) else f": {row.accuracy:.1f}%"
        seed = f", seed {row.seed}" if row.shots else ""
        cases.append(f"{_point(row)}{seed} ({row.backbone}){accuracy}")
    return _some(cases)


def _some(cases: list[str]) -> str:
    return abbreviate(cases, MAX_NAMED, "; ")
