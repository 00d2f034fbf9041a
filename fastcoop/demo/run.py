"""``fastcoop demo``: the main job on the world that ships with fastcoop, by the same steps as anyone's own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fastcoop.backbones import backbone_from_spec
from fastcoop.demo.world import build_world
from fastcoop.errors import UserError
from fastcoop.grids import read_grid
from fastcoop.grids.shipped import shipped_grid
from fastcoop.reports import report
from fastcoop.results import load_results
from fastcoop.sweeps import sweep
from fastcoop.sweeps.interpret import interpret

QUICK, FULL = "demo", "demo-full"


@dataclass(frozen=True)
class Shown:
    """What a demo made, and where.

    ``accuracy``: for each backbone the mean accuracy (%) over the demo's datasets, by method and number of shots, of
    the methods that all of them have. ``finished``: runs done by this call, of ``runs``.
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
        """A table for each backbone, and the paths."""
        lines = [""]
        for backbone, rows in self.accuracy.items():
            shots = sorted({number for row in rows.values() for number in row})
            width = max(map(len, rows), default=0)
            lines.append(f"Mean accuracy (%) of {backbone} over the demo's datasets, by shots:")
            lines.append(" " * width + "".join(f"{number:>8}" for number in shots))
            for label, row in rows.items():
                cells = "".join(f"{row[number]:8.1f}" if number in row else " " * 8 for number in shots)
                lines.append(f"{label:<{width}}{cells}".rstrip())
        lines += [
            "",
            f"features  {self.features}",
            f"results   {self.results}  ({self.runs} runs, {self.finished} done now)",
            *(f"figure 3  {path}" for path in self.figures),
            *(f"words     {path}" for path in self.words),
            f"page      {self.page}",
            f"{self.seconds:.0f} s",
        ]
        return "\n".join(lines)


def run_demo(out: Path, full: bool = False) -> Shown:
    """Draw the world, cache features, sweep, read the contexts, report; return what came of it.

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
    words = (path for path in sorted(pages.glob("table4*.md")) if "csc" not in path.stem)
    return Shown(
        _averages(results),
        str(cache),
        str(results),
        summary.runs,
        summary.finished,
        tuple(map(str, sorted(pages.glob("figure3*.png")))),
        tuple(map(str, words)),
        str(page),
        round(time.monotonic() - start, 1),
    )


def _averages(results: Path) -> dict[str, dict[str, dict[int, float]]]:
    """``Shown.accuracy`` of the runs under ``results``; zero-shot and probe stand among the methods."""
    frame = load_results(results)
    own = frame[(frame.dataset == frame.source) & ~frame.dataset.str.contains(":")]
    averages = {}
    for backbone, runs in own.groupby("backbone"):
        per_dataset = runs.groupby(["label", "shots", "dataset"]).accuracy.mean()
        means = per_dataset.groupby(["label", "shots"]).agg(["mean", "size"])
        of_all = means["mean"][means["size"] == runs.dataset.nunique()]
        averages[str(backbone)] = {
            str(label): dict(zip(row.index.get_level_values("shots").tolist(), row.tolist(), strict=True))
            for label, row in of_all.groupby("label")
        }
    return averages
