"""How far a dry run's forecast is from what the sweep then takes, on the demo's world.

    python -m tools.forecast_trial --world fastcoop-demo [--cpu] [--set seeds=1 ...] [GRID]

GRID is experiments/demo.yaml by default; `fastcoop demo --out fastcoop-demo` makes the world and its features, which
are drawn and cached here where they are not there. On an otherwise idle machine the sweep takes between two thirds and
one and a half times what was expected. With --cpu, both are in seconds of a core of one process, as far as other work
leaves them alone: for a machine that is in use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = Path(__file__).resolve().parents[1] / "experiments" / "demo.yaml"


def of_wall_time(grid: Path, folders: list[str], results: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds expected, and taken, by the commands."""
    command = [sys.executable, "-m", "fastcoop.cli", "sweep", str(grid), *folders, "--results", str(results)]
    command += [word for one in overrides for word in ("--set", one)]
    said = subprocess.run([*command, "--dry-run", "--json"], stdout=subprocess.PIPE, check=True).stdout
    start = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return json.loads(said)["forecast"]["seconds"], time.monotonic() - start


def of_cpu_time(grid: Path, world: Path, results: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds of one core expected, and taken, by the batches of a sweep in this process."""
    from fastcoop.sweeps import measure, sweep
    from fastcoop.sweeps.dry_run import dry_run

    measure.clock = time.process_time
    asked = {
        "data_root": world / "data",
        "cache": world / "cache",
        "results": results,
        "overrides": overrides,
    }
    found = dry_run(grid, **asked, jobs=1).forecast
    assert found is not None
    for line in found.lines():
        print(line)
    start = time.process_time()
    sweep(grid, **asked, jobs=1)
    return sum(part.seconds or 0 for part in found.parts), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, nargs="?", default=GRID)
    parser.add_argument("--world", type=Path, required=True, help="folder with data/ and cache/")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="as fastcoop sweep has it"
    )
    parser.add_argument("--cpu", action="store_true", help="compare seconds of a core")
    given = parser.parse_args()
    from fastcoop.demo.world import build_world
    from fastcoop.sweeps import cache_grid

    build_world(given.world / "data")
    list(cache_grid(given.grid, data_root=given.world / "data", cache=given.world / "cache"))
    folders = ["--data-root", str(given.world / "data"), "--cache", str(given.world / "cache")]
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results"
        if given.cpu:
            expected, took = of_cpu_time(given.grid, given.world, results, given.overrides)
        else:
            expected, took = of_wall_time(given.grid, folders, results, given.overrides)
    kind = "seconds of a core" if given.cpu else "seconds"
    print(f"expected {expected:.1f} {kind}, took {took:.1f}: {took / expected:.2f} times that")


if __name__ == "__main__":
    main()
