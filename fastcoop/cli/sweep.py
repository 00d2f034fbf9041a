"""``sweep``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from fastcoop.cli.app import INTERRUPTED, app
from fastcoop.cli.options import AsJson, Cache, DataRoot, Device, SkipUnreadable, without_effect
from fastcoop.cli.output import say, say_json
from fastcoop.errors import UserError

if TYPE_CHECKING:
    from fastcoop.sweeps import Summary
    from fastcoop.sweeps.dry_run import DryRun

log = logging.getLogger("fastcoop")

NAMED = 10  # so many runs are named, further ones counted
# Options that only print, and those that have no effect beside them.
IDLE = {
    "show_grid": (
        *("data_root", "cache", "results", "dry_run", "memory_budget", "device", "jobs", "retry_failed"),
        *("skip_unreadable", "backend", "address"),
    ),
    "dry_run": ("skip_unreadable", "backend", "address"),
}
FAILED = 1  # the exit code where runs failed


class Backend(str, Enum):
    """Who does the work."""

    local = "local"
    dask = "dask"


@app.command()
def sweep(
    context: typer.Context,
    grid: Annotated[Path, typer.Argument(help="The grid file.")],
    data_root: DataRoot = Path("data"),
    cache: Cache = Path("cache"),
    results: Annotated[Path | None, typer.Option(help="Results folder (results/<grid name>).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value in place of the grid's.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this method, or block; may be given again.")
    ] = None,
    show_grid: Annotated[
        bool, typer.Option("--show-grid", help="Only print the grid as it is understood, with all defaults.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would run, and what time and memory it will take."),
    ] = False,
    memory_budget: Annotated[float | None, typer.Option(help="GB that training may take at once.")] = None,
    device: Device = "cpu",
    jobs: Annotated[
        int,
        typer.Option(help="Processes to work with; -1 is as many as are quickest, 1 none beside this one."),
    ] = -1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try runs again that failed.")] = False,
    skip_unreadable: SkipUnreadable = False,
    backend: Annotated[
        Backend, typer.Option(help="Who does the work: this machine, or a Dask cluster (docs/cluster.md).")
    ] = Backend.local,
    address: Annotated[
        str | None, typer.Option(help="Of the cluster's scheduler, as tcp://HOST:8786 or a scheduler file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every experiment of a grid file that is not done yet.

    Features that are missing are cached first. Interrupt it when you like: the same command goes on.

    A grid names backbones, datasets, shots, seeds and methods with their settings, and crosses them: docs/grids.md.

    Example:  [bold]fastcoop sweep experiments/photographs.yaml --set shots=1,16[/bold]

    Example:  [bold]fastcoop sweep experiments/fig3.yaml --only coop --set methods.coop.epochs=20 --dry-run[/bold]
    """
    from fastcoop.sweeps import sweep as run_sweep
    from fastcoop.sweeps.sweep import results_folder

    asked = "show_grid" if show_grid else "dry_run" if dry_run else ""
    if idle := without_effect(context, IDLE.get(asked, ())):
        log.warning("Beside --%s these change nothing: %s.", asked.replace("_", "-"), ", ".join(idle))
    if show_grid:
        from fastcoop.grids import read_grid
        from fastcoop.grids.shown import grid_text

        text = grid_text(read_grid(grid, overrides or (), only or ()))
        if as_json:
            say_json(yaml.safe_load(text))
            return
        for line in text.split("\n"):
            say(line)
        return
    if dry_run:
        from fastcoop.sweeps.dry_run import dry_run as plan

        _say_planned(
            plan(
                grid, data_root=data_root, cache=cache, results=results, overrides=overrides or (), only=only or (),
                memory_budget=memory_budget, device=device, jobs=jobs, retry_failed=retry_failed,
            ),
            as_json,
        )  # fmt: skip
        return
    try:
        summary = run_sweep(
            grid, data_root=data_root, cache=cache, results=results, overrides=overrides or (), only=only or (),
            memory_budget=memory_budget, device=device, jobs=jobs, retry_failed=retry_failed, backend=backend.value,
            address=address, skip_unreadable=skip_unreadable,
        )  # fmt: skip
    except KeyboardInterrupt:
        _report_stop(results_folder(grid, results))
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        say_json(summary.as_json())
    else:
        _say_summary(summary)
    if summary.diverged:
        log.warning("%d runs diverged; they are marked in the results.", summary.diverged)
    for line in _some(summary.collapsed):
        log.warning("Far below the other seeds of its setting, though its loss is finite: %s", line)
    for line in _some([f"{key[:12]}: {error}" for key, error in summary.failed.items()]):
        say(f"failed: {line}", err=True)
    if summary.failed:
        say(
            f"{len(summary.failed)} runs failed; --retry-failed tries them again, all others are done.",
            err=True,
        )
        raise typer.Exit(FAILED)


def _say_summary(summary: Summary) -> None:
    _say_counts(summary)
    say(
        f"finished {summary.finished} of {summary.runs} runs; {summary.done_before} were done before: "
        f"{summary.results}"
    )
    if summary.finished:
        say(
            f"{summary.seconds:.0f} s by {summary.workers} process{'es' * (summary.workers > 1)}; "
            f"{summary.engine_share:.0%} of their time in the engine's steps; "
            f"at most {summary.peak_memory / 1e9:.1f} GB of memory together"
        )


def _report_stop(folder: Path) -> None:
    """Print how many runs an interrupted sweep leaves behind."""
    from fastcoop.results.read import load_score_inputs

    try:
        done = len(load_score_inputs(folder))
    except UserError:  # stopped before there was a results folder
        done = 0
    say(f"Stopped. {done} runs are done and kept in {folder}; the same command goes on from there.", err=True)


def _say_counts(summary: Summary) -> None:
    for count in summary.counts:
        say(f"{count.backbone}  {count.dataset}  {count.method}: {count.runs} runs, {count.done} done before")


def _say_planned(planned: DryRun, as_json: bool) -> None:
    summary = planned.summary
    if as_json:
        say_json(planned.as_json())
        return
    _say_counts(summary)
    if planned.failed:
        say(f"{planned.failed} runs failed before; --retry-failed tries them again")
    for line in planned.forecast.lines() if planned.forecast else ():
        say(line)
    say(
        f"would run {planned.left} of {summary.runs} runs; {summary.done_before} were done before: "
        f"{summary.results}"
    )


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - NAMED
    return [*lines[:NAMED], *([f"and {more} more"] if more > 0 else [])]
