"""``--dry-run``: what a grid has, what of it is done, and what the rest will take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fastcoop.backbones.precision import fresh_state
from fastcoop.grids.grid import read_grid
from fastcoop.grids.plan import load_grid, plan_runs, warn_of_idle_settings
from fastcoop.results.database import DATABASE
from fastcoop.results.read import load_batches, load_failures
from fastcoop.results.records import Batch
from fastcoop.sweeps.caching import missing_crops
from fastcoop.sweeps.forecast import Forecast, forecast
from fastcoop.sweeps.sweep import (
    Summary,
    _count,
    _open_features,
    _pending,
    _tested,
    open_unchanged,
    results_folder,
)
from fastcoop.sweeps.workers import check_limits

IMPORTS = 10.0  # seconds that loading the libraries takes at most, however old the process is


@dataclass(frozen=True)
class DryRun:
    """``summary``: what the grid has and what of it is done. ``forecast``: what the rest will take; None where all is
    done. ``failed``: runs that failed before, and are not tried again."""

    summary: Summary
    forecast: Forecast | None
    failed: int = 0

    @property
    def left(self) -> int:
        """Runs that would be done."""
        return self.summary.runs - self.summary.done_before - self.failed

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        forecast = self.forecast.as_json() if self.forecast else None
        return self.summary.as_json() | {"would_run": self.left, "failed": self.failed, "forecast": forecast}


@fresh_state()
def dry_run(
    grid: str | Path | Mapping[str, Any],
    *,
    data_root: str | Path | None = "data",
    cache: str | Path = "cache",
    results: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    memory_budget: float | None = None,
    device: str = "cpu",
    jobs: int = -1,
    retry_failed: bool = False,
) -> DryRun:
    """Plan a sweep of the same arguments as it would be done now, and time the beginnings of some of its work. Nothing
    is written.

    Raises:
        UserError: the grid, or something it names, cannot be used.
    """
    start = time.monotonic()
    check_limits(jobs, memory_budget, device)
    imports = min(max(0.0, time.time() - psutil.Process().create_time()), IMPORTS)
    read = read_grid(grid, overrides, only)
    folder = results_folder(grid, results)
    world = load_grid(read, Path(data_root) if data_root is not None else None, device)
    _open_features(world, Path(cache), open_unchanged)
    planned = plan_runs(world)
    warn_of_idle_settings(planned)
    tested = _tested(folder)
    summary = Summary(folder, _count(planned, tested))
    recorded, failures = _work_of(folder)
    pending = {run.key: run for run in _pending(planned, tested, folder)}
    failed = [key for key in pending if key in failures and not retry_failed]
    for key in failed:
        del pending[key]
    if not pending:
        return DryRun(summary, None, len(failed))
    found = forecast(
        world, {run.key: run for run in planned}, pending, recorded, device=device, jobs=jobs,
        memory_budget=memory_budget, missing=missing_crops(world), startup=imports + time.monotonic() - start,
    )  # fmt: skip
    return DryRun(summary, found, len(failed))


def _work_of(folder: Path) -> tuple[list[Batch], dict[str, str]]:
    """Recorded batches and failures of a results folder, which is only read."""
    if not (folder / DATABASE).is_file():
        return [], {}
    failed = load_failures(folder)
    return load_batches(folder), {} if failed.empty else dict(zip(failed.key, failed.error, strict=True))
