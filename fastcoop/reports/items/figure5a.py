"""Figure 5a: accuracy over the context length."""

from __future__ import annotations

from fastcoop.reports import chart, frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import ONE_COLUMN, add_series_legend, draw_curves, name_of, panel_figure


def make(study: Study, piece: Slice) -> list[Exhibit]:
    _, init, shots = frames.main_setting(piece.runs)
    runs = piece.runs
    runs = runs[(runs.method == "coop") & (runs.shots == shots) & (runs.init == init)]
    several = runs.groupby("series").context_length.nunique()
    runs = runs[runs.series.isin(several.index[several > 1])]
    if runs.empty:
        raise frames.Missing(
            "CoOp was run with one context length only; give the grid several (`context_length: [4, 8, 16]`)"
        )
    found, notes = frames.panels(runs, ["series", "context_length"])
    lengths = {length: f"{int(length)}" for length in sorted(runs.context_length.unique())}
    columns = {length: f"M={text}" for length, text in lengths.items()}
    title = f"Context length at {frames.in_shots(shots)} ({piece.subtitle})"
    table = frames.panel_table(title, found, notes, "context_length", columns, name_of)

    name, summary = next(iter(found.items()))
    title, xlabel = f"{name}, {frames.in_shots(shots)}", "context length M (vectors)"
    figure, (axis,) = panel_figure([title], 1, (ONE_COLUMN, 2.6), piece.subtitle, xlabel)
    drawn = {length: text for length, text in lengths.items() if length in set(summary.context_length)}
    draw_curves(axis, summary, "context_length", drawn)
    axis.set_ylabel("accuracy (%)")
    add_series_legend(figure, name_of, 2)
    shown = chart.lines(found, "context_length", lengths, xlabel, name_of)
    return [Exhibit(piece.suffix, piece.subtitle, figure, table, [shown])]


ITEM = Item(
    "figure5a",
    "Figure 5a. Context length",
    "Accuracy over the number of context vectors, averaged over datasets; the band is one standard deviation over"
    " seeds.",
    per_slice(make),
    sweep_command("fig5a"),
)
