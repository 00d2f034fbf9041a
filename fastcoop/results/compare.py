"""Two sets of results side by side: the same runs in two folders, or two kinds of run in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

GROUP = ("label", "backbone", "shots")  # within which differences are averaged
PLACE = ("source", "dataset", "seed")
SAME_RUN = ("settings", "test", "prompts")  # what tells runs apart that are alike by all of these
# What two runs that are compared must have in common, where it is known of both, and how one says that they have not.
SHARED = {
    "test": "tested on other images or classes of the same name",
    "images": "tested on other pictures of the same names",
    "backbone_digest": "over other weights of the same name",
    "recipe": "over features of another recipe",
}


def pair_folders(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Runs of two results tables that are alike by label, settings, backbone, dataset, shots and seed.

    A row each, with the columns ``label, backbone, shots, source, dataset, seed, first, second`` (accuracies in
    percent). Runs without an accuracy are left out.

    Raises:
        UserError: the tables have no such run in common, or several in one that differ in their dataset's images or
            prompt only, or two that are alike are of other images, prompts or weights.
    """
    on = [*GROUP, *PLACE, "settings"]
    one, other = (_one_each(table, on) for table in (first, second))
    pairs = one.merge(other, on=on, suffixes=("_first", "_second"))
    _refuse_unlike(pairs, SHARED | {"prompts": "tested by other prompts"})
    if pairs.empty:
        raise UserError(
            "The two hold no runs that are alike by label, settings, backbone, dataset, shots and seed; `fastcoop "
            "results list FOLDER` shows what each has."
        )
    return pairs.rename(columns={"accuracy_first": "first", "accuracy_second": "second"})


def pair_labels(table: pd.DataFrame, first: str, second: str, where: str | Path) -> pd.DataFrame:
    """The same for two labels within one table, matched by backbone, dataset, shots and seed.

    What learns nothing, and so has no shots and seeds, is matched with every run of the other.

    Raises:
        UserError: there is no such label (with the nearest one), they have no dataset, shots and seed in common, or
            runs of one label differ in more than these, or two that are matched are of other images or weights.
    """
    for label in (first, second):
        if label not in set(table.label):
            raise UserError(f'{where} has no runs labelled "{label}".{nearest(label, table.label)}')
    on = [name for name in (*GROUP, *PLACE) if name != "label"]
    one, other = (_one_each(table[table.label == label], on) for label in (first, second))
    if (one.shots == 0).all() or (other.shots == 0).all():
        draws = ["shots", "seed"]
        on = [name for name in on if name not in draws]
        if (one.shots == 0).all():
            one = one.drop(columns=draws)
        else:
            other = other.drop(columns=draws)
    pairs = one.merge(other, on=on, suffixes=("_first", "_second"))
    if pairs.empty:
        raise UserError(f'"{first}" and "{second}" have no dataset, shots and seed in common in {where}.')
    _refuse_unlike(pairs, SHARED)
    pairs = pairs.rename(columns={"accuracy_first": "first", "accuracy_second": "second"})
    return pairs.assign(label=f"{second} - {first}")


def _one_each(table: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """The table's accuracies by the columns ``on``, which tell all of its runs apart; raises UserError otherwise."""
    table = table[table.accuracy.notna()]
    alike = table[table.duplicated(on, keep=False)]
    if not alike.empty:
        row = alike.iloc[0]
        runs = alike[(alike[on] == row[on]).all(axis=1)]
        draw = f"{row.shots} shot{'s' * (str(row.shots) != '1')}, seed {row.seed}"
        raise UserError(
            f"{len(runs)} runs of {row.label} on {row.dataset}, {draw}, differ in {_difference(runs)}, and cannot be "
            "compared as one; choose one of them with --where."
        )
    recipes = [json.loads(text).get("recipe", "current") for text in table.settings]
    return table.assign(recipe=recipes)[[*on, "accuracy", *SHARED, "prompts"]]


def _refuse_unlike(pairs: pd.DataFrame, shared: Mapping[str, str]) -> None:
    """Raise UserError for a pair of runs that differ in what they must have in common."""
    for name, how in shared.items():
        first, second = pairs[f"{name}_first"], pairs[f"{name}_second"]
        differ = pairs[first.notna() & second.notna() & (first != second)]
        if not differ.empty:
            row = differ.iloc[0]
            raise UserError(
                f"{len(differ)} of {len(pairs)} pairs of runs cannot be compared, such as those on {row.dataset}, seed "
                f"{row.seed}: the second was {how}; choose others with --where."
            )


def _difference(runs: pd.DataFrame) -> str:
    """In which columns or settings runs differ, in words that ``--where`` takes."""
    settings = [json.loads(text) for text in runs.settings]
    names = dict.fromkeys(name for one in settings for name in one)
    found = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    found += [
        name for name in (*SAME_RUN[1:], "images", "features", "key") if runs[name].nunique(dropna=False) > 1
    ]
    shown = found[0]
    values = [one.get(shown) for one in settings] if shown in names else runs[shown].tolist()
    return f"{shown} ({' and '.join(sorted({str(value)[:40] for value in values})[:2])})"
