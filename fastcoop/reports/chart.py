"""Charts of the page: the points of a figure, which ``page.js`` draws in a browser with Vega-Lite.

The static figures are matplotlib's (`fastcoop.reports.style`); both have the same names, colors, markers and lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from fastcoop import escape
from fastcoop.reports.frames import Panels, averaged_datasets, rows_of
from fastcoop.reports.series import ON_TEST
from fastcoop.reports.style import Look, look, rank

LINES, BARS, MARKS, CONFUSIONS, CALIBRATION = "lines", "bars", "marks", "confusions", "calibration"
ACCURACY, SHOTS = "accuracy (%)", "training images per class"
DARK_SHARE = 0.42  # of white that a color gets on a dark background
WRONG, RIGHT = "#D55E00", "#8A8A8A"  # of confusions, on both backgrounds
STRENGTH = 0.8  # opacity of the most frequent confusion, on which a count can be read
# Markers as SVG paths within [-1, 1], by matplotlib's names.
MARKERS = {
    "o": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z", "s": "M-.85,-.85H.85V.85H-.85Z", "^": "M0,-1L1,.8H-1Z",
    "v": "M0,1L1,-.8H-1Z", "<": "M-1,0L.8,-1V1Z", ">": "M1,0L-.8,-1V1Z", "D": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "d": "M0,-1.2L.7,0L0,1.2L-.7,0Z", "P": "M-.35,-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
    "X": "M-1,-.5L-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0Z",
    "p": "M0,-1L.95,-.31L.59,.81H-.59L-.95,-.31Z", "h": "M0,-1L.87,-.5V.5L0,1L-.87,.5V-.5Z",
    "*": "M0,-1.3L.31,-.42H1.24L.49,.13L.76,1.05L0,.5L-.76,1.05L-.49,.13L-1.24,-.42H-.31Z",
}  # fmt: skip
MARKERS |= {"H": MARKERS["h"], "8": MARKERS["o"]}
DASHES = {"-": [], "--": [6, 3], "-.": [7, 3, 2, 3], ":": [2, 3], "None": [1, 3]}


@dataclass(frozen=True, eq=False)
class Chart:
    """What a figure shows, for the page.

    Attributes:
        kind: `LINES` over evenly spaced values, `BARS`, `MARKS` over a logarithmic axis, `CONFUSIONS` or `CALIBRATION`.
        panels: The points of each panel by its title. A point of a method has its ``x``, ``mean``, ``low`` and ``high``
            (None without a spread), the mean and spread as text (``shown``), and numbers of ``seeds`` and ``runs``.
        looks: How each method is drawn, in the order of the legend; empty where no methods are compared.
        xlabel, ylabel: Titles of the axes; bars have no ``ylabel``.
        ticks: The values of ``x`` of lines, or of both axes of confusions, in order.
        runs: The runs behind lines over shots; the best method is found in those ``ranked``, by their ``name``.
        averaged: The datasets of the panel of the average.
    """

    kind: str
    panels: dict[str, list[dict[str, Any]]]
    looks: dict[str, Look]
    xlabel: str
    ylabel: str = ACCURACY
    ticks: tuple[str, ...] = ()
    runs: pd.DataFrame | None = None
    averaged: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return what the page's script needs beside the points."""
        looks = [
            {"name": name, "color": css_color(one.color), "fill": _fill(one), "marker": MARKERS[one.marker],
             "dash": DASHES[one.line]}
            for name, one in self.looks.items()
        ]  # fmt: skip
        own = {"kind": self.kind, "xlabel": self.xlabel, "ylabel": self.ylabel, "ticks": self.ticks}
        return own | {"looks": looks}


def lines(
    found: Panels, over: str, ticks: Mapping[float, str], xlabel: str, name: Callable[[str], str],
    runs: pd.DataFrame | None = None, by: Sequence[str] = ("series", "shots"),
) -> Chart:  # fmt: skip
    """Return the chart of curves over a column.

    Args:
        found: Summaries, with the column ``series``.
        over: The column; its value 0 is a level without training.
        ticks: Texts of the column's values, in order.
        xlabel: Title of the axis.
        name: Returns the name of a series.
        runs: The runs behind curves over shots. The column ``ranked``, if there is one, excludes some from ranking; so
            does a choice on test labels.
        by: The columns that ``found`` was summarized by.
    """
    names = {series: name(series) for summary in found.values() for series in summary.series.unique()}
    panels = {}
    for title, summary in found.items():
        points = [
            _point(names[row.series], ticks[getattr(row, over)], row) | {"level": getattr(row, over) == 0}
            for row in rows_of(_ordered(summary))
        ]
        counts = pd.Series([point["method"] for point in points]).value_counts()
        panels[title] = [point | {"alone": bool(counts[point["method"]] == 1)} for point in points]
    looks = looks_of(names, name)
    drawn = Chart(LINES, panels, looks, xlabel, ticks=tuple(ticks.values()))
    if runs is None:
        return drawn
    shown = {series: escape.visible(text) for series, text in names.items()}
    competes = runs.get("ranked", True) & ~runs.series.str.contains(ON_TEST)
    ranked = runs.assign(name=runs.series.map(shown), ranked=competes)
    return replace(drawn, runs=ranked, averaged=tuple(averaged_datasets(runs, by)))


