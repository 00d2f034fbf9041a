"""``fastcoop demo``: build the demo's datasets, then cache, sweep, interpret and report like any other study."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop.backbones import backbone_from_spec
from fastcoop.backbones.precision import limit_threads
from fastcoop.demo.world import build_world
from fastcoop.errors import writing
from fastcoop.features import PictureFinder
from fastcoop.grids import read_grid
from fastcoop.processes import available_cores
from fastcoop.progress import counted, duration
from fastcoop.reports import report
from fastcoop.reports.report import has_report
from fastcoop.results import load_results
from fastcoop.sweeps import interpret, sweep

REPORT_JOBS = 4  # at most: a process takes two seconds to start
GRID, FULL_GRID = Path("experiments/demo.yaml"), Path("experiments/demo-full.yaml")


@dataclass(frozen=True)
class DemoSummary:
    """What a demo made, and where.

    Attributes:
        accuracy: {backbone: {method: {shots: mean accuracy in percent over the demo's datasets}}}, of the methods
            that were run on all of them.
        features, results, page: Paths of the feature cache, the results folder and the report.
        runs, finished: Number of runs, and of those that this call finished.
        figures, words: Paths of Figure 3 and of the tables of nearest words.
        seconds: Duration of the call.
    """

    accuracy: dict[str, dict[str, dict[int, float]]]
    features: str
    results: str
    runs: int
    finished: int
    figures: tuple[str, ...]
    words: tuple[str, ...]
    page: str
    seconds: float

    def __str__(self) -> str:
        """Return a table for each backbone, and the paths."""
        lines = []
        for backbone, rows in self.accuracy.items():
            table = pd.DataFrame.from_dict(rows, orient="index").sort_index(axis=1)
            lines += ["", f"Mean accuracy (%) of {backbone} over the demo's datasets, by shots:"]
            lines.append(table.to_string(float_format="{:.1f}".format, na_rep="", col_space=7))
        lines += ["", f"features  {self.features}"]
        lines.append(
            f"results   {self.results}  ({counted(self.runs, 'run')}, {self.finished} finished by this call)"
        )
        lines += [f"figure 3  {path}" for path in self.figures] + [f"words     {path}" for path in self.words]
        page = Path(self.page).absolute().as_uri()  # which many terminals open at a click
        return "\n".join([*lines, f"time      {duration(self.seconds)}", "", f"The page: {page}"])


def run_demo(out: Path, full: bool = False) -> DemoSummary:
    """Draw the datasets, cache features, sweep, interpret the contexts and write the report.

    Everything is written under ``out``: ``data``, ``cache``, ``results`` and ``report``. Finished work is kept, so
    that a second call only returns the summary.

    Args:
        out: Folder that everything is written to.
        full: Whether to make every figure and table by the paper's schedule, and Figure 3 by the fast one too, on both
            backbones, into ``results-full`` and ``report-full``.

    Raises:
        UserError: the icon fonts are not installed, or ``out`` cannot be written or holds other files of such names.
    """
    start = time.monotonic()
    suffix, grid = ("-full", FULL_GRID) if full else ("", GRID)
    data, cache, results, page = (
        out / name for name in ("data", "cache", f"results{suffix}", f"report{suffix}/index.html")
    )
    with limit_threads(1):  # pictures and towers are small: more threads would wait for one another
        with writing(out):
            build_world(data)
        summary = sweep(grid, data_root=data, cache=cache, results=results)
        if summary.finished or not has_report(page.parent):
            for spec in read_grid(grid).backbones:
                interpret(results, backbone_from_spec(spec))
            report(results, page.parent, PictureFinder(data, cache), jobs=min(REPORT_JOBS, available_cores()))
    return DemoSummary(
        accuracy=_mean_accuracies(results),
        features=str(cache),
        results=str(results),
        runs=summary.runs,
        finished=summary.finished,
        figures=tuple(map(str, sorted(page.parent.glob("figure3*.png")))),
        words=tuple(str(path) for path in sorted(page.parent.glob("table4*.md")) if "csc" not in path.stem),
        page=str(page),
        seconds=round(time.monotonic() - start, 1),
    )


def _mean_accuracies(results: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Return `DemoSummary.accuracy` of the runs in a results folder."""
    frame = load_results(results)
    own = frame[(frame.dataset == frame.source) & ~frame.dataset.str.contains(":")]
    found: dict[str, dict[str, dict[int, float]]] = {}
    groups: Any = own.groupby(["backbone", "label", "shots"])
    for (backbone, label, shots), runs in groups:
        means = runs.groupby("dataset").accuracy.mean()
        if len(means) == own.dataset[own.backbone == backbone].nunique():
            found.setdefault(backbone, {}).setdefault(label, {})[int(shots)] = float(means.mean())
    return found
