"""A real study in miniature, and the share of each of its parts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop.bench.measure import timed
from fastcoop.demo.world import build_world
from fastcoop.reports.report import report
from fastcoop.sweeps import Summary, cache_grid, sweep

# Figure 3 of `fastcoop demo --full`, with one of its backbones and seeds.
MINIATURE: Mapping[str, Any] = {
    "backbones": "demo-resnet", "datasets": ["objects", "badges", "textures", "styles", "digits"],
    "shots": [1, 2, 4, 8, 16], "seeds": 1, "views": 0,
}  # fmt: skip
VARIANTS: Mapping[str, Any] = {
    "context_length": 16, "class_position": ["end", "mid"], "class_specific": [False, True],
}  # fmt: skip
COOP: Mapping[str, Mapping[str, Any]] = {"fast": {**VARIANTS, "schedule": "fast"}, "paper": VARIANTS}


def measure_study(
    grid: Mapping[str, Any] = MINIATURE,
    coop: Mapping[str, Mapping[str, Any]] = COOP,
    device: str = "auto",
    data_root: Path | None = None,
) -> pd.DataFrame:
    """Run a study, and return the seconds of its parts and their shares, by each schedule.

    Args:
        grid: Keys of a grid, without methods.
        coop: Settings of coop by schedule.
        device: As `sweep` takes it.
        data_root: Folder of the datasets; None: the demo's pictures are drawn, which is not timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = data_root or Path(folder) / "data"
        cache, results = Path(folder) / "cache", Path(folder) / "results"
        if data_root is None:
            build_world(data)

        def run(methods: Mapping[str, Any]) -> Summary:
            given = {**grid, "methods": methods}
            return sweep(given, data_root=data, cache=cache, results=results, jobs=1, device=device)

        whole = {**grid, "methods": ["zero_shot", "linear_probe"]}
        caching = timed(lambda: list(cache_grid(whole, data_root=data, cache=cache, device=device)))
        shared = {"caching": caching, "zero-shot": run({"zero_shot": None}).seconds}
        shared["linear probes"] = run({"linear_probe": None}).seconds
        seconds: dict[str, dict[str, float]] = {}
        for schedule, settings in coop.items():
            done = run({"coop": settings})
            steps = done.engine_share * done.seconds
            seconds[schedule] = shared | {
                "training steps": steps,
                "planning, tests, records": done.seconds - steps,
            }
        reporting = timed(lambda: report(results, Path(folder) / "report"))
    frame = pd.DataFrame({schedule: one | {"report": reporting} for schedule, one in seconds.items()})
    shares = {f"share, {schedule}": frame[schedule] / frame[schedule].sum() for schedule in coop}
    return frame.assign(**shares).rename_axis("part").reset_index()
