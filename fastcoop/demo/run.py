"""``fastcoop demo``: the main job on the world that ships with fastcoop, by the same steps as anyone's own."""

from __future__ import annotations

import time
from pathlib import Path

from fastcoop.backbones import backbone_from_spec
from fastcoop.demo.world import build_world
from fastcoop.errors import UserError
from fastcoop.reports import report
from fastcoop.sweeps import load_results, read_grid, sweep
from fastcoop.sweeps.interpret import interpret
from fastcoop.sweeps.shipped import shipped_grid

QUICK, FULL = "demo", "demo-full"


def run_demo(out: Path, full: bool = False) -> str:
    """Draw the world, cache features, sweep, read the contexts, report; return what to tell the user.

    Everything goes under ``out``: ``data``, ``cache``, ``results`` and ``report`` (with ``-full`` behind the last two
    for the paper's schedule). What is done is kept: a second call only says where it is.

    Raises UserError where the icon fonts are not installed or ``out`` cannot be written.
    """
    start = time.monotonic()
    suffix = "-full" if full else ""
    data, cache = out / "data", out / "cache"
    results, pages = out / f"results{suffix}", out / f"report{suffix}"
    grid = shipped_grid(FULL if full else QUICK)
    if grid is None:
        raise UserError("The demo's grid file was not installed with fastcoop; install it again.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The demo writes to {out}, which cannot be made ({error.strerror}); choose another --out."
        ) from None

    build_world(data)
    summary = sweep(grid, data_root=data, cache=cache, results=results)
    page = pages / "index.html"
    if summary.finished or not page.exists():
        for spec in read_grid(grid).backbones:
            interpret(results, backbone_from_spec(spec))
        report(results, pages)
    lines = [
        "",
        *_averages(results),
        "",
        f"features  {cache}",
        f"results   {results}  ({summary.runs} runs, {summary.finished} done now)",
        *(f"figure 3  {path}" for path in sorted(pages.glob("figure3*.png"))),
        *(f"words     {path}" for path in sorted(pages.glob("table4*.md")) if "csc" not in path.stem),
        f"page      {page}",
        f"{time.monotonic() - start:.0f} s",
    ]
    return "\n".join(lines)


def _averages(results: Path) -> list[str]:
    """For each backbone, mean accuracy over the demo's datasets: a line per method that all of them have, a column per
    number of shots."""
    frame = load_results(results)
    own = frame[(frame.dataset == frame.source) & ~frame.dataset.str.contains(":")]
    lines = []
    for backbone, runs in own.groupby("backbone"):
        per_dataset = runs.groupby(["label", "shots", "dataset"]).accuracy.mean()
        means = per_dataset.groupby(["label", "shots"]).agg(["mean", "size"])
        table = means["mean"][means["size"] == runs.dataset.nunique()].unstack("shots")
        width = max(map(len, table.index))
        lines.append(f"Mean accuracy (%) of {backbone} over the demo's datasets, by shots:")
        lines.append(" " * width + "".join(f"{shots:>8}" for shots in table.columns))
        for label, row in table.iterrows():
            cells = "".join(f"{value:8.1f}" if value == value else " " * 8 for value in row)
            lines.append(f"{label:<{width}}{cells}")
    return lines
