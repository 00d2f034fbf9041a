"""Give runs that differ in more than their seed different names of datasets, backbones or series.

Only runs that are equal in everything but their seed, and the images it selects, may be averaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from fastcoop.results.records import DATASET_PROMPT
from fastcoop.results.settings import plain_settings

DIGEST_LENGTH = 8  # characters of a digest in a name
ON_TEST = "selection official"  # in the name of a series: its values were chosen on test labels
# Settings for which a run's column of the same name stands, where it has one: series and figures read that.
COLUMN_SETTINGS = ("context_length", "class_position", "class_specific", "init")
# Runs with equal values in these columns are averaged over seeds.
GROUP_COLUMNS = [
    "backbone", "dataset", "source", "classes", "method", "series", "context_length", "init", "schedule", "shots",
    "prompt",
]  # fmt: skip
Known = Mapping[str, Mapping[str, Any]]  # the content of datasets.json


def rename_datasets(runs: pd.DataFrame, known: Known) -> pd.DataFrame:
    """Give datasets with one name that differ in their classes, splits or images names of their own.

    The one that ``known`` describes keeps its name, else the one tested last. The others get the beginning of a digest:
    ``photos (3f2a91bc)``, and halves of them ``photos (3f2a91bc):base``.
    """
    # Databases of version 1 have no digest of the images.
    images = runs.images.fillna(runs.groupby(["dataset", "test"]).images.transform("last"))
    digest = images.fillna(runs.test)
    names = runs.dataset.copy()
    for dataset, frame in runs.dropna(subset=["test"]).groupby("dataset", sort=False):
        current = frame.test == known.get(str(dataset), {}).get("digest")
        kept = digest[frame.index[current] if current.any() else frame.index].iloc[-1]
        name, colon, half = str(dataset).partition(":")
        for row in frame.index[digest[frame.index] != kept]:
            names[row] = f"{name} ({digest[row][:DIGEST_LENGTH]}){colon}{half}"
    own = runs.source == runs.dataset
    sources = dict(zip(runs.key[own], names[own], strict=True))
    origins = [sources.get(key, source) for key, source in zip(runs.key, runs.source, strict=True)]
    return runs.assign(dataset=names, source=origins)


def rename_backbones(runs: pd.DataFrame) -> pd.DataFrame:
    """Give backbones with one name and different weights names of their own, such as ``RN50 (3f2a91bc)``.

    That of the latest run keeps its name.
    """
    latest = runs.groupby("backbone").backbone_digest.transform("last")
    other = runs.backbone_digest.notna() & (runs.backbone_digest != latest)
    renamed = runs.backbone + " (" + runs.backbone_digest.fillna("").str[:DIGEST_LENGTH] + ")"
    return runs.assign(backbone=runs.backbone.where(~other, renamed))


def plain_dataset(name: str) -> str:
    """Return the name of a dataset before `rename_datasets`."""
    return re.sub(rf" \([0-9a-f]{{{DIGEST_LENGTH}}}\)(?=$|:)", "", name)


def rename_series(runs: pd.DataFrame, known: Known) -> list[str]:
    """Return the series of each run, with its unusual settings where runs of one series differ in these.

    The most frequent settings of a method by one schedule keep the series' plain name; of equally frequent ones, those
    with the shortest label and the fewest recorded settings (defaults are in neither), then the first in alphabetical
    order. Others get series of their own, such as ``coop end (learning_rate 0.01)``. Those of another schedule are not
    compared: a setting may have no effect there. What was chosen on test labels is named even where all runs were.
    """
    others = [other_settings(run, known) for run in runs.itertuples(index=False)]
    facts = pd.Series([json.dumps(one, sort_keys=True) for one in others], runs.index)
    series = runs.series.copy()
    for _, frame in runs.groupby(["method", "schedule"], sort=False):
        own = facts[frame.index]
        if own.groupby([frame[name] for name in GROUP_COLUMNS], dropna=False).nunique().max() > 1:
            shown = _shown(own, frame.settings)
            counts, lengths = own.value_counts(), frame.label.astype(str).str.len().groupby(own).min()
            order = {text: (-counts[text], lengths[text], len(shown[text]), text) for text in own.unique()}
            usual = shown[min(order, key=order.__getitem__)]
            names = zip(frame.series, own, strict=True)
            series[frame.index] = [_with_settings(name, shown[text], usual) for name, text in names]
    if "selection" in runs:
        on_test = runs["selection"] == "official"
        series[on_test] = series[on_test].map(_on_test)
    return series.tolist()


def _on_test(series: str) -> str:
    if ON_TEST in series:
        return series
    return f"{series[:-1]}, {ON_TEST})" if series.endswith(")") else f"{series} ({ON_TEST})"


def _shown(facts: pd.Series, settings: pd.Series) -> dict[str, dict[str, Any]]:
    """Return the settings that name a series, by the JSON of all: those that every run of the series was given.

    A value that some run of the series did not name is its default.
    """
    found: dict[str, dict[str, Any]] = {text: json.loads(text) for text in facts.unique()}
    short = dict(found)
    for text, given in zip(facts, settings, strict=True):
        short[text] = {name: one for name, one in short[text].items() if given.get(name, one) is not None}
    is_clear = len({json.dumps(one) for one in short.values()}) == len(short)
    return short if is_clear else found


def plain_schedules(runs: pd.DataFrame) -> pd.Series:
    """Return the schedule of each run: "paper" also where all its epochs, given as a number, are the paper's.

    The paper's epochs are those of other runs of the method on the same dataset at the same number of shots.
    """
    paper = runs[runs.schedule == "paper"].groupby(["method", "source", "shots"]).epochs.agg(set).to_dict()
    schedules = runs.schedule.copy()
    groups: Any = runs.groupby(["method", "schedule"], sort=False)
    for (method, schedule), frame in groups:
        if re.fullmatch(r"quick: \d+ epochs", schedule) and all(
            schedule == f"quick: {run.epochs:g} epochs"
            and paper.get((method, run.source, run.shots)) == {run.epochs}
            for run in frame.itertuples()
        ):
            schedules[frame.index] = "paper"
    return schedules


def latest_of_each(runs: pd.DataFrame) -> pd.Series:
    """Return whether each run is the last one finished among runs with equal settings and seed.

    Earlier ones were repeated because their features were computed again, or a default was written out.
    """
    return ~runs.duplicated([*GROUP_COLUMNS, "seed"], keep="last")


def equal_prompts(one: str | None, other: str | None) -> bool:
    """Return whether two prompts are known and equal. The class is ``{}`` or ``[CLASS]``."""
    return bool(one and other) and str(one).replace("{}", "[CLASS]") == str(other).replace("{}", "[CLASS]")


def other_settings(run: Any, known: Known) -> dict[str, Any]:
    """Return the settings of a run that no column stands for, and its dataset's prompt if it is not the recorded one.

    They are equal for runs whose settings are written differently but mean the same (see `plain_settings`).
    """
    shown = {name for name in COLUMN_SETTINGS if run.context_length and not pd.isna(getattr(run, name))}
    shown |= {"epochs", "schedule"} if run.schedule else set()
    shown |= {"prompt"} if run.method == "zero_shot" or "class_position" in shown else set()
    shown |= {"templates"} if run.method == "ensemble" else set()  # in the name of the series
    other = {name: one for name, one in plain_settings(run).items() if name not in {*shown, DATASET_PROMPT}}
    prompt, current = run.settings.get(DATASET_PROMPT), known.get(run.source, {}).get("prompt")
    if equal_prompts(other.get("template"), current):
        del other["template"]  # the dataset's prompt, which is the default
    if run.method != "zero_shot" and prompt and current and not equal_prompts(prompt, current):
        other["prompt"] = prompt
    return other


def _with_settings(series: str, given: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    names = [name for name in {**usual, **given} if given.get(name) != usual.get(name)]
    values = ", ".join(f"{name} {given.get(name, 'default')}" for name in names)
    return f"{series} ({values})" if names else series
