"""Work with results tables: select rows, find runs that collapsed, pair runs for a comparison."""

from __future__ import annotations

import json
import logging
import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcoop.errors import UserError, nearest
from fastcoop.progress import counted
from fastcoop.results.records import DATASET_PROMPT, FEATURE_PROPERTIES
from fastcoop.results.settings import plain_settings

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("fastcoop")

CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)(.*)", re.DOTALL)
ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
# Limits of a collapsed run.
MIN_DROP = 5.0  # percentage points below the median of the seeds
MIN_RELATIVE_DROP = 0.25  # of the median's distance from chance; with few images, accuracy has large steps
MIN_DEVIATIONS = 4.0  # scaled median absolute deviations
GROUP_COLUMNS = ("backbone", "dataset", "source", "method", "settings", "shots", "test")
POINT = ["backbone", "shots", "source", "dataset"]
PLACE = [*POINT, "seed"]
# Columns in which paired runs must be equal where both have a value, and what a difference means.
MUST_AGREE = {
    "test": "tested on other images or classes of the same name",
    "images": "tested on other pictures of the same names",
    "backbone_digest": "over other weights of the same name",
    "features_made": "over features of another recipe or precision",
    "prompts": "tested by other prompts",
}
# Columns in which a run that was done twice has equal values.
SAME_TEST = ("accuracy", "macro_accuracy", "test", "images", "prompts", "backbone_digest")
BY_DATASET = ("epochs", DATASET_PROMPT, "prompt", "template")  # settings that datasets determine
FURTHER = ("test", "prompts", "images", "features", "key")  # columns that tell runs of equal settings apart


