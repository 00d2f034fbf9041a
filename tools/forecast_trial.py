"""Compare a dry run's forecast with the time of the sweep, on the demo's world.

    python -m tools.forecast_trial --world fastcoop-demo [--jobs 1] [--set seeds=1 ...] [GRID]

GRID is experiments/demo.yaml by default; `fastcoop demo --out fastcoop-demo` makes the world and its features, which
are drawn and cached here if they are missing. On an otherwise idle machine the sweep should take between 0.75 and 1.25
times what was expected. On a machine that does other work, pass --jobs 1 and compare the CPU time.
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


def run(command: list[str]) -> tuple[bytes, float, float]:
    """Return what a command prints, its wall time and the CPU time of it and its children, in seconds."""
    import resource

    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return output, time.monotonic() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, nargs="?", default=GRID)
    parser.add_argument("--world", type=Path, required=True, help="folder with data/ and cache/")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="as fastcoop sweep has it"
    )
    parser.add_argument("--jobs", default="-1", help="as fastcoop sweep has it")
    given = parser.parse_args()
    from fastcoop.demo.world import build_world
    from fastcoop.sweeps import cache_grid

    build_world(given.world / "data")
    list(cache_grid(given.grid, data_root=given.world / "data", cache=given.world / "cache"))
    command = [sys.executable, "-m", "fastcoop.cli", "sweep", str(given.grid), "--jobs", given.jobs]
    command += ["--data-root", str(given.world / "data"), "--cache", str(given.world / "cache")]
    command += [word for one in given.overrides for word in ("--set", one)]
    with tempfile.TemporaryDirectory() as temporary:
        command += ["--results", str(Path(temporary) / "results")]
        output, wall, cpu = run([*command, "--dry-run", "--json"])
        expected = json.loads(output)["forecast"]["seconds"]
        print(
            f"the dry run took {wall:.1f} s, {cpu:.1f} s of CPU time, and expects {expected:.1f} s",
            flush=True,
        )
        _, wall, cpu = run(command)
    print(
        f"the sweep took {wall:.1f} s: {wall / expected:.2f} times that; CPU time {cpu:.1f} s: {cpu / expected:.2f}"
    )


if __name__ == "__main__":
    main()
