"""A grid of many runs against a store of many done ones: how long its dry run takes, step by step.

    python tests/sweeps/scale_trial.py [RUNS] [--folder FOLDER] [--done SHARE]

A small world, one backbone, 20 seeds and as many learning rates as it takes; the store is filled with rows such as a
sweep writes: SHARE (1) of the grid's runs, and others up to the same number. With 100,000 runs: under 20 s.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

RUNS = 100_000


def write_world(folder: Path) -> None:
    """Three datasets and a backbone, as in the tests."""
    from tests.small_world import write_backbone, write_dataset

    for number, name in enumerate(("colours", "tints", "hues")):
        write_dataset(folder / "data" / name, seed=number, train=16 + number)
    write_backbone(folder / "tiny")


def grid_of(runs: int, folder: Path) -> dict[str, Any]:
    """A grid over that world of at least ``runs`` runs: 3 datasets x 5 shots x 20 seeds x 12 variants x learning
    rates."""
    rates = -(-runs // (3 * 5 * 20 * 12))
    return {
        "backbones": str(folder / "tiny"),
        "datasets": ["colours", "tints", "hues"],
        "shots": [1, 2, 4, 8, 16],
        "seeds": list(range(1, 21)),
        "views": 1,
        "methods": {
            "coop": {
                "context_length": [2, 3],
                "class_position": ["end", "mid", "front"],
                "class_specific": [False, True],
                "learning_rate": [0.001 * (1 + n) for n in range(rates)],
                "epochs": "100 steps",
            }
        },
    }


def fill(folder: Path, planned: list[Any], others: int = 0) -> None:
    """A results store in which ``planned`` is done, and ``others`` further runs."""
    import numpy as np

    from fastcoop.methods import Outcome, Scores
    from fastcoop.results import store
    from fastcoop.sweeps.records import run_record

    made = Scores(50.0, 50.0, np.full(4, 50.0), np.zeros(1000, np.uint16), np.zeros(1000, np.float16))
    with store.open_store(folder):
        pass
    with closing(sqlite3.connect(folder / store.DATABASE)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        outcome = Outcome({}, np.linspace(2, 1, 100, dtype=np.float32))
        row: dict[str, Any] = {}
        score: dict[str, Any] = {}
        for number in range(len(planned) + others):
            run = planned[min(number, len(planned) - 1)]
            if number < len(planned) or not row:
                row = store._run_row(run_record(run, outcome))
                score = {
                    "key": run.key, "dataset": run.dataset, "test": run.data.dataset.digest,
                    "accuracy": made.accuracy, "macro_accuracy": made.macro_accuracy, "chance": 25.0,
                    "per_class": "[50, 50, 50, 50]", "predictions": made.predictions.tobytes(),
                    "confidence": made.confidence.tobytes(),
                }  # fmt: skip
            else:
                row["key"] = score["key"] = f"{number:064x}"
            for table, values in (("runs", row), ("scores", score)):
                marks = ", ".join(f":{name}" for name in values)
                db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", values)


class Clock:
    """Seconds by step, printed as they are known, and how much of them this process was at work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start, worked = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - start
        worked = time.process_time() - worked
        print(f"{self.seconds[name]:8.2f} s ({worked:.2f} s at work)  {name}", flush=True)


def trial(runs: int, folder: Path, share: float = 1.0) -> dict[str, float]:
    """Seconds of each step of a dry run in ``folder``, and ``runs`` and ``done`` as it counted them."""
    import torch  # noqa: F401  its import is no step of a dry run's own

    from fastcoop.grids.grid import read_grid
    from fastcoop.grids.planning import plan_runs
    from fastcoop.sweeps import cache_grid, sweep
    from fastcoop.sweeps.loading import load_grid, open_features

    grid = grid_of(runs, folder)
    path = folder / "grid.json"  # JSON is YAML
    path.write_text(json.dumps(grid))
    few = folder / "few.json"
    few.write_text(json.dumps(grid | {"seeds": grid["seeds"][:2]}))
    list(cache_grid(few, data_root=folder / "data", cache=folder / "cache"))
    clock = Clock()
    with clock.step("grid read"):
        read = read_grid(path)
    with clock.step("world loaded"):
        world = load_grid(read, folder / "data", "cpu")
        open_features(world, folder / "cache")
    with clock.step("runs planned, their subsets drawn for the first time"):
        planned = plan_runs(world.runs())
    fill(folder / "results", planned[: int(share * len(planned))], len(planned) - int(share * len(planned)))
    with clock.step("dry run"):
        places = {name: folder / name for name in ("cache", "results")}
        found = sweep(path, data_root=folder / "data", **places, jobs=1, dry_run=True)
    return clock.seconds | {"runs": found.runs, "done": found.done_before, "left": found.left}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=int, nargs="?", default=RUNS)
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    parser.add_argument("--done", type=float, default=1.0, help="share of the grid's runs that are done")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "tiny").exists():
            write_world(folder)
        found = trial(arguments.runs, folder, arguments.done)
    print(f"{found['runs']:.0f} runs planned, {found['done']:.0f} of them done in a store of as many")


if __name__ == "__main__":
    main()
