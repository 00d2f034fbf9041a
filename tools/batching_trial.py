"""The time that training runs together saves, against the same runs one by one, on a sample of a grid's batches.

    python -m tools.batching_trial --world fastcoop-demo [--runs 20] [--set shots=1 ...] [GRID]

GRID is experiments/demo-2000.yaml by default; `fastcoop demo --out fastcoop-demo` makes its world. Batches are planned
as a sweep of two workers plans them, and runs drawn at random. Each drawn run is done alone, and the batch that it is
in as a whole; both in this process, with one thread, features loaded, and no store written. The means per run are
compared, and multiplied by the number of runs that train.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastcoop.grids.grid import read_grid
from fastcoop.grids.planning import plan_runs
from fastcoop.results.records import Batch
from fastcoop.sweeps.batches import plan_batches
from fastcoop.sweeps.caching import cache_loaded
from fastcoop.sweeps.loading import load_grid, open_features
from fastcoop.sweeps.tasks import Task, run_task
from fastcoop.sweeps.workers import budget_of

GRID = Path(__file__).resolve().parents[1] / "experiments" / "demo-2000.yaml"


def trial(
    grid: Path, world: Path, runs: int, overrides: Sequence[str]
) -> tuple[list[float], list[float], int]:
    """Seconds of each drawn run, alone and as its part of its batch; and how many of the grid's runs train."""
    read = read_grid(grid, overrides)
    loaded = load_grid(read, world / "data", "cpu")
    for _ in cache_loaded(loaded, world / "cache", retry_skipped=False):
        pass
    open_features(loaded, world / "cache")
    planned = {run.key: run for run in plan_runs(loaded.runs())}
    batches = plan_batches(list(planned.values()), budget=budget_of("cpu", None, 2))
    drawn_from = [(batch, key) for batch in batches if batch.trains for key in batch.keys]

    def seconds(batch: Batch) -> float:
        start = time.monotonic()
        told: list[object] = []
        run_task(Task(batch, tuple(planned[key].unbound() for key in batch.keys)), loaded, told.append)
        error = getattr(told[-1], "error", None)
        assert error is None, error
        return time.monotonic() - start

    drawn = random.Random(0).sample(drawn_from, min(runs, len(drawn_from)))
    seconds(replace(drawn[0][0], keys=drawn[0][1:]))  # warms all up
    whole: dict[str, float] = {}
    alone, together = [], []
    for batch, key in drawn:
        alone.append(seconds(replace(batch, keys=(key,))))
        if batch.name not in whole:
            whole[batch.name] = seconds(batch) / len(batch.keys)
        together.append(whole[batch.name])
        print(f"{alone[-1]:8.2f} s alone, {together[-1]:.2f} s in a batch of {len(batch.keys)}", flush=True)
    return alone, together, len(drawn_from)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, nargs="?", default=GRID)
    parser.add_argument("--world", type=Path, required=True, help="folder with data/ and cache/")
    parser.add_argument("--runs", type=int, default=20, help="how many runs are drawn")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="as fastcoop sweep has it"
    )
    given = parser.parse_args()
    alone, together, runs = trial(given.grid, given.world, given.runs, given.overrides)
    one, many = sum(alone) / len(alone), sum(together) / len(together)
    print(
        f"{len(alone)} of {runs} runs: {one:.2f} s alone, {many:.2f} s in batches, {one / many:.2f} times as fast"
    )
    print(f"seconds of a core for all {runs}: {runs * one:.0f} one by one, {runs * many:.0f} in batches")


if __name__ == "__main__":
    main()
