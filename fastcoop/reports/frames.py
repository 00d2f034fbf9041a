"""Select and summarize rows of a table of runs (a pandas data frame with one row per run and test)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fastcoop.reports.style import name_of, rank
from fastcoop.reports.table import Cell

AVERAGE = "Average"
ALL_SHOTS = math.inf  # "all" training images as a number
SHIFT, TRANSFER = "shift", "transfer"  # tests on another dataset: of the same classes, of other classes


class Missing(Exception):
    """Raised if the results lack what an item needs; the message says what to add to the grid."""


def main_setting(runs: pd.DataFrame) -> tuple[float, str]:
    """Return the (context length, init) that stands for CoOp: the paper's 16 and "random", else the most frequent."""
    coop = runs[runs.method == "coop"]
    if coop.empty:
        raise Missing("there is no run of coop; add the method to the grid")
    inits = coop.init.fillna("random")
    init = "random" if (inits == "random").any() else str(inits.mode()[0])
    lengths = coop.context_length[inits == init]
    return (16.0 if (lengths == 16).any() else float(lengths.mode()[0])), init


def main_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return CoOp's runs of the main setting, one zero-shot prompt per dataset, and all runs of other methods."""
    length, init = main_setting(runs)
    is_main = (runs.context_length == length) & (runs.init.fillna("random") == init)
    return own_prompt(runs[(runs.method != "coop") | is_main])


def own_prompt(runs: pd.DataFrame) -> pd.DataFrame:
    """Keep one zero-shot prompt per dataset: its own (``prompt`` None), else the first that was run."""
    zero = runs[runs.method == "zero_shot"]
    first = zero.sort_values("prompt", key=lambda prompts: prompts.notna(), kind="stable")
    chosen = first.drop_duplicates("dataset").set_index("dataset").prompt.fillna("")
    return runs[(runs.method != "zero_shot") | (runs.prompt.fillna("") == runs.dataset.map(chosen))]


def most_shots(runs: pd.DataFrame) -> float:
    """Return the number of shots at which final results are compared: the paper's 16, else CoOp's largest."""
    shots = runs.shots[runs.method == "coop"]
    if shots.empty:
        raise Missing("there is no run of coop; add the method to the grid")
    return 16.0 if (shots == 16).any() else float(shots.max())


def moved_shots(moved: pd.DataFrame) -> float:
    """Return the number of shots at which tests on other datasets are compared."""
    return most_shots(moved) if (moved.method == "coop").any() else float(moved.shots.max())


def summarize(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return each group's mean accuracy, standard deviation over seeds (NaN for one run) and number of runs."""
    grouped = runs.dropna(subset=["accuracy"]).groupby(list(by), sort=False, dropna=False).accuracy
    return grouped.agg(mean="mean", std="std", runs="count").reset_index()


def average(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """As `summarize`, of the mean over datasets; the deviation is over the seeds that every dataset has."""
    rows = []
    for key, group in runs.dropna(subset=["accuracy"]).groupby(list(by), sort=False, dropna=False):
        table = group.pivot_table(index="seed", columns="dataset", values="accuracy", aggfunc="mean")
        seeds = table.dropna().mean(axis=1)
        std = seeds.std() if len(seeds) > 1 else np.nan
        rows.append((*(key if isinstance(key, tuple) else (key,)), table.mean().mean(), std, len(group)))
    return pd.DataFrame(rows, columns=[*by, "mean", "std", "runs"])


def complete(runs: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs of the datasets that have every group of ``by``, and the names of the other datasets."""
    counts = runs.drop_duplicates([*by, "dataset"]).groupby("dataset", sort=False).size()
    groups = len(runs.drop_duplicates(list(by)))
    whole = [name for name in counts.index if counts[name] == groups]
    return runs[runs.dataset.isin(whole)], [name for name in counts.index if name not in whole]


def panels(runs: pd.DataFrame, by: Sequence[str]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return ({name: summary}, notes): the average over datasets first, then each dataset.

    With one dataset there is no average. Datasets that lack a group of ``by`` are left out of it, with a note.
    """
    found = {str(name): summarize(frame, by) for name, frame in runs.groupby("dataset", sort=False)}
    whole, others = complete(runs, by)
    if len(found) < 2:
        return found, []
    if not whole.empty:
        found = {f"{AVERAGE} over {whole.dataset.nunique()} datasets": average(whole, by), **found}
    return found, left_out_note(others)


def left_out_note(datasets: Sequence[str]) -> list[str]:
    """Return the note of an average that leaves out datasets; none where it leaves out none."""
    return [
        f"The average leaves out {', '.join(datasets)}, where some of the compared runs are missing."
    ] * bool(datasets)


class Kind(NamedTuple):
    """Runs of one series, context length (0 for methods without contexts) and initialization."""

    series: str
    length: float
    init: str
    runs: pd.DataFrame

    @property
    def name(self) -> str:
        """The name in tables."""
        return name_of(self.series, self.length) + ("" if self.init == "random" else f", from “{self.init}”")


def kinds(runs: pd.DataFrame) -> list[Kind]:
    """Return the kinds of runs in the order of tables, the longest context first."""
    runs = runs.assign(length=runs.context_length.fillna(0.0), init=runs.init.fillna("random"))
    groups: Any = runs.groupby(["series", "length", "init"], sort=False)
    found = [Kind(series, length, init, frame) for (series, length, init), frame in groups]
    return sorted(found, key=lambda kind: (rank(kind.series), -kind.length))


def cell_of(summary: pd.DataFrame, **where: object) -> Cell | str:
    """Return the Cell of the one row of a summary whose columns equal ``where``; empty if there is none."""
    for name, value in where.items():
        summary = summary[summary[name] == value]
    if summary.empty:
        return ""
    row = summary.iloc[0]
    return Cell(float(row["mean"]), float(row["std"]), int(row["runs"]))


def cells_by_dataset(runs: pd.DataFrame, columns: dict[str, str]) -> dict[str, Cell | str]:
    """Return a row of cells, ``columns`` being {column: dataset}."""
    summary = summarize(runs, ["dataset"])
    return {column: cell_of(summary, dataset=dataset) for column, dataset in columns.items()}


def mean_cell(runs: pd.DataFrame, datasets: Sequence[str]) -> Cell | str:
    """Return the mean over ``datasets`` with its deviation over the seeds that all have; empty if one has none."""
    away = runs[runs.dataset.isin(datasets)]
    wide = away.pivot_table(index="seed", columns="dataset", values="accuracy").dropna()
    if wide.empty or wide.shape[1] != len(datasets):
        return ""
    seeds = wide.mean(axis=1)
    return Cell(float(seeds.mean()), float(seeds.std()), len(seeds))


def shots_text(shots: float) -> str:
    """Return ``"16"``, or ``"all"``."""
    return "all" if shots == ALL_SHOTS else f"{int(shots)}"


def in_shots(shots: float) -> str:
    """Return ``"16 shots"``, ``"1 shot"``, or ``"all shots"``."""
    return "1 shot" if shots == 1 else f"{shots_text(shots)} shots"


def rows_of(frame: pd.DataFrame) -> Iterator[Any]:
    """Return the rows of a table as named tuples (the types of pandas do not allow their values to be used)."""
    return iter(frame.itertuples(index=False))