def select_rows(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return the rows of a results table that meet all conditions.

    Args:
        table: a results table.
        conditions: ``NAME=VALUE`` or ``NAME!=VALUE``, with one value or several separated by commas; or ``<``, ``<=``,
            ``>``, ``>=`` with a number. NAME is a column or a setting of the methods. A value that contains commas,
            such as a label, is also compared as a whole.

    Raises:
        UserError: a condition of another form, an unknown name, or a value that must be a number and is not.
    """
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise UserError(
                f'"{condition}" should be NAME=VALUE, such as shots=16, dataset!=dtd or accuracy<20.'
            )
        name, sign, text = match[1], match[2], match[3].strip()
        values = _column(table, name)
        if sign in ORDER:
            limit = _number(text)
            if math.isnan(limit):
                raise UserError(
                    f'"{condition}" compares with "{text}", which is not a number; give one, or use = or !=.'
                )
            selected = [ORDER[sign](_number(value), limit) for value in values]
        else:
            accepted = [text, *(piece.strip() for piece in text.split(","))]
            selected = [any(_equal(value, one) for one in accepted) == (sign == "=") for value in values]
        table = table[selected]
    return table


def _column(table: pd.DataFrame, name: str) -> list[Any]:
    """Return a column, or a setting of that name where a row has no value in the column or there is none."""
    settings = [json.loads(text) for text in table.settings] if "settings" in table else []
    known = {key for one in settings for key in one}
    if name in table:
        column = table[name].tolist()
        given = [one.get(name) for one in settings] or column
        return [
            own if value is None or value != value else value
            for value, own in zip(column, given, strict=True)
        ]
    if name not in known and len(table):
        raise UserError(f'The results have no column or setting "{name}".{nearest(name, {*table, *known})}')
    return [one.get(name) for one in settings]


def _equal(value: Any, text: str) -> bool:
    if value is None or value != value:
        return text.lower() in ("", "none")
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    return str(value) == text or (not isinstance(value, str) and _number(value) == _number(text))


def _number(value: Any) -> float:
    """Return a value as a float: NaN for other than numbers, infinity for "all" shots."""
    try:
        return math.inf if value == "all" else float(value)
    except (TypeError, ValueError):
        return math.nan


def find_collapsed(runs: pd.DataFrame, group_columns: Sequence[str] = GROUP_COLUMNS) -> pd.DataFrame:
    """Return runs whose loss is finite, but whose accuracy is far below that of the other seeds.

    Args:
        runs: a results table.
        group_columns: columns that are equal for runs that differ in their seed only.

    Returns:
        The rows below their group's median by more than each of the limits above: none of two seeds, whose deviations
        are equal.
    """
    import pandas as pd

    columns = [runs[name] for name in group_columns]
    groups = runs.groupby(list(group_columns), sort=False, dropna=False).accuracy
    median = groups.transform("median")
    deviations = (runs.accuracy - median).abs().groupby(columns, sort=False, dropna=False)
    deviation = 1.4826 * deviations.transform("median")
    relative = MIN_RELATIVE_DROP * (median - pd.to_numeric(runs.chance, errors="coerce").fillna(0.0))
    limit = np.maximum(np.maximum(MIN_DEVIATIONS * deviation, relative), MIN_DROP)
    return runs[runs.accuracy < median - limit]


def plain_texts(runs: pd.DataFrame) -> list[str]:
    """Return the settings of runs as texts, equal where settings mean the same (see `plain_settings`)."""
    return [json.dumps(plain_settings(run), sort_keys=True) for run in runs.itertuples(index=False)]


def pair_folders(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Pair the runs of two results tables that agree in method, settings, backbone, dataset, shots and seed.

    Returns:
        One row per pair, with the columns ``label`` (of the first, with the settings in which runs of one label
        differ), ``backbone, shots, source, dataset, seed`` and the accuracies in percent, ``first`` and ``second``.
        Runs without an accuracy are left out.

    Raises:
        UserError: there is no pair, or several runs of one table could be in a pair, or the runs of a pair differ in
            their images, prompts or weights.
    """
    columns = ["method", *PLACE, "plain"]
    pairs = _pair(_unique(first, columns), _unique(second, columns), columns, list(MUST_AGREE))
    if pairs.empty:
        raise UserError(
            "No run of one folder has the method, settings, backbone, dataset, shots and seed of a run of the other; "
            "`fastcoop results list FOLDER` shows what each has."
        )
    return pairs.assign(label=_labels_by_settings(pairs))


def pair_labels(table: pd.DataFrame, first: str, second: str, where: str | Path) -> pd.DataFrame:
    """Pair the runs of two labels in one results table by backbone, dataset, shots and seed.

    Methods that learn nothing have no source, shots and seeds, and are paired with every run of the other label.

    Args:
        table: a results table.
        first, second: labels.
        where: the folder of the table, for messages.

    Returns:
        As `pair_folders`, which raises the same errors; so do seeds of one label that differ in their settings.
    """
    sides, columns = [], PLACE
    for label in (first, second):
        if label not in set(table.label):
            raise UserError(f'{where} has no runs labelled "{label}".{nearest(label, table.label)}')
        side = _unique(table[table.label == label], PLACE)
        if columns is PLACE and (side.shots == 0).all():
            columns = ["backbone", "dataset"]
            side = _by_dataset(side, label, columns)
        sides.append(side)
    pairs = _pair(sides[0], sides[1], columns, [name for name in MUST_AGREE if name != "prompts"])
    if pairs.empty:
        raise UserError(f'"{first}" and "{second}" have no dataset, shots and seed in common in {where}.')
    return pairs.assign(label=f"{second} - {first}")


def _warn_of_mixed_settings(table: pd.DataFrame) -> None:
    """Warn of settings in which the runs of one label differ, except those that datasets and shots determine."""
    settings = [json.loads(text) for text in table.plain]
    values = {
        name: sorted({str(one.get(name, "default")) for one in settings})
        for name in dict.fromkeys(name for one in settings for name in one if name not in BY_DATASET)
    }
    for name, found in (values | {"schedule": sorted(set(table.schedule.dropna()))}).items():
        if len(found) > 1:
            log.warning(
                f"Runs of {table.label.iloc[0]} have {name} {' and '.join(found[:2])}, on different datasets or at "
                f"different shots; choose one with --where."
            )


def _by_dataset(side: pd.DataFrame, label: str, columns: list[str]) -> pd.DataFrame:
    """Return one row per backbone and dataset. Raises UserError where runs of several sources have other accuracies."""
    side = side.drop_duplicates([*columns, "accuracy"])
    differ = side[side.duplicated(columns, keep=False)]
    if not differ.empty:
        row = differ.iloc[0]
        alike = differ[(differ[columns] == row[columns]).all(axis=1)]
        found = " and ".join(f"{one:.2f}%" for one in alike.accuracy)
        raise UserError(
            f"Runs of {label} from several sources have different accuracies on {row.dataset} ({found}), and cannot be "
            f"compared as one; choose one of them with --where, such as source={row.source}."
        )
    return side.drop(columns=["source", "shots", "seed"])


def _unique(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return the rows with an accuracy, and warn of diverged runs. Raises UserError where several agree in ``columns``.

    Of a run that was done twice, such as with a default left out and written out, there is one row.
    """
    diverged = table.accuracy[table.status != "done"]
    if len(diverged):
        tests, averaged = counted(len(diverged), "test"), diverged.notna().sum()
        log.warning(
            f"{tests} of diverged runs (a loss was not finite): {averaged} in the means, "
            f"{len(diverged) - averaged} left out, without an accuracy; --where status=done leaves out all."
        )
    table = table[table.accuracy.notna()]
    table = table.assign(plain=plain_texts(table)).drop_duplicates(["method", *PLACE, "plain", *SAME_TEST])
    alike, several = columns, table.duplicated(columns, keep=False)
    if "plain" not in columns and not several.any():  # nor may the seeds of one point have different settings
        alike, several = POINT, table.groupby(POINT, sort=False).plain.transform("nunique") > 1
    if several.any():
        row = table[several].iloc[0]
        runs = table[several & (table[alike] == row[alike]).all(axis=1)]
        raise UserError(
            f"{len(runs)} runs of {row.label} on {row.dataset}, {counted(row.shots, 'shot')}, differ in "
            f"{_difference(runs)}, and cannot be compared as one; choose one of them with --where."
        )
    if "plain" not in columns:
        _warn_of_mixed_settings(table)
    settings = [json.loads(text) for text in table.settings]
    made = [str([one.get(name) for name in FEATURE_PROPERTIES if name != "views"]) for one in settings]
    return table.assign(features_made=made)[[*columns, "label", "accuracy", *MUST_AGREE]]


def _pair(one: pd.DataFrame, other: pd.DataFrame, columns: list[str], agree: Sequence[str]) -> pd.DataFrame:
    """Return the pairs of rows that agree in ``columns``, and warn of rows without a partner."""
    pairs = one.merge(other, on=columns, suffixes=("_first", "_second"))
    found = pairs[columns].drop_duplicates()
    alone = [len(side) - len(side.merge(found, on=columns)) for side in (one, other)]
    if len(pairs) and any(alone):
        log.warning(
            f"Left out: {alone[0]} of {len(one)} tests of the first and {alone[1]} of {len(other)} of the second, "
            "which the other does not have."
        )
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


def _labels_by_settings(pairs: pd.DataFrame) -> list[str]:
    """Return the labels of pairs, with the settings in which runs of one label differ that agree but for the seed."""
    settings = [json.loads(text) for text in pairs.plain]
    differ: dict[str, dict[str, None]] = {}  # names of settings, by label
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    for label, *point, given in zip(
        pairs.label_first, *(pairs[name] for name in POINT), settings, strict=True
    ):
        other = points.setdefault((label, *point), given)
        names = (name for name in {**other, **given} if given.get(name) != other.get(name))
        differ.setdefault(label, {}).update(dict.fromkeys(names))
    return [
        ", ".join([label, *(f"{name} {given.get(name, 'default')}" for name in differ[label])])
        for label, given in zip(pairs.label_first, settings, strict=True)
    ]


def _difference(runs: pd.DataFrame) -> str:
    """Name a setting or column in which runs differ, and two of its values, as ``--where`` takes them."""
    settings = [json.loads(text) for text in runs.plain]
    names = [
        name for one in settings for name in one if any(other.get(name) != one[name] for other in settings)
    ]
    values = {name: _column(runs, name) for name in (*names, *FURTHER)}
    name, found = next((name, found) for name, found in values.items() if len(set(map(str, found))) > 1)
    return f"{name} ({' and '.join(sorted({str(value)[:40] for value in found})[:2])})"
