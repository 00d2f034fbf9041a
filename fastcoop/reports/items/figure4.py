"""Figure 4: what CoOp gains over the hand-written prompt, dataset by dataset, the largest gain first."""

from __future__ import annotations

import pandas as pd

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    in_shots,
    main_runs,
    main_setting,
    most_shots,
    per_slice,
    rows_of,
    summarise,
)
from fastcoop.reports.style import ONE_COLUMN, OVER_GRID, fitted, look, name_of, new_figure, shortened, signed
from fastcoop.reports.table import Cell, Table

NAME_LENGTH = 28  # characters of a dataset's name beside its bar


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def _parts(piece: Slice) -> list[Part]:
    runs = main_runs(piece.runs)
    shots = most_shots(runs)
    zero = runs[runs.method == "zero_shot"].groupby("dataset").accuracy.mean()
    coop = runs[(runs.series == "coop end") & (runs.shots == shots) & runs.dataset.isin(zero.index)]
    if coop.empty:
        raise Missing(f"no dataset has both zero_shot and CoOp (class at the end) at {in_shots(shots)}")
    gains = summarise(coop, ["dataset"])
    gains["mean"] -= gains.dataset.map(zero)
    gains = gains.sort_values("mean", ascending=False, kind="stable")
    name = name_of("coop end", main_setting(runs)[0])
    title = f"{name}, {in_shots(shots)}, over zero-shot CLIP"
    return [
        Part(
            piece.suffix,
            piece.subtitle,
            _figure(gains, piece, title),
            _table(gains, coop, zero, piece, title),
        )
    ]


def _figure(gains: pd.DataFrame, piece: Slice, title: str):  # type: ignore[no-untyped-def]
    figure = new_figure(ONE_COLUMN, 0.24 * len(gains) + 1.0, piece.subtitle)
    axis = figure.subplots()
    places = range(len(gains))
    spread = gains["std"].fillna(0.0)
    axis.barh(places, gains["mean"], 0.62, color=look("coop end").color)
    axis.errorbar(gains["mean"], places, xerr=spread, fmt="none", color="#333333", linewidth=0.9, capsize=1.5)
    reach = max((gains["mean"].abs() + spread).max(), 1e-9)
    for place, mean, std in zip(places, gains["mean"], spread, strict=True):
        side = 1 if mean >= 0 else -1
        axis.text(mean + side * (std + 0.02 * reach), place, signed(mean), va="center",
                  ha="left" if side > 0 else "right", fontsize=7.5, bbox=OVER_GRID)  # fmt: skip
    axis.set_yticks(places, [shortened(name, NAME_LENGTH) for name in gains.dataset])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    low, high = min((gains["mean"] - spread).min(), 0.0), max((gains["mean"] + spread).max(), 0.0)
    room = 0.3 * max(high - low, 1e-9)  # for a number beyond the longest bar
    axis.set_xlim(low - room if (gains["mean"] < 0).any() else low, high + room)
    axis.axvline(0, color="#333333", linewidth=0.7)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("absolute gain in accuracy (percentage points)")
    axis.set_title(fitted(title, ONE_COLUMN), loc="right")
    return figure


def _table(gains: pd.DataFrame, coop: pd.DataFrame, zero: pd.Series, piece: Slice, title: str) -> Table:
    table = Table(f"{title} ({piece.subtitle})", ("dataset",), ("zero-shot", "CoOp", "gain"), "number")
    ends = summarise(coop, ["dataset"]).set_index("dataset")
    for row in rows_of(gains):
        end = ends.loc[row.dataset]
        table.add((row.dataset,), {
            "zero-shot": Cell(float(zero[row.dataset])),
            "CoOp": Cell(float(end["mean"]), float(end["std"]), int(end["runs"])),
            "gain": Cell(float(row[1]), float(row[2]), int(row[3]), signed=True),
        })  # fmt: skip
    return table


ITEM = Item(
    "figure4",
    "Figure 4. Gains over hand-written prompts",
    "Absolute improvement of CoOp over zero-shot CLIP with the dataset's hand-written prompt, ranked; the"
    " whisker is one"
    " standard deviation over seeds.",
    make,
    sweep_of("fig4"),
)
