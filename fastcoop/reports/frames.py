"""Select and summarize rows of a table of runs (a pandas data frame with one row per run and test)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fastcoop.reports.style import AVERAGE, name_of, rank
from fastcoop.reports.table import Cell, Cells, Table

ALL_SHOTS = math.inf  # "all" training images as a number
SHIFT, TRANSFER = "shift", "transfer"  # tests on another dataset: of the same classes, of other classes
Panels = dict[str, pd.DataFrame]  # summaries by the average's or a dataset's name


class Missing(Exception):
    """Raised if the results lack what an item needs; the message says what to add to the grid."""


class Setting(NamedTuple):
    """The context length, initialization and number of shots at which CoOp is compared with other methods."""

    length: float
    init: str
    shots: float


def main_setting(runs: pd.DataFrame) -> Setting:
    """Return the paper's setting (16, "random", 16), else the most frequent ones and the largest number of shots."""
    coop = runs[runs.method == "coop"]
    if coop.empty:
        raise Missing("there is no run of coop; add the method to the grid")
    init = "random" if (coop.init == "random").any() else str(coop.init.mode()[0])
    lengths = coop.context_length[coop.init == init]
    length = 16.0 if (lengths == 16).any() else float(lengths.mode()[0])
    return Setting(length, init, 16.0 if (coop.shots == 16).any() else float(coop.shots.max()))


def main_runs(runs: pd.DataFrame, setting: Setting | None = None) -> pd.DataFrame:
    """Return CoOp's runs of ``setting``, one zero-shot prompt per dataset, and the runs of other methods.

    The setting is by default the `main_setting` of these runs. Of another method that was run with several context
    lengths or initializations, these are of CoOp's if it has them, else of the most frequent.
    """
    length, init, _ = setting or main_setting(runs)
    is_main = (runs.context_length == length) & (runs.init == init)
    for _, own in runs[(runs.context_length > 0) & (runs.method != "coop")].groupby("method", sort=False):
        if not is_main[own.index].any():
            most = own.value_counts(["context_length", "init"]).index[0]
            is_main[own.index] = (own.context_length == most[0]) & (own.init == most[1])
    return own_prompt(runs[is_main | (runs.context_length == 0)])


def own_prompt(runs: pd.DataFrame) -> pd.DataFrame:
    """Keep one zero-shot prompt per dataset: its own (``prompt`` None), else the first by its label."""
    zero = runs[runs.method == "zero_shot"]
    first = zero.sort_values("prompt", key=lambda prompts: prompts.notna(), kind="stable")
    chosen = first.drop_duplicates("dataset").set_index("dataset").prompt.fillna("")
    return runs[(runs.method != "zero_shot") | (runs.prompt.fillna("") == runs.dataset.map(chosen))]


def moved_shots(moved: pd.DataFrame) -> float:
    """Return the number of shots at which tests on other datasets or classes are compared."""
    return main_setting(moved).shots if (moved.method == "coop").any() else float(moved.shots.max())


def tested_elsewhere(everything: pd.DataFrame, kind: str) -> dict[str, tuple[list[str], pd.DataFrame]]:
    """Return {source: (targets, runs)} of tests on other datasets, of `SHIFT` or `TRANSFER`, at their number of shots.

    The runs are tests on the source and its targets: zero-shot CLIP, and every series, context length and
    initialization that was tested on a target.
    """
    frame = own_prompt(everything[(everything.classes == "all") & everything.kind.isin(("own", kind))])
    moved = frame[(frame.kind == kind) & (frame.shots > 0)]
    found = {}
    for source, away in moved.groupby("source", sort=False):
        targets = [str(name) for name in away.dataset.unique()]
        here = frame[frame.dataset.isin([source, *targets])]
        zero = here[here.method == "zero_shot"].drop_duplicates("dataset")
        learned = here[(here.source == source) & (here.shots == moved_shots(moved))]
        groups = [learned.series, learned.context_length, learned.init]
        on_target = learned.dataset.isin(targets).groupby(groups).transform("any")
        found[str(source)] = targets, pd.concat([zero, learned[on_target]])
    return found


def halves(everything: pd.DataFrame) -> pd.DataFrame:
    """Return accuracies on the classes of the training images (``base``) and on the others (``new``), NaN if untested.

    There is one row per dataset (``family``), series, context length, initialization and seed, zero-shot CLIP included.
    Raises Missing if nothing was tested on both halves.
    """
    frame = everything[everything.classes != "all"]
    frame = frame.assign(family=frame.dataset.str.rsplit(":", n=1).str[0])
    frame = own_prompt(frame[(frame.source == frame.family + ":base") | (frame.shots == 0)])
    if (frame.shots > 0).any():
        frame = frame[frame.shots.isin((0.0, moved_shots(frame[frame.shots > 0])))]
    keys = ["family", "series", "context_length", "init", "shots", "seed"]
    wide = frame.pivot_table(index=keys, columns="classes", values="accuracy", sort=False)
    for name in ("key", "method", "label", "class_specific"):
        wide[name] = frame.groupby(keys, sort=False)[name].first()
    whole = wide.dropna(subset=["base", "new"]) if {"base", "new"} <= set(wide.columns) else wide[:0]
    if not (whole.index.get_level_values("shots") > 0).any():
        trained = "the first half of the classes (NAME:base)"
        raise Missing(f"no run learned on {trained} was tested on both halves")
    return wide.reset_index()


