"""Figure 5b: zero-shot CLIP and CoOp on several backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from fastcoop.reports import chart, frames, style
from fastcoop.reports.item import Exhibit, Item, sweep_command
from fastcoop.reports.study import Study, across_backbones, diverged_note, joined, lacking_note, schedule_note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME_LENGTH = 24  # characters of a backbone's name below its bars
DRAWN = ("zero_shot", "coop end")


def on_shared_datasets(study: Study, shots: float) -> dict[str, tuple[str, pd.DataFrame]]:
    """Return by schedule the suffix of its files, and the runs of `DRAWN` on the datasets that all backbones share.

    Schedules of one backbone are left out.
    """
    found = {}
    for schedule, (suffix, of_backbones) in across_backbones(study, shots).items():
        parts = [runs[runs.series.isin(DRAWN)] for runs in of_backbones.values()]
        shared = set.intersection(*(set(part.dataset) for part in parts))
        if len(parts) > 1 and shared:
            runs = pd.concat(parts)
            found[schedule] = suffix, runs[runs.dataset.isin(shared)]
    return found


def by_strength(runs: pd.DataFrame) -> list[str]:
    """Return backbones by their mean zero-shot accuracy over datasets, the weakest first."""
    zero = runs[runs.method == "zero_shot"].groupby(["backbone", "dataset"]).accuracy.mean()
    known = zero.groupby("backbone").mean().sort_values(kind="stable")
    return list(dict.fromkeys([*known.index, *runs.backbone]))


def make(study: Study) -> list[Exhibit]:
    shots = frames.main_setting(study.runs).shots
    of_schedules = on_shared_datasets(study, shots)
    if not of_schedules:
        raise frames.Missing(
            "CoOp was run on one backbone only, in its main setting; give the grid several under `backbones:`"
        )
    exhibits = []
    for schedule, (suffix, runs) in of_schedules.items():
        found, notes = frames.panels(runs, ["backbone", "series"])
        order, length = by_strength(runs), frames.main_setting(runs).length
        names = {series: style.name_of(series, length) for series in DRAWN}
        note = joined(schedule_note(schedule), diverged_note(study.diverged))
        title = joined(f"Backbones at {frames.in_shots(shots)}", note)
        columns, notes = dict(zip(order, order, strict=True)), notes + lacking_note(study, schedule, order)
        table = frames.panel_table(title, found, notes, "backbone", columns, names.__getitem__)
        name, summary = next(iter(found.items()))
        figure = _figure(f"{name}, {frames.in_shots(shots)}", summary, order, names, note)
        shown = chart.bars(
            {name: [(row.series, row.backbone, row) for row in frames.rows_of(one)] for name, one in found.items()},
            chart.ACCURACY, names.__getitem__,
        )  # fmt: skip
        exhibits.append(Exhibit(suffix, note, figure, table, [shown]))
    return exhibits


def _figure(title: str, summary: pd.DataFrame, order: list[str], names: dict[str, str], note: str) -> Figure:
    width = style.ONE_COLUMN if len(order) <= 4 else style.TWO_COLUMNS
    figure, (axis,) = style.panel_figure([title], 1, (width, 2.6), note, "")
    for offset, (series, label) in zip((-0.2, 0.2), names.items(), strict=True):
        points = summary[summary.series == series].set_index("backbone").reindex(order)
        x = [place + offset for place in range(len(order))]
        axis.bar(x, points["mean"], 0.38, color=style.look(series).color, label=label)
        bars: dict[str, Any] = {"fmt": "none", "color": "#666666", "linewidth": 0.9, "capsize": 1.5}
        axis.errorbar(x, points["mean"], points["std"], **bars)
        for at, mean, std in zip(x, points["mean"], points["std"].fillna(0.0), strict=True):
            axis.annotate(f"{mean:.1f}", (at, mean + std), (0, 2), textcoords="offset points", ha="center", fontsize=7,
                          bbox=style.ON_GRID)  # fmt: skip
    ticks = [style.shortened(name, NAME_LENGTH) for name in order]
    is_slanted = (max(map(len, ticks)) + 2) * len(order) > style.CHARACTERS_PER_INCH * width
    slanted: dict[str, Any] = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
    axis.set_xticks(range(len(order)), ticks, **slanted)
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("accuracy (%)")
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.1)
    style.add_legend(figure, *axis.get_legend_handles_labels(), 2)
    return figure


ITEM = Item(
    "figure5b",
    "Figure 5b. Backbones",
    "Zero-shot CLIP and CoOp, averaged over datasets, on each backbone; the weakest zero-shot first.",
    make,
    sweep_command("fig5b", lambda study: {"backbones": [*study.backbones, "ANOTHER"]}),
)
