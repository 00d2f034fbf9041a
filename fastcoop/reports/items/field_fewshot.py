"""The field's few-shot table: every method at every number of shots, with protocol, calibration and cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from fastcoop.reports import chart, field, frames, style
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKGROUND = "#D5D5D5"  # of the other families' curves


def make(study: Study, piece: Slice) -> list[Exhibit]:
    runs = frames.own_prompt(piece.runs)
    if not set(runs.method) - set(field.PAPER):
        raise frames.Missing("there is no run of one of the field's methods; add one, such as tip_adapter")
    kinds = frames.kinds(runs)
    names = {str(place): kind.name for place, kind in enumerate(kinds)}
    runs = pd.concat([kind.runs.assign(kind=str(place)) for place, kind in enumerate(kinds)])
    found, notes = frames.panels(runs, ["kind", "series", "shots"])
    columns = {count: frames.in_shots(count) for count in sorted(runs.shots.unique())}
    published = {frames.shots_text(count): text for count, text in columns.items()}
    title = f"Few-shot methods ({piece.subtitle})"
    table = Table(title, ("dataset", "method"), (*columns.values(), *field.FACTS), "shots", notes=notes)
    most = runs.shots.max()
    counts = runs.drop_duplicates(["dataset", "kind", "shots"]).dataset.value_counts()
    averaged = runs[runs.dataset.isin(counts.index[counts == counts.max()])]
    for place, (dataset, summary) in enumerate(found.items()):
        own = averaged if dataset.startswith(frames.AVERAGE) else runs[runs.dataset == dataset]
        for kind, name in names.items():
            if (summary.kind == kind).any():
                rows = own[(own.kind == kind) & own.shots.isin((0, most))]
                table.add(
                    (dataset, name),
                    frames.cells_of(summary, "shots", columns, kind=kind) | field.facts(study, rows),
                )
        if not place:
            field.add_published(table, "few-shot", piece.backbone, published)
    table.mark_best(columns=tuple(columns.values()), second=True)
    table.notes += field.NOTES
    average, first = next(iter(found.items()))
    drawn = first[first.kind.isin(_one_per_series(first))]
    if drawn[drawn.shots > 0].shots.nunique() < 2:
        return [Exhibit(piece.suffix, piece.subtitle, None, table)]
    shown_kinds = [kinds[int(place)] for place in drawn.kind.unique()]
    lengths = {kind.series: kind.length for kind in shown_kinds if kind.has_others}

    def name_of(series: str) -> str:
        return style.name_of(series, lengths.get(series, 0.0))

    ticks = {count: text.partition(" ")[0] for count, text in columns.items()}
    shown = {title: one[one.kind.isin(drawn.kind)] for title, one in found.items()}
    ranked = runs.assign(ranked=runs.kind.isin(drawn.kind))
    curves = chart.lines(shown, "shots", ticks, chart.SHOTS, name_of, ranked, ("kind", "series", "shots"))
    timed = averaged if average.startswith(frames.AVERAGE) else runs[runs.dataset == average]
    timed = timed[timed.shots.isin((0, most)) & timed.kind.isin(drawn.kind)]
    title = f"Accuracy against training cost ({piece.subtitle})"
    cost = _cost(piece, title, average, drawn, timed, most, name_of)
    return [
        Exhibit(piece.suffix, piece.subtitle, _shots_figure(piece, drawn, name_of), table, [curves]),
        Exhibit(f"{piece.suffix}-cost", title, *cost),
    ]


def _one_per_series(summary: pd.DataFrame) -> list[str]:
    """Return one kind of each series, the one with the most numbers of shots."""
    counts = (
        summary.groupby(["series", "kind"], sort=False).size().sort_values(ascending=False, kind="stable")
    )
    return list(counts.reset_index().drop_duplicates("series").kind)


def _family(series: str) -> str:
    base = series.partition(" ")[0]
    return next((title for title, names in field.FAMILIES.items() if base in names), "Other methods")


def _shots_figure(piece: Slice, summary: pd.DataFrame, name_of: Callable[[str], str]) -> Figure:
    """Draw a panel per family of methods, with the curves of the others in the background."""
    learned = summary[summary.shots > 0].sort_values("shots")
    families = {
        title: learned[learned.series.map(_family) == title] for title in (*field.FAMILIES, "Other methods")
    }
    families = {title: own for title, own in families.items() if len(own)}
    ticks = {count: frames.shots_text(count) for count in sorted(summary.shots.unique())}
    figure, axes = style.panel_figure(
        families, len(families), (style.TWO_COLUMNS, 3.2), piece.subtitle, "training images per class"
    )
    low, high = summary["mean"].min(), summary["mean"].max()
    for axis, own in zip(axes, families.values(), strict=True):
        for _, other in learned[~learned.series.isin(own.series)].groupby("series"):
            places = [list(ticks).index(count) for count in other.shots]
            axis.plot(places, other["mean"], color=BACKGROUND, linewidth=0.7, zorder=0.5)
        shown = pd.concat([summary[summary.shots == 0], own])
        without_bands = shown.assign(std=float("nan"))  # those of eight curves would hide them
        style.draw_curves(axis, without_bands, "shots", ticks)
        room = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - room, high + room)
    axes[0].set_ylabel("accuracy (%)")
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    style.add_panel_legends(figure, name_of)
    return figure


def _cost(
    piece: Slice,
    title: str,
    average: str,
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    most: float,
    name_of: Callable[[str], str],
) -> tuple[Figure, Table, list[chart.Chart]]:
    """Draw accuracy at the most shots over the seconds of a run; return the parts of an exhibit."""
    where, xlabel = f"{average}, {frames.in_shots(most)}", "seconds of a run"
    table = Table(title, ("method",), (xlabel, "accuracy"), notes=[f"{where}."])
    figure, (axis,) = style.panel_figure([where], 1, (5.0, 3.6), piece.subtitle, xlabel)
    seconds = runs[runs.shots > 0].groupby("series").seconds.mean()
    handles, labels = [], []
    for series in sorted(set(summary.series), key=style.rank):
        drawn, own = style.look(series), summary[summary.series == series]
        if set(own.shots) == {0.0}:
            handles.append(
                axis.axhline(own["mean"].iloc[0], color=drawn.color, linewidth=0.8, linestyle=(0, (1, 3)))
            )
        elif (point := own[own.shots == most]).size:
            x, y, spread = seconds[series], point["mean"].iloc[0], point["std"].fillna(0.0).iloc[0]
            axis.errorbar(x, y, yerr=spread, fmt="none", color=drawn.color, linewidth=0.8)
            table.add((name_of(series),), {xlabel: f"{x:.2g}", "accuracy": frames.cell_of(point)})
            handles += axis.plot(x, y, marker=drawn.marker, color=drawn.color, linestyle="None", markersize=6)
        else:
            continue
        labels.append(name_of(series))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_ylabel("accuracy (%)")
    style.add_legend(figure, handles, labels, 4)
    shown = chart.marks(where, summary[summary.shots == most], dict(seconds), xlabel, name_of)
    return figure, table, [shown]


ITEM = Item(
    "field_fewshot",
    "Few-shot methods of the field",
    "Not in the paper: prompts, adapters, caches and probes on the same features and few-shot subsets; what each may"
    " look at to choose its values is in the table. The picture files show one panel per family, the other families in"
    " gray. The second figure is accuracy against the time of a run, with bars of one standard deviation over seeds.",
    per_slice(make),
    sweep_command("field_fewshot"),
)
