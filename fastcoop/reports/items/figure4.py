"""Figure 4: CoOp's gain over the hand-written prompt on each dataset, the largest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import ON_GRID, ONE_COLUMN, fitted, look, name_of, new_figure, shortened, signed
from fastcoop.reports.table import Cell, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME_LENGTH = 28  # characters of a dataset's name beside its bar


def make(study: Study, piece: Slice) -> list[Exhibit]:
    runs = frames.main_runs(piece.runs)
    shots = frames.most_shots(runs)
    zero = runs[runs.method == "zero_shot"].groupby("dataset").accuracy.mean()
    coop = runs[(runs.series == "coop end") & (runs.shots == shots) & runs.dataset.isin(zero.index)]
    if coop.empty:
        raise frames.Missing(
            f"no dataset has both zero_shot and CoOp (class at the end) at {frames.in_shots(shots)}"
        )
    gains = frames.summarize(coop, ["dataset"])
    gains = gains.assign(end=gains["mean"], zero=gains.dataset.map(zero))
    gains["mean"] -= gains.zero
    gains = gains.sort_values("mean", ascending=False, kind="stable")
    name = name_of("coop end", frames.main_setting(runs)[0])
    title = f"{name}, {frames.in_shots(shots)}, over zero-shot CLIP"
    table = Table(f"{title} ({piece.subtitle})", ("dataset",), ("zero-shot", "CoOp", "gain"), "number")
    for row in frames.rows_of(gains.rename(columns={"mean": "gain"})):
        end, gain = Cell(row.end, row.std, row.runs), Cell(row.gain, row.std, row.runs, signed=True)
        table.add((row.dataset,), {"zero-shot": Cell(row.zero), "CoOp": end, "gain": gain})
    return [Exhibit(piece.suffix, piece.subtitle, _figure(gains, piece, title), table)]


def _figure(gains: pd.DataFrame, piece: Slice, title: str) -> Figure:
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
                  ha="left" if side > 0 else "right", fontsize=7.5, bbox=ON_GRID)  # fmt: skip
    axis.set_yticks(places, [shortened(name, NAME_LENGTH) for name in gains.dataset])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    low, high = min((gains["mean"] - spread).min(), 0.0), max((gains["mean"] + spread).max(), 0.0)
    margin = 0.3 * max(high - low, 1e-9)  # for the number beside the longest bar
    axis.set_xlim(low - margin if (gains["mean"] < 0).any() else low, high + margin)
    axis.axvline(0, color="#333333", linewidth=0.7)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("absolute gain in accuracy (percentage points)")
    axis.set_title(fitted(title, ONE_COLUMN), loc="right")
    return figure


ITEM = Item(
    "figure4",
    "Figure 4. Gains over hand-written prompts",
    "Absolute improvement of CoOp over zero-shot CLIP with the dataset's hand-written prompt, the largest first; error"
    " bars are one standard deviation over seeds.",
    per_slice(make),
    sweep_command("fig4"),
)
