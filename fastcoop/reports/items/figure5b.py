"""Figure 5b: zero-shot CLIP and CoOp on several backbones."""

from __future__ import annotations

import pandas as pd

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.study import (
    Missing,
    Study,
    in_shots,
    lost_note,
    main_runs,
    main_setting,
    most_shots,
    own_prompt,
    panels,
    schedule_note,
)
from fastcoop.reports.style import (
    CHARACTERS_PER_INCH,
    ONE_COLUMN,
    OVER_GRID,
    TWO_COLUMNS,
    add_legend,
    fitted,
    look,
    name_of,
    new_figure,
    rank,
    shortened,
)
from fastcoop.reports.table import Cell, Table, cell_of

NAME_LENGTH = 24  # characters of a backbone's name below its bars
DRAWN = ("zero_shot", "coop end")


def across_backbones(study: Study, shots: float, keep: tuple[str, ...]) -> list[tuple[str, pd.DataFrame]]:
    """(schedule, main runs of ``keep`` at 0 or ``shots`` shots on every backbone) for each schedule that
    two or more backbones share; backbones ordered by zero-shot accuracy, the weakest first."""
    tables: dict[str, list[pd.DataFrame]] = {}
    for piece in study.slices():
        if (piece.runs.method == "coop").any():
            runs = own_prompt(main_runs(piece.runs))
            tables.setdefault(piece.schedule, []).append(
                runs[runs.series.isin(keep) & runs.shots.isin((0.0, shots))]
            )
    joined = []
    for schedule, frames in tables.items():
        shared = set.intersection(*(set(frame.dataset) for frame in frames))
        runs = pd.concat(frames)
        if len(frames) > 1 and shared:
            joined.append((schedule, runs[runs.dataset.isin(shared)]))
    return joined


def by_strength(runs: pd.DataFrame) -> list[str]:
    """Backbones by their mean zero-shot accuracy over datasets, the weakest first."""
    zero = runs[runs.method == "zero_shot"].groupby(["backbone", "dataset"]).accuracy.mean()
    known = zero.groupby("backbone").mean().sort_values(kind="stable")
    return [*known.index, *(name for name in runs.backbone.unique() if name not in known.index)]


def make(study: Study) -> list[Part]:
    shots = most_shots(study.runs)
    joined = across_backbones(study, shots, DRAWN)
    if not joined:
        raise Missing("CoOp was run on one backbone only; give the grid several under `backbones:`")
    parts = []
    for schedule, runs in joined:
        suffix = "" if len(joined) == 1 else "-paper" if schedule == "paper" else "-quick"
        found, notes = panels(runs, ["backbone", "series"])
        order = by_strength(runs)
        length, _ = main_setting(runs)
        note = ", ".join(filter(None, (schedule_note(schedule), lost_note(study.lost))))
        parts.append(
            Part(
                suffix,
                note,
                _figure(found, order, length, shots, note),
                _table(found, order, length, shots, note, notes),
            )
        )
    return parts


def _figure(found: dict[str, pd.DataFrame], order: list[str], length: float, shots: float, note: str):  # type: ignore[no-untyped-def]
    name, summary = next(iter(found.items()))
    width = ONE_COLUMN if len(order) <= 4 else TWO_COLUMNS
    figure = new_figure(width, 2.6, note)
    axis = figure.subplots()
    for offset, series in ((-0.2, "zero_shot"), (0.2, "coop end")):
        points = summary[summary.series == series].set_index("backbone").reindex(order)
        x = [place + offset for place in range(len(order))]
        axis.bar(x, points["mean"], 0.38, color=look(series).color, label=name_of(series, length))
        axis.errorbar(
            x, points["mean"], yerr=points["std"], fmt="none", color="#666666", linewidth=0.9, capsize=1.5
        )
        for at, mean, std in zip(x, points["mean"], points["std"].fillna(0.0), strict=True):
            axis.annotate(
                f"{mean:.1f}", (at, mean + std), (0, 2), textcoords="offset points", ha="center", fontsize=7,
                bbox=OVER_GRID,
            )  # fmt: skip
    names = [shortened(name, NAME_LENGTH) for name in order]
    axis.set_xticks(range(len(order)), names)
    axis.tick_params(axis="x", length=0)
    if (max(map(len, names)) + 2) * len(order) > CHARACTERS_PER_INCH * width:
        axis.set_xticks(axis.get_xticks(), names, rotation=20, ha="right", rotation_mode="anchor")
    axis.set_ylabel("accuracy (%)")
    axis.set_title(fitted(f"{name}, {in_shots(shots)}", width - 0.5))
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.1)
    add_legend(figure, *axis.get_legend_handles_labels(), 2)
    return figure


def _table(
    found: dict[str, pd.DataFrame], order: list[str], length: float, shots: float, note: str, notes: list[str]
) -> Table:
    title = ", ".join(filter(None, (f"Backbones at {in_shots(shots)}", note)))
    table = Table(title, ("dataset", "method"), tuple(order), "backbone", notes=notes)
    for name, summary in found.items():
        for series in sorted(set(summary.series), key=rank):
            cells: dict[str, Cell | str] = {b: cell_of(summary, series=series, backbone=b) for b in order}
            table.add((name, name_of(series, length)), cells)
    table.mark_best()
    return table


ITEM = Item(
    "figure5b",
    "Figure 5b. Backbones",
    "Zero-shot CLIP and CoOp, averaged over datasets, on each backbone; the weakest zero-shot first.",
    make,
    sweep_of("fig5b", lambda study: {"backbones": [*study.backbones, "ANOTHER"]}),
)
