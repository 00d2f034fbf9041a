"""Figure 3: few-shot learning curves, the average over datasets first, then a panel per dataset."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.study import (
    AVERAGE,
    Slice,
    Study,
    in_shots,
    main_runs,
    main_setting,
    panels,
    per_slice,
    shots_text,
)
from fastcoop.reports.style import LOOKS, ONE_COLUMN, TWO_COLUMNS, add_legend, fitted, look, new_figure, rank
from fastcoop.reports.table import Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = (
    "zero_shot",
    "linear_probe",
    "coop end",
    "coop mid",
    "coop front",
    "coop end csc",
    "coop mid csc",
    "coop front csc",
)


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def _parts(piece: Slice) -> list[Part]:
    runs = main_runs(piece.runs)
    runs = runs[runs.series.isin(DRAWN) | ~runs.series.isin(LOOKS)]  # a method of the user's own is drawn too
    runs = runs[runs.dataset.isin(runs.dataset[runs.shots > 0])]  # no panel for a star alone
    length, _ = main_setting(runs)
    found, notes = panels(runs, ["series", "shots"])
    return [
        Part(piece.suffix, piece.subtitle, _figure(found, piece, length), _table(found, piece, length, notes))
    ]


def _figure(found: dict[str, pd.DataFrame], piece: Slice, length: float):  # type: ignore[no-untyped-def]
    columns = min(len(found), 4 if len(found) > 6 else 3)
    lines = math.ceil(len(found) / columns)
    width = {1: ONE_COLUMN, 2: 5.0}.get(columns, TWO_COLUMNS)
    figure = new_figure(width, (2.4 if columns == 1 else 1.85) * lines + 0.75, piece.subtitle)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    shots = sorted({count for panel in found.values() for count in panel.shots})
    for place, (name, panel) in enumerate(found.items()):
        draw_curves(axes[place], panel, shots)
        axes[place].set_title(
            fitted(name, width / columns - 0.3), fontweight="bold" if name.startswith(AVERAGE) else "normal"
        )
        if place % columns == 0:
            axes[place].set_ylabel("accuracy (%)")
        if place + columns >= len(found):
            axes[place].set_xlabel("training images per class" if columns < 4 else "images per class")
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    seen = {series for panel in found.values() for series in panel.series}
    drawn = {line.get_gid(): line for axis in axes for line in axis.lines}
    order = sorted(seen, key=rank)
    handles = [drawn[series] for series in order]
    names = [piece.name_of(series, length) for series in order]
    # A handle is two dashes with the marker between them.
    add_legend(figure, handles, names, min(columns + 1, 3), handlelength=2.1, columnspacing=1.2)
    return figure


def draw_curves(axis: Axes, panel: pd.DataFrame, shots: list[float]) -> None:
    """Accuracy over shots, evenly spaced: a star where there is no training, else a line with its spread in
    a band.

    Where the zero-shot star stands, a thin line goes on across the panel, to compare the curves with.
    """
    at = {count: place for place, count in enumerate(shots)}
    for series in sorted(set(panel.series), key=rank):
        style = look(series)
        points = panel[panel.series == series].sort_values("shots")
        x = np.array([at[count] for count in points.shots], dtype=float)
        mean, std = points["mean"].to_numpy(), points["std"].fillna(0.0).to_numpy()
        if set(points.shots) == {0.0}:
            axis.axhline(mean[0], color=style.color, linewidth=0.6, linestyle=(0, (1, 3)), zorder=1)
            axis.plot(
                x, mean, style.marker, color=style.color, markersize=8, gid=series, zorder=4, clip_on=False
            )
            continue
        axis.fill_between(x, mean - std, mean + std, color=style.color, alpha=0.16, linewidth=0)
        if len(points) == 1:  # a band of no width would hide its spread
            axis.errorbar(x, mean, yerr=std, fmt="none", color=style.color, linewidth=0.9, capsize=2)
        axis.plot(
            x, mean, style.line, marker=style.marker, color=style.color, gid=series,
            zorder=4 - style.weight / 2, linewidth=1.2 * style.weight, markersize=3.4 * style.weight,
        )  # fmt: skip
    axis.set_xticks(range(len(shots)), [shots_text(count) for count in shots])
    axis.set_xlim(-0.3, len(shots) - 0.7)
    axis.grid(axis="x", visible=False)


def _table(found: dict[str, pd.DataFrame], piece: Slice, length: float, notes: list[str]) -> Table:
    shots = sorted({count for panel in found.values() for count in panel.shots})
    columns = tuple(map(in_shots, shots))
    table = Table(
        f"Few-shot learning ({piece.subtitle})", ("dataset", "method"), columns, "shots", notes=list(notes)
    )
    for name, panel in found.items():
        for series in sorted(set(panel.series), key=rank):
            points = panel[panel.series == series].set_index("shots")
            cells: dict[str, Cell | str] = {
                column: Cell(points["mean"][count], points["std"][count], int(points["runs"][count]))
                for column, count in zip(columns, shots, strict=True)
                if count in points.index
            }
            table.add((name, piece.name_of(series, length)), cells)
    table.mark_best(group=(0,))
    return table


ITEM = Item(
    "figure3",
    "Figure 3. Few-shot learning",
    "Accuracy on the test images over the number of training images per class: zero-shot CLIP (star), linear probe"
    " (dotted) and CoOp with"
    " the class at the end or in the middle of a unified (solid) or class-specific (CSC, dashed) context."
    " Means over seeds;"
    " the band is one standard deviation over seeds. M is the number of context vectors.",
    make,
    sweep_of("fig3"),
)
