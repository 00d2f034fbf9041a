"""Two sets of results side by side: the same runs in two folders, or two kinds of run in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

GROUP = ("label", "backbone", "shots")  # within which differences are averaged
PLACE = ("source", "dataset", "seed")


def pair_folders(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Runs of two results tables that are alike by label, backbone, dataset, shots and seed: a row each, with the
    columns ``label, backbone, shots, source, dataset, seed, first, second`` (accuracies in percent).

    Several of one table that are alike by these (they differ in a setting that no label names) count as their mean.

    Raises:
        UserError: the tables have no such run in common.
    """
    pairs = _mean(first).merge(_mean(second), on=[*GROUP, *PLACE], suffixes=("_first", "_second"))
    if pairs.empty:
        raise UserError(
            "The two hold no runs that are alike by label, backbone, dataset, shots and seed; `fastcoop results list` "
            "shows what each has."
        )
    return pairs.rename(columns={"accuracy_first": "first", "accuracy_second": "second"})


def pair_labels(table: pd.DataFrame, first: str, second: str, where: str | Path) -> pd.DataFrame:
    """The same for two labels within one table, matched by backbone, dataset, shots and seed.

    What learns nothing, and so has no shots and seeds, is matched with every run of the other.

    Raises:
        UserError: there is no such label (with the nearest one), or they have no dataset, shots and seed in common.
    """
    for label in (first, second):
        if label not in set(table.label):
            raise UserError(f'{where} has no runs labelled "{label}".{nearest(label, table.label)}')
    one, other = (_mean(table[table.label == label]).drop(columns="label") for label in (first, second))
    on = [name for name in (*GROUP, *PLACE) if name != "label"]
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
    pairs = pairs.rename(columns={"accuracy_first": "first", "accuracy_second": "second"})
    return pairs.assign(label=f"{second} - {first}")


def _mean(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby([*GROUP, *PLACE], sort=False, as_index=False)[["accuracy"]].mean()
