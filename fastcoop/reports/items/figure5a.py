"""Figure 5a: accuracy over the context length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import ONE_COLUMN, add_legend, draw_curve, fitted, look, new_figure, rank
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make(study: Study, piece: Slice) -> list[Exhibit]:
    shots, (_, init) = frames.most_shots(piece.runs), frames.main_setting(piece.runs)
    runs = piece.runs
    runs = runs[(runs.method == "coop") & (runs.shots == shots) & (runs.init.fillna("random") == init)]
    several = runs.groupby("series").context_length.nunique()
    runs = runs[runs.series.isin(several.index[several > 1])]
    if runs.empty:
        raise frames.Missing(
            "CoOp was run with one context length only; give the grid several (`context_length: [4, 8, 16]`)"
        )
    found, notes = frames.panels(runs, ["series", "context_length"])
    columns = {length: f"M={int(length)}" for length in sorted(runs.context_length.unique())}
    title = f"Context length at {frames.in_shots(shots)} ({piece.subtitle})"
    table = Table(title, ("dataset", "method"), tuple(columns.values()), "context length", notes=notes)
    for name, summary in found.items():
        for series in sorted(set(summary.series), key=rank):
            cells = {
                column: frames.cell_of(summary, series=series, context_length=length)
                for length, column in columns.items()
            }
            table.add((name, look(series).label), cells)
    table.mark_best()
    return [Exhibit(piece.suffix, piece.subtitle, _figure(*next(iter(found.items())), piece, shots), table)]


def _figure(name: str, summary: pd.DataFrame, piece: Slice, shots: float) -> Figure:
    figure = new_figure(ONE_COLUMN, 2.6, piece.subtitle)
    axis = figure.subplots()
    lengths = sorted(summary.context_length.unique())
    for series in sorted(set(summary.series), key=rank):
        points = summary[summary.series == series].sort_values("context_length")
        x = [lengths.index(length) for length in points.context_length]
        draw_curve(axis, x, points, series, label=look(series).label)
    axis.set_xticks(range(len(lengths)), [f"{int(length)}" for length in lengths])
    axis.set_xlim(-0.3, len(lengths) - 0.7)
    axis.set_xlabel("context length M (vectors)")
    axis.set_ylabel("accuracy (%)")
    axis.set_title(fitted(f"{name}, {frames.in_shots(shots)}", ONE_COLUMN - 0.5))
    axis.grid(visible=False, axis="x")
    add_legend(figure, *axis.get_legend_handles_labels(), 2, handlelength=2.8)
    return figure


ITEM = Item(
    "figure5a",
    "Figure 5a. Context length",
    "Accuracy over the number of context vectors, averaged over datasets; the band is one standard deviation over"
    " seeds.",
    per_slice(make),
    sweep_command("fig5a"),
)
