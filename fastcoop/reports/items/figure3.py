"""Figure 3: few-shot learning curves, the average over datasets first, then a panel per dataset.

Curves by the paper's schedule and by one other, such as the fast schedule, are drawn in one figure.
"""

from __future__ import annotations

import math

from fastcoop.reports import chart, frames
from fastcoop.reports.field import FIELD
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study, schedule_note
from fastcoop.reports.style import BY, ONE_COLUMN, TWO_COLUMNS, add_series_legend, draw_curves, panel_figure

NOT_DRAWN = ("ensemble", "ensemble all", "text_transform", "text_bias", "finetune_image_encoder")  # in tables


def make(study: Study, piece: Slice) -> list[Exhibit]:
    runs = frames.main_runs(piece.runs)
    runs = runs[~runs.series.isin(NOT_DRAWN) & ~runs.method.isin(FIELD)]  # a user's own method is drawn
    runs = runs[runs.dataset.isin(runs.dataset[runs.shots > 0])]  # no panel that has only a star
    if piece.beside:
        by = runs.schedule.map(lambda one: BY + (schedule_note(one).partition(" schedule")[0] or one))
        runs = runs.assign(series=runs.series.where(runs.schedule == "", runs.series + by))
    length = frames.main_setting(runs).length
    found, notes = frames.panels(runs, ["series", "shots"])
    shots = sorted(runs.shots.unique())

    def name(series: str) -> str:
        return piece.name_of(series, length)

    columns = {count: frames.in_shots(count) for count in shots}
    table = frames.panel_table(f"Few-shot learning ({piece.subtitle})", found, notes, "shots", columns, name)

    columns_drawn = min(len(found), 4 if len(found) > 6 else 3)
    width = {1: ONE_COLUMN, 2: 5.0}.get(columns_drawn, TWO_COLUMNS)
    height = (2.4 if columns_drawn == 1 or piece.beside else 1.85) * math.ceil(
        len(found) / columns_drawn
    ) + 0.75
    xlabel = "training images per class" if columns_drawn < 4 else "images per class"
    figure, axes = panel_figure(found, columns_drawn, (width, height), piece.subtitle, xlabel)
    ticks = {count: frames.shots_text(count) for count in shots}
    for axis, summary in zip(axes, found.values(), strict=True):
        draw_curves(axis, summary, "shots", ticks)
    for axis in axes[::columns_drawn]:
        axis.set_ylabel("accuracy (%)")
    add_series_legend(figure, name, min(columns_drawn + 1, 3))
    drawn = chart.lines(found, "shots", ticks, chart.SHOTS, name, runs)
    return [Exhibit(piece.suffix, piece.subtitle, figure, table, [drawn])]


ITEM = Item(
    "figure3",
    "Figure 3. Few-shot learning",
    "Accuracy on the test images over the number of training images per class: zero-shot CLIP (star), linear probe"
    " (dotted) and CoOp with the class at the end or in the middle of a unified (solid) or class-specific (CSC, dashed)"
    " context. Means over seeds; the band is one standard deviation over seeds. M is the number of context vectors."
    " Curves of a second training schedule are dotted, with open markers.",
    per_slice(make, paired=True),
    sweep_command("fig3"),
)
