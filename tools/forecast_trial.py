"""Compare a dry run's forecast with the time of the sweep, on the demo's world.

    python -m tools.forecast_trial --world fastcoop-demo [--set seeds=1 ...] [GRID]

GRID is experiments/demo.yaml by default; `fastcoop demo --out fastcoop-demo` makes the world and its features, which
are drawn and cached here if they are missing. On an otherwise idle machine the sweep should take between 0.75 and 1.25
times what was expected; on a machine that does other work, the result says little.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, nargs="?", default=GRID)
    parser.add_argument("--world", type=Path, required=True, help="folder with data/ and cache/")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="as fastcoop sweep has it"
    )
    given = parser.parse_args()
    from fastcoop.demo.world import build_world
    from fastcoop.sweeps import cache_grid

    build_world(given.world / "data")
    list(cache_grid(given.grid, data_root=given.world / "data", cache=given.world / "cache"))
    folders = ["--data-root", str(given.world / "data"), "--cache", str(given.world / "cache")]
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results"
        expected, took = of_wall_time(given.grid, folders, results, given.overrides)
    print(f"expected {expected:.1f} s, took {took:.1f} s: {took / expected:.2f} times that")


if __name__ == "__main__":
    main()
