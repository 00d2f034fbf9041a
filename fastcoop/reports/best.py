"""The best method per number of shots, with its lead over the next one and how sure that is."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fastcoop.reports.chart import Chart
from fastcoop.reports.frames import shots_text
from fastcoop.reports.paired import CONFIDENCE, LEVEL, PairedDifference, compare_pairs
from fastcoop.reports.style import AVERAGE
from fastcoop.reports.table import Cells, Table

BEST, ACCURACY, LEAD, SURE = "best method", "accuracy (%)", "lead over the next", "sure?"
NOTE = (
    f"Lead: the mean difference between runs of the same dataset and seed, with its {CONFIDENCE:.0%} interval, in"
    f" percentage points. Yes: significant at p < {LEVEL}, one-sided, not corrected for the choice of the best method"
    " among several. Unknown: too few seeds."
)


def best_methods(chart: Chart, title: str) -> Table | None:
    """Return the best method of each panel and number of shots of a chart of curves; None without rivals."""
    if chart.runs is None:
        return None
    table = Table(title, ("dataset", "shots"), (BEST, ACCURACY, LEAD, SURE), unit="", notes=[NOTE])
    runs = chart.runs[chart.runs.ranked]
    tested = runs.pivot_table(index=["dataset", "seed"], columns=["shots", "name"], values="accuracy")
    for panel, points in chart.panels.items():
        shown = {(point["method"], point["x"]): point["shown"] for point in points}
        own = tested.loc[list(chart.averaged) if panel.startswith(AVERAGE) else [panel]]
        for shots in sorted(set(own.columns.get_level_values("shots")) - {0.0}):
            rivals = _rivals(own, shots)
            if len(rivals.columns) < 2:
                continue
            means = rivals.groupby(level="dataset").mean().mean().sort_values(ascending=False, kind="stable")
            best, following = means.index[:2]
            test = compare_pairs(rivals[best] - rivals[following])
            text = shown.get((best, shots_text(shots))) or shown[best, "0"]
            lead = f"{_lead(test)} over {following}"
            cells: Cells = {BEST: str(best), ACCURACY: text, LEAD: lead, SURE: _verdict(test)}
            table.add((panel, shots_text(shots)), cells)
    return table if table.rows else None


def _rivals(tested: pd.DataFrame, shots: float) -> pd.DataFrame:
    """Return accuracies at ``shots`` by dataset and seed, a column per method that was tested on every dataset.

    A method without training has the same accuracy for every seed.
    """
    learned: Any = tested[shots].dropna(how="all")
    if 0.0 in tested.columns:
        fixed = tested[0.0].groupby(level="dataset").mean()
        learned = learned.join(fixed[fixed.columns.difference(learned.columns)], on="dataset")
    counts = learned.groupby(level="dataset").count()
    if len(counts) < tested.index.get_level_values("dataset").nunique():
        return learned[[]]
    return learned[list(counts.columns[counts.all()])]


def _lead(test: PairedDifference) -> str:
    interval = "" if math.isnan(test.low) else f" [{test.low:+.2f}, {test.high:+.2f}]"
    return f"{test.mean:+.2f}{interval}"


def _verdict(test: PairedDifference) -> str:
    """Return "yes" or "no", with the p-value, or what is missing to tell."""
    p = test.p
    if math.isnan(p):
        return "unknown"
    return f"{'yes' if p < LEVEL and test.mean > 0 else 'no'} (p {'< 0.001' if p < 0.001 else f'= {p:.2g}'})"
