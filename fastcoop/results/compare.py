"""Pair runs for a comparison: the same runs in two folders, or two kinds of run in one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

PLACE = ["backbone", "shots", "source", "dataset", "seed"]
# Columns in which paired runs must be equal where both have a value, and what a difference means.
MUST_AGREE = {
    "test": "tested on other images or classes of the same name",
    "images": "tested on other pictures of the same names",
    "backbone_digest": "over other weights of the same name",
    "recipe": "over features of another recipe",
    "prompts": "tested by other prompts",
}
FURTHER = ("test", "prompts", "images", "features", "key")  # columns that tell runs of equal settings apart


def pair_folders(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Pair the runs of two results tables that agree in label, settings, backbone, dataset, shots and seed.

    Returns:
        One row per pair, with the columns ``label, backbone, shots, source, dataset, seed`` and the accuracies in
        percent, ``first`` and ``second``. Runs without an accuracy are left out.

    Raises:
        UserError: there is no pair, or several runs of one table could be in a pair, or the runs of a pair differ in
            their images, prompts or weights.
    """
    columns = ["label", *PLACE, "settings"]
    pairs = _pair(_unique(first, columns), _unique(second, columns), columns, list(MUST_AGREE))
    if pairs.empty:
        raise UserError(
            "No run of one folder has the label, settings, backbone, dataset, shots and seed of a run of the other; "
            "`fastcoop results list FOLDER` shows what each has."
        )
    return pairs


def pair_labels(table: pd.DataFrame, first: str, second: str, where: str | Path) -> pd.DataFrame:
    """Pair the runs of two labels in one results table by backbone, dataset, shots and seed.

    Methods that learn nothing have no shots and seeds, and are paired with every run of the other label.

    Args:
        table: a results table.
        first, second: labels.
        where: the folder of the table, for messages.

    Returns:
        As `pair_folders`.

    Raises:
        UserError: there is no such label or no pair, several runs of one label could be in a pair, or the runs of a
            pair differ in their images or weights.
    """
    for label in (first, second):
        if label not in set(table.label):
            raise UserError(f'{where} has no runs labelled "{label}".{nearest(label, table.label)}')
    one, other = (_unique(table[table.label == label], PLACE) for label in (first, second))
    columns, draws = PLACE, ["shots", "seed"]
    if (one.shots == 0).all() or (other.shots == 0).all():
        columns = [name for name in PLACE if name not in draws]
        one, other = (
            (one.drop(columns=draws), other) if (one.shots == 0).all() else (one, other.drop(columns=draws))
        )
    pairs = _pair(one, other, columns, [name for name in MUST_AGREE if name != "prompts"])
    if pairs.empty:
        raise UserError(f'"{first}" and "{second}" have no dataset, shots and seed in common in {where}.')
    return pairs.assign(label=f"{second} - {first}")


def _unique(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return the rows with an accuracy. Raises UserError where several agree in all ``columns``."""
    table = table[table.accuracy.notna()]
    alike = table[table.duplicated(columns, keep=False)]
    if not alike.empty:
        row = alike.iloc[0]
        runs = alike[(alike[columns] == row[columns]).all(axis=1)]
        shots = f"{row.shots} shot{'s' * (str(row.shots) != '1')}"
        raise UserError(
            f"{len(runs)} runs of {row.label} on {row.dataset}, {shots}, seed {row.seed}, differ in "
            f"{_difference(runs)}, and cannot be compared as one; choose one of them with --where."
        )
    recipes = [json.loads(text).get("recipe", "current") for text in table.settings]
    return table.assign(recipe=recipes)[[*columns, "accuracy", *MUST_AGREE]]


def _pair(one: pd.DataFrame, other: pd.DataFrame, columns: list[str], agree: Sequence[str]) -> pd.DataFrame:
    pairs = one.merge(other, on=columns, suffixes=("_first", "_second"))
    for name in agree:
        first, second = pairs[f"{name}_first"], pairs[f"{name}_second"]
        differ = pairs[first.notna() & second.notna() & (first != second)]
        if not differ.empty:
            row = differ.iloc[0]
            raise UserError(
                f"{len(differ)} of {len(pairs)} pairs of runs cannot be compared, such as those on {row.dataset}, seed "
                f"{row.seed}: the second was {MUST_AGREE[name]}; choose others with --where."
            )
    return pairs.rename(columns={"accuracy_first": "first", "accuracy_second": "second"})


def _difference(runs: pd.DataFrame) -> str:
    """Name a setting or column in which runs differ, and two of its values, as ``--where`` takes them."""
    settings = [json.loads(text) for text in runs.settings]
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name) for one in settings] for name in names}
    values |= {name: runs[name].tolist() for name in FURTHER}
    name, found = next((name, found) for name, found in values.items() if len(set(map(str, found))) > 1)
    return f"{name} ({' and '.join(sorted({str(value)[:40] for value in found})[:2])})"
