"""The best method per number of shots, with its lead over the next one and how sure that is."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fastcoop.reports.chart import Chart
from fastcoop.reports.frames import shots_text
from fastcoop.reports.paired import CONFIDENCE, LEVEL, PairedDifference, compare_pairs
from fastcoop.reports.table import Cells, Table

BEST, ACCURACY, LEAD, SURE = "best method", "accuracy (%)", "lead over the next", "sure?"
NOTE = (
    f"Lead: the mean difference between runs of the same dataset and seed, with its {CONFIDENCE:.0%} interval, in"
    f" percentage points. Yes: the interval is above 0 and p < {LEVEL}, one-sided, not corrected for the choice of the"
    " best method among several. Unknown: too few seeds. Only methods of this figure are compared. With five datasets"
    " or more the interval is of Student's t over datasets and p of Wilcoxon's signed ranks; with fewer both are of t"
    " over seeds."
)


def best_methods(chart: Chart, title: str) -> Table:
    """Return the best method of each panel and number of shots of a chart of curves that has ``runs``."""
    assert chart.runs is not None
    table = Table(title, ("dataset", "shots"), (BEST, ACCURACY, LEAD, SURE), unit="", notes=[NOTE])
    runs = chart.runs[chart.runs.ranked]
    tested = runs.pivot_table(index=["dataset", "seed"], columns=["shots", "name"], values="accuracy")
    datasets = set(runs.dataset)
    for panel, points in chart.panels.items():
        shown = {(point["method"], point["x"]): point["shown"] for point in points}
        own = tested.loc[[panel] if panel in datasets else list(chart.averaged)]
        for shots in sorted(set(own.columns.get_level_values("shots")) - {0.0}):
            rivals = _rivals(own, shots)
            means = rivals.groupby(level="dataset").mean().mean().sort_values(ascending=False, kind="stable")
            if means.empty:
                continue
            best, *others = means.index
            text = shown.get((best, shots_text(shots))) or shown[best, "0"]
            cells: Cells = {BEST: str(best), ACCURACY: text}
            if others:
                test = compare_pairs(rivals[best] - rivals[others[0]])
                cells |= {LEAD: f"{_lead(test)} over {others[0]}", SURE: _verdict(test)}
            table.add((panel, shots_text(shots)), cells)
    return table


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
    return f"{round(test.mean, 2) + 0.0:+.2f}{interval}"  # + 0.0: never -0.00


def _verdict(test: PairedDifference) -> str:
    """Return "yes" or "no" with the p-value, or "unknown"."""
    if math.isnan(test.p):
        return "unknown"
    is_sure = test.p < LEVEL and not test.low <= 0  # NaN: all seeds differ by the same
    return f"{'yes' if is_sure else 'no'} (p {'< 0.001' if test.p < 0.001 else f'= {test.p:.2g}'})"