def summarize(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return each group's mean accuracy, standard deviation over seeds (NaN for one run), runs and seeds."""
    grouped = runs.dropna(subset=["accuracy"]).groupby(list(by), sort=False, dropna=False)
    found = grouped.accuracy.agg(mean="mean", std="std", runs="count")
    return found.assign(seeds=grouped.seed.nunique()).reset_index()


def average(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """As `summarize`, of the mean over datasets; the deviation is over the seeds that every dataset has."""
    rows = []
    for key, group in runs.dropna(subset=["accuracy"]).groupby(list(by), sort=False, dropna=False):
        table = group.pivot_table(index="seed", columns="dataset", values="accuracy", aggfunc="mean")
        seeds = table.dropna().mean(axis=1)
        rows.append((*key, table.mean().mean(), seeds.std(), len(group), len(seeds)))
    return pd.DataFrame(rows, columns=[*by, "mean", "std", "runs", "seeds"])


def panels(runs: pd.DataFrame, by: Sequence[str]) -> tuple[Panels, list[str]]:
    """Return ({name: summary}, notes): the average over datasets first, then each dataset.

    There is no average of fewer than two datasets. Those that lack a group of ``by`` are left out of it, with a note.
    """
    found = {str(name): summarize(frame, by) for name, frame in runs.groupby("dataset", sort=False)}
    if len(found) < 2:
        return found, []
    whole = averaged_datasets(runs, by)
    if len(whole) > 1:
        averages = average(runs[runs.dataset.isin(whole)], by)
        found = {f"{AVERAGE} over {len(whole)} datasets": averages, **found}
    return found, left_out_note(name for name in found if name in set(runs.dataset) - set(whole))


def averaged_datasets(runs: pd.DataFrame, by: Sequence[str]) -> list[str]:
    """Return the datasets that have every group of ``by``."""
    counts = runs.drop_duplicates([*by, "dataset"]).groupby("dataset", sort=False).size()
    return [str(name) for name in counts.index[counts == len(runs.drop_duplicates(list(by)))]]


def panel_table(
    title: str,
    found: Panels,
    notes: list[str],
    over: str,
    columns: Mapping[Any, str],
    name: Callable[[str], str],
) -> Table:
    """Return a table with a row per panel and series; ``columns`` are titles by value of the summaries' ``over``."""
    table = Table(title, ("dataset", "method"), tuple(columns.values()), over.replace("_", " "), notes=notes)
    for dataset, summary in found.items():
        for series in sorted(set(summary.series), key=rank):
            table.add((dataset, name(series)), cells_of(summary, over, columns, series=series))
    table.mark_best()
    return table


def left_out_note(datasets: Iterable[str]) -> list[str]:
    """Return the note of an average that leaves out datasets; none where it leaves out none."""
    names = ", ".join(datasets)
    return [f"The average leaves out {names}, where some of the compared runs are missing."] * bool(names)


class Kind(NamedTuple):
    """Runs of one series, context length (0 for methods without contexts) and initialization."""

    series: str
    length: float
    init: str
    runs: pd.DataFrame
    has_others: bool = False  # whether its series was also run with other context lengths

    @property
    def name(self) -> str:
        """The name in tables."""
        name = name_of(self.series, self.length)
        name += f", M={int(self.length)}" if self.has_others and "M=" not in name else ""
        return name + ("" if self.init == "random" else f", from “{self.init}”")


def kinds(runs: pd.DataFrame) -> list[Kind]:
    """Return the kinds of runs in the order of tables, the longest context first."""
    groups: Any = runs.groupby(["series", "context_length", "init"], sort=False)
    lengths = runs.groupby("series").context_length.nunique()
    found = [
        Kind(series, length, init, frame, lengths[series] > 1) for (series, length, init), frame in groups
    ]
    return sorted(found, key=lambda kind: (rank(kind.series), -kind.length))


def cell_of(summary: pd.DataFrame, **where: object) -> Cell | str:
    """Return the Cell of the one row of a summary whose columns equal ``where``; empty if there is none."""
    for name, value in where.items():
        summary = summary[summary[name] == value]
    if summary.empty:
        return ""
    row = summary.iloc[0]
    return Cell(float(row["mean"]), float(row["std"]), int(row["runs"]))


def cells_of(summary: pd.DataFrame, over: str, columns: Mapping[Any, str], **where: object) -> Cells:
    """Return a row of a table. ``columns`` maps values of the summary's column ``over`` to the table's columns."""
    return {title: cell_of(summary, **{over: value}, **where) for value, title in columns.items()}


def mean_cell(runs: pd.DataFrame, datasets: Sequence[str]) -> Cell | str:
    """Return the mean over ``datasets`` of their means, as `average`; empty if one has no run."""
    away = runs[runs.dataset.isin(datasets)]
    if away.dataset.nunique() != len(datasets):
        return ""
    (row,) = rows_of(average(away.assign(all=0), ["all"]))
    return Cell(float(row.mean), float(row.std), int(row.seeds or row.runs))


def shots_text(shots: float) -> str:
    """Return ``"16"``, or ``"all"``."""
    return "all" if shots == ALL_SHOTS else f"{int(shots)}"


def in_shots(shots: float) -> str:
    """Return ``"16 shots"``, ``"1 shot"``, or ``"all shots"``."""
    return "1 shot" if shots == 1 else f"{shots_text(shots)} shots"


def rows_of(frame: pd.DataFrame) -> Iterator[Any]:
    """Return the rows of a table as named tuples (the types of pandas do not allow their values to be used)."""
    return iter(frame.itertuples(index=False))