def bars(
    found: Mapping[str, Iterable[tuple[str, str, Any]]], xlabel: str, name: Callable[[str], str]
) -> Chart:
    """Return the chart of bars: per panel the series, the text and the summary (mean, std, runs) of each."""
    panels, drawn = {}, {}
    for title, given in found.items():
        drawn[title] = list(given)
        points = [_point(name(series), text, row) for series, text, row in drawn[title]]
        panels[title] = [point | {"label": f"{point['shown']} · {point['x']}"} for point in points]
    looks = looks_of((series for given in drawn.values() for series, _, _ in given), name)
    return Chart(BARS, panels, looks, xlabel)


def marks(
    title: str, summary: pd.DataFrame, xs: Mapping[str, float], xlabel: str, name: Callable[[str], str]
) -> Chart:
    """Return the chart of one mark per series of a summary, over the numbers ``xs`` of the series."""
    shown = _ordered(summary[summary.series.isin(list(xs))])
    points = [
        _point(name(row.series), "", row) | {"x": float(f"{xs[row.series]:.3g}")} for row in rows_of(shown)
    ]
    return Chart(MARKS, {title: points}, looks_of(shown.series, name), xlabel)


def confusions(title: str, table: pd.DataFrame) -> Chart:
    """Return the chart of a confusion matrix, shaded by shares of the true classes: right in gray, wrong in orange."""
    names = [escape.visible(name) for name in table.index]
    share = table.div(table.sum(axis=1).clip(lower=1), axis=0).to_numpy()
    most = max((share[place] for place in np.ndindex(share.shape) if len({*place}) > 1), default=0.0)
    points = []
    for row, column in np.argwhere(table.to_numpy()):
        own, color = share[row, column], RIGHT if row == column else WRONG
        points.append({
            "y": names[row], "x": names[column], "images": int(table.iloc[row, column]), "shown": f"{100 * own:.0f}%",
            "color": color, "strength": round(STRENGTH * own / (1 if row == column else most), 2),
        })  # fmt: skip
    return Chart(CONFUSIONS, {title: points}, {}, "predicted", "true class", tuple(names))


def calibration(title: str, curve: pd.DataFrame) -> Chart:
    """Return the chart of accuracy over confidence in bins, with the share of the images in each bin as bars."""
    share = 100 * curve.images / curve.images.sum()
    points = [
        {
            "x": round(row.confidence, 2), "y": round(row.accuracy, 2), "low": row.low, "high": row.high,
            "shown": f"{row.accuracy:.1f}%", "bin": f"{row.low:.0f} to {row.high:.0f}%", "images": int(row.images),
            "share": round(part, 1),
        }
        for row, part in zip(rows_of(curve.fillna(0.0)), share, strict=True)
    ]  # fmt: skip
    return Chart(CALIBRATION, {title: points}, {}, "confidence (%)", "%")


def looks_of(series: Iterable[str], name: Callable[[str], str]) -> dict[str, Look]:
    """Return the look of each series by its name, in the order of legends."""
    return {escape.visible(name(one)): look(one) for one in sorted(set(series), key=rank)}


def swatch(style: Look) -> str:
    """Return the line and marker of a method as SVG."""
    color = css_color(style.color)
    dash = " ".join(map(str, DASHES[style.line]))
    line = f'<path d="M-14,0H14" fill="none" stroke-width="1.8" stroke-dasharray="{dash}" style="stroke:{color}"/>'
    colors = f"fill:{_fill(style)};stroke:{color}"
    mark = f'<path d="{MARKERS[style.marker]}" transform="scale(3.8)" stroke-width=".3" style="{colors}"/>'
    return f'<svg viewBox="-15 -7 30 14" width="30" height="14" aria-hidden="true">{line}{mark}</svg>'


def _fill(style: Look) -> str:
    return "var(--paper)" if style.is_open else css_color(style.color)


def _ordered(summary: pd.DataFrame) -> pd.DataFrame:
    return summary.sort_values("series", key=lambda column: column.map(rank), kind="stable")


def _point(method: str, x: str, row: Any) -> dict[str, Any]:
    mean, std = float(row.mean), float(row.std)
    has_spread = not math.isnan(std)
    shown = f"{mean:.2f}" + (f" ± {std:.2f}" if has_spread else "")
    ends = (round(mean - std, 3), round(mean + std, 3)) if has_spread else (None, None)
    return {
        "method": escape.visible(method), "x": escape.visible(x), "mean": round(mean, 3), "low": ends[0],
        "high": ends[1], "shown": shown, "seeds": int(row.seeds), "runs": int(row.runs),
    }  # fmt: skip


def css_color(color: str) -> str:
    """Return a color (``#rrggbb``) as CSS, lighter on a dark background."""
    parts = [int(part, 16) for part in re.findall("..", color.removeprefix("#"))]
    light = [round(part + (255 - part) * DARK_SHARE) if max(parts) > 64 else 232 for part in parts]
    return f"light-dark({color}, #{''.join(f'{part:02x}' for part in light)})"
