"""Figure 3: few-shot learning curves, the average over datasets first, then a panel per dataset."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import (
    ONE_COLUMN,
    TWO_COLUMNS,
    add_legend,
    draw_curve,
    fitted,
    look,
    new_figure,
    rank,
)
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_DRAWN = ("ensemble", "ensemble all", "text_transform", "text_bias", "finetune_image_encoder")  # in tables


def make(study: Study, piece: Slice) -> list[Exhibit]:
    runs = frames.main_runs(piece.runs)
    runs = runs[~runs.series.isin(NOT_DRAWN)]  # a user's own method is drawn
    runs = runs[runs.dataset.isin(runs.dataset[runs.shots > 0])]  # no panel that has only a star
    length, _ = frames.main_setting(runs)
    found, notes = frames.panels(runs, ["series", "shots"])
    shots = sorted({count for panel in found.values() for count in panel.shots})
    columns = {count: frames.in_shots(count) for count in shots}
    title = f"Few-shot learning ({piece.subtitle})"
    table = Table(title, ("dataset", "method"), tuple(columns.values()), "shots", notes=list(notes))
    for name, panel in found.items():
        for series in sorted(set(panel.series), key=rank):
            cells = {
                column: frames.cell_of(panel, series=series, shots=count) for count, column in columns.items()
            }
            table.add((name, piece.name_of(series, length)), cells)
    table.mark_best()
    return [Exhibit(piece.suffix, piece.subtitle, _figure(found, shots, piece, length), table)]


def _figure(found: dict[str, pd.DataFrame], shots: list[float], piece: Slice, length: float) -> Figure:
    columns = min(len(found), 4 if len(found) > 6 else 3)
    lines = math.ceil(len(found) / columns)
    width = {1: ONE_COLUMN, 2: 5.0}.get(columns, TWO_COLUMNS)
    figure = new_figure(width, (2.4 if columns == 1 else 1.85) * lines + 0.75, piece.subtitle)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, (axis, (name, panel)) in enumerate(zip(axes, found.items(), strict=False)):
        draw_panel(axis, panel, shots)
        weight = "bold" if name.startswith(frames.AVERAGE) else "normal"
        axis.set_title(fitted(name, width / columns - 0.3), fontweight=weight)
        if place % columns == 0:
            axis.set_ylabel("accuracy (%)")
        if place + columns >= len(found):
            axis.set_xlabel("training images per class" if columns < 4 else "images per class")
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    drawn = {line.get_gid(): line for axis in axes for line in axis.lines}
    order = sorted({series for panel in found.values() for series in panel.series}, key=rank)
    names = [piece.name_of(series, length) for series in order]
    handles = [drawn[series] for series in order]
    # A handle is two dashes with the marker between them.
    add_legend(figure, handles, names, min(columns + 1, 3), handlelength=2.1, columnspacing=1.2)
    return figure


def draw_panel(axis: Axes, panel: pd.DataFrame, shots: list[float]) -> None:
    """Draw accuracy over evenly spaced shots: a star for methods without training, else a curve.

    A thin line extends the zero-shot star across the panel, for comparison with the curves.
    """
    place = {count: float(at) for at, count in enumerate(shots)}
    for series in sorted(set(panel.series), key=rank):
        points = panel[panel.series == series].sort_values("shots")
        x = [place[count] for count in points.shots]
        if set(points.shots) == {0.0}:
            style, mean = look(series), points["mean"].to_numpy()
            axis.axhline(mean[0], color=style.color, linewidth=0.6, linestyle=(0, (1, 3)), zorder=1)
            star: dict[str, Any] = {"color": style.color, "markersize": 8, "zorder": 4, "clip_on": False}
            axis.plot(x, mean, style.marker, gid=series, **star)
        else:
            draw_curve(axis, x, points, series, gid=series)
    axis.set_xticks(range(len(shots)), [frames.shots_text(count) for count in shots])
    axis.set_xlim(-0.3, len(shots) - 0.7)
    axis.grid(axis="x", visible=False)


ITEM = Item(
    "figure3",
    "Figure 3. Few-shot learning",
    "Accuracy on the test images over the number of training images per class: zero-shot CLIP (star), linear probe"
    " (dotted) and CoOp with the class at the end or in the middle of a unified (solid) or class-specific (CSC, dashed)"
    " context. Means over seeds; the band is one standard deviation over seeds. M is the number of context vectors.",
    per_slice(make),
    sweep_command("fig3"),
)
