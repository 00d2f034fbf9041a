"""Figure 5a: accuracy over the context length."""

from __future__ import annotations

import pandas as pd

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    in_shots,
    main_setting,
    most_shots,
    panels,
    per_slice,
)
from fastcoop.reports.style import ONE_COLUMN, add_legend, fitted, look, new_figure, rank
from fastcoop.reports.table import Cell, Table, cell_of


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def _parts(piece: Slice) -> list[Part]:
    shots = most_shots(piece.runs)
    _, init = main_setting(piece.runs)
    runs = piece.runs
    runs = runs[(runs.method == "coop") & (runs.shots == shots) & (runs.init.fillna("random") == init)]
    several = runs.groupby("series").context_length.nunique()
    runs = runs[runs.series.isin(several.index[several > 1])]
    if runs.empty:
        raise Missing(
            "CoOp was run with one context length only; give the grid several (`context_length: [4, 8, 16]`)"
        )
    found, notes = panels(runs, ["series", "context_length"])
    return [
        Part(piece.suffix, piece.subtitle, _figure(found, piece, shots), _table(found, notes, piece, shots))
    ]


def _figure(found: dict[str, pd.DataFrame], piece: Slice, shots: float):  # type: ignore[no-untyped-def]
    name, summary = next(iter(found.items()))
    figure = new_figure(ONE_COLUMN, 2.6, piece.subtitle)
    axis = figure.subplots()
    lengths = sorted(summary.context_length.unique())
    for series in sorted(set(summary.series), key=rank):
        style, points = look(series), summary[summary.series == series].sort_values("context_length")
        x = [lengths.index(length) for length in points.context_length]
        mean, std = points["mean"], points["std"].fillna(0.0)
        axis.fill_between(x, mean - std, mean + std, color=style.color, alpha=0.16, linewidth=0)
        axis.plot(
            x, mean, style.line, marker=style.marker, color=style.color, label=style.label,
            zorder=4 - style.weight / 2, linewidth=1.2 * style.weight, markersize=3.8 * style.weight,
        )  # fmt: skip
    axis.set_xticks(range(len(lengths)), [f"{int(length)}" for length in lengths])
    axis.set_xlim(-0.3, len(lengths) - 0.7)
    axis.set_xlabel("context length M (vectors)")
    axis.set_ylabel("accuracy (%)")
    axis.set_title(fitted(f"{name}, {in_shots(shots)}", ONE_COLUMN - 0.5))
    axis.grid(visible=False, axis="x")
    add_legend(figure, *axis.get_legend_handles_labels(), 2, handlelength=2.8)
    return figure


def _table(found: dict[str, pd.DataFrame], notes: list[str], piece: Slice, shots: float) -> Table:
    lengths = sorted({length for summary in found.values() for length in summary.context_length})
    title = f"Context length at {in_shots(shots)} ({piece.subtitle})"
    table = Table(
        title,
        ("dataset", "method"),
        tuple(f"M={int(length)}" for length in lengths),
        "context length",
        notes=notes,
    )
    for name, summary in found.items():
        for series in sorted(set(summary.series), key=rank):
            cells: dict[str, Cell | str] = {
                f"M={int(length)}": cell_of(summary, series=series, context_length=length)
                for length in lengths
            }
            table.add((name, look(series).label), cells)
    table.mark_best()
    return table


ITEM = Item(
    "figure5a",
    "Figure 5a. Context length",
    "Accuracy over the number of context vectors, averaged over datasets; the band is one standard"
    " deviation over seeds.",
    make,
    sweep_of("fig5a"),
)
