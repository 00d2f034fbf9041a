"""Runs that differ in more than their seed are told apart: by the names of their datasets and series.

Only runs that are alike in everything but their seed, and the images it drew, may be averaged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fastcoop.results.records import DATASET_PROMPT

SHOWN = 8  # characters of a digest in a name
# Settings that figures tell apart by columns of their own, or that are of no matter between runs of one series.
TOLD = {
    "context_length", "class_position", "class_specific", "init", "epochs", "prompt", "templates", DATASET_PROMPT,
}  # fmt: skip
# Runs that are alike in these are averaged over seeds.
GROUP = [
    "backbone", "dataset", "source", "classes", "method", "series", "context_length", "init", "schedule", "shots",
    "prompt",
]  # fmt: skip


def tell_datasets_apart(runs: pd.DataFrame, known: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Give datasets of one name that differ in their classes, splits or images names of their own.

    The one that ``known`` (datasets.json) describes keeps its name, else the one tested last; the others get the
    beginning of a digest: ``photos (3f2a91bc)``, and halves of it ``photos (3f2a91bc):base``.
    """
    images = runs.images.fillna(
        runs.groupby(["dataset", "test"]).images.transform("last")
    )  # unknown in version 1
    which = images.fillna(runs.test)
    renamed: dict[tuple[str, str], str] = {}
    for dataset, frame in runs.dropna(subset=["test"]).groupby("dataset", sort=False):
        digests = which[frame.index]
        if digests.nunique() > 1:
            current = frame.test == known.get(str(dataset), {}).get("digest")
            kept = digests[current if current.any() else frame.index].iloc[-1]
            name, colon, half = str(dataset).partition(":")
            renamed |= {
                (str(dataset), digest): f"{name} ({digest[:SHOWN]}){colon}{half}"
                for digest in digests.unique()
                if digest != kept
            }
    if not renamed:
        return runs
    names = [renamed.get(pair, pair[0]) for pair in zip(runs.dataset, which, strict=True)]
    own = runs.source == runs.dataset
    sources = dict(zip(runs.key[own], pd.Series(names, runs.index)[own], strict=True))
    return runs.assign(
        source=[sources.get(key, source) for key, source in zip(runs.key, runs.source, strict=True)],
        dataset=names,
    )


def tell_backbones_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """Give backbones of one name and several weights names of their own: that of the latest run keeps its name, the
    others get the beginning of a digest, ``RN50 (3f2a91bc)``."""
    latest = runs.groupby("backbone").backbone_digest.transform("last")
    other = runs.backbone_digest.notna() & (runs.backbone_digest != latest)
    renamed = runs.backbone + " (" + runs.backbone_digest.fillna("").str[:SHOWN] + ")"
    return runs.assign(backbone=runs.backbone.where(~other, renamed))


def plain_dataset(name: str) -> str:
    """The name of a dataset before `tell_datasets_apart`."""
    return re.sub(rf" \([0-9a-f]{{{SHOWN}}}\)(?=$|:)", "", name)


def tell_settings_apart(
    runs: pd.DataFrame, settings: Sequence[dict[str, Any]], known: Mapping[str, dict[str, Any]]
) -> list[str]:
    """The series of each run: with what is unusual in its settings, where runs of one series would be averaged though
    they differ in these.

    Of several settings the method's defaults keep the series' plain name, else those that most runs have; the others
    are series of their own, such as ``coop end (learning_rate 0.01)``.
    """
    rows = zip(runs.itertuples(), settings, strict=True)
    facts = pd.Series(
        [json.dumps(_untold(row, given, known), sort_keys=True) for row, given in rows], runs.index
    )
    series = runs.series.copy()
    for method, frame in runs.groupby("method", sort=False):
        own = facts[frame.index]
        if own.groupby([frame[name] for name in GROUP], dropna=False).nunique().max() > 1:
            usual = _usual(str(method), own)
            differences = [_difference(json.loads(text), usual) for text in own]
            series[frame.index] = [
                f"{name} ({what})" if what else name
                for name, what in zip(frame.series, differences, strict=True)
            ]
    return series.tolist()


def latest_of_each(runs: pd.DataFrame) -> pd.Series:
    """Whether each run is the last, as they were finished, of those that are alike in all that tells runs apart and in
    their seed: the same work done twice, over features that were computed again."""
    return ~runs.duplicated([*GROUP, "seed"], keep="last")


def _untold(row: Any, given: Mapping[str, Any], known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings of a run that no column of a figure tells, and its dataset's own prompt where it is not the one that
    ``known`` has."""
    untold = {name: value for name, value in given.items() if name not in TOLD}
    prompt, current = given.get(DATASET_PROMPT), known.get(row.source, {}).get("prompt")
    is_known = prompt is not None and current is not None
    if row.method != "zero_shot" and is_known and str(prompt).replace("{}", "[CLASS]") != current:
        untold["prompt"] = prompt
    return untold


def _usual(method: str, facts: pd.Series) -> dict[str, Any]:
    """Of the settings that runs of a method have, the defaults; else those of most runs."""
    from fastcoop.methods import METHODS

    counts = facts.value_counts()
    most = min(counts.index, key=lambda text: (-counts[text], text))
    defaults: dict[str, Any] = {}
    if method in METHODS:
        fields = METHODS[method].Settings.model_fields.items()
        defaults = {name: one.default for name, one in fields if name not in TOLD}
    every = [json.loads(text) for text in counts.index]
    return defaults if defaults in every else json.loads(most)


def _difference(given: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    names = [name for name in {**usual, **given} if given.get(name) != usual.get(name)]
    return ", ".join(f"{name} {given.get(name)}" for name in names)
