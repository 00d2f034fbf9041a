"""Compare coop's schedules with the paper's: differences of test accuracy in points, as the tables of docs/fast.md.

    python -m tools.fast_trial SOURCE [SOURCE ...]

A SOURCE is a results folder, or the CSV of a report's Figure 3 named figure3-BACKBONE.csv. Together they must hold runs
by the paper's schedule and by others. A cell is the mean over seeds for one backbone, training dataset, test dataset,
variant and number of shots; both schedules of a cell must have equally many seeds. The tables give the mean difference
over cells, its standard error, and the number of cells. Errors count cells as independent, although variants of one
dataset are not; the last column takes the mean of each backbone and dataset first.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import fastcoop as fc

CELL = ["backbone", "source", "dataset", "variant", "shots"]
PAPER = "paper"


def main(sources: list[str]) -> None:
    if not sources:
        raise SystemExit(__doc__)
    cells = pd.concat([read_figure(Path(s)) if s.endswith(".csv") else read_folder(s) for s in sources])
    twice = cells.set_index("schedule", append=True).index.duplicated()
    if twice.any():
        place, schedule = cells.index[twice][0], cells.schedule[twice].iloc[0]
        raise SystemExit(
            f"Two sources have {', '.join(map(str, place))} shots by the schedule {schedule}; name one of them. The CSV"
            " of runs by one schedule counts as the paper's."
        )
    accuracy, seeds = (cells.pivot(columns="schedule", values=name) for name in ("accuracy", "seeds"))
    if PAPER not in accuracy:
        raise SystemExit("No run by the paper's schedule; name a source that has some.")
    under_shift = accuracy.index.get_level_values("source") != accuracy.index.get_level_values("dataset")
    for schedule in accuracy.columns.drop(PAPER):
        for chosen, where in ((~under_shift, "same dataset"), (under_shift, "other test datasets")):
            fits = chosen & (seeds[schedule] == seeds[PAPER])
            if fits.any():
                runs = int(seeds[schedule][fits].sum())
                print(f"\n### {schedule}: {where}, {runs} runs of each schedule\n")
                print(table((accuracy[schedule] - accuracy[PAPER])[fits]))


def read_folder(folder: str) -> pd.DataFrame:
    """Return accuracy and number of seeds by cell and schedule."""
    runs = fc.load_results(folder)
    runs = runs[(runs.method == "coop") & (runs.status == "done")].astype({"shots": int})
    own = np.where(runs.class_specific, ", class-specific", "")
    runs["variant"] = runs.class_position + ", M=" + runs.context_length.astype(int).astype(str) + own
    found = runs.groupby([*CELL, "schedule"]).accuracy.agg(["mean", "count"])
    return found.set_axis(["accuracy", "seeds"], axis=1).reset_index("schedule")


def read_figure(path: Path) -> pd.DataFrame:
    """Return the same of a report's Figure 3: by the paper's schedule, or by that and another."""
    rows = pd.read_csv(path)
    label = rows.method.str.extract(
        r"^CoOp \(M=(?P<m>\d+), (?P<position>\w+)(?P<own>, CSC)?\)(?:, (?P<by>\S+))?$"
    )
    rows = rows[label.m.notna() & ~rows.dataset.str.startswith("Average")].join(label)
    own = np.where(rows.own.notna(), ", class-specific", "")
    cells = pd.DataFrame({
        "backbone": re.sub("^figure3-", "", path.stem), "source": rows.dataset, "dataset": rows.dataset,
        "variant": rows.position + ", M=" + rows.m + own, "shots": rows.shots.str.split().str[0].astype(int),
        "schedule": rows.by.fillna(PAPER), "accuracy": rows["mean"], "seeds": rows.runs.astype(int),
    })  # fmt: skip
    return cells.set_index(CELL)


def table(differences: pd.Series) -> str:
    """Return the differences of cells by variant and shots as a Markdown table."""
    shots = sorted(differences.index.unique("shots"))
    rows = {
        variant: differences.xs(variant, level="variant") for variant in differences.index.unique("variant")
    }
    columns = ["variant", *(f"{n} shots" for n in shots), "by dataset"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for variant, values in (rows | {"all": differences}).items():
        by_shots = [values[values.index.get_level_values("shots") == n] for n in shots]
        by_dataset = values.groupby(["backbone", "source", "dataset"]).mean()
        lines.append(f"| {variant} | " + " | ".join(map(mean_and_error, [*by_shots, by_dataset])) + " |")
    return "\n".join(lines)


def mean_and_error(values: pd.Series) -> str:
    """Return "+1.2 ± 0.3 (8)": mean, standard error and number of cells."""
    if values.empty:
        return ""
    error = f" ± {values.std() / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{values.mean():+.1f}{error} ({len(values)})"


if __name__ == "__main__":
    main(sys.argv[1:])
