"""``sweep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson, Cache, DataRoot, Device


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="The grid file.")],
    data_root: DataRoot = Path("data"),
    cache: Cache = Path("cache"),
    results: Annotated[Path | None, typer.Option(help="Results folder (results/<grid name>).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value in place of the grid's.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this method; may be given again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    memory_budget: Annotated[float | None, typer.Option(help="GB that training may take at once.")] = None,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option(help="Processes for linear probes; -1 is one per core.")] = -1,
    as_json: AsJson = False,
) -> None:
    """Run every experiment of a grid file that is not done yet.

    Features that are missing are cached first. Interrupt it when you like: the same command goes on.

    Example:  [bold]fastcoop sweep experiments/photographs.yaml --set shots=1,16[/bold]
    """
    from fastcoop.sweeps import sweep as run_sweep

    summary = run_sweep(
        grid, data_root=data_root, cache=cache, results=results, overrides=overrides or (), only=only or (),
        dry_run=dry_run, memory_budget=memory_budget, device=device, jobs=jobs,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(summary.as_json(), indent=1))
        return
    for count in summary.counts:
        typer.echo(
            f"{count.backbone}  {count.dataset}  {count.method}: {count.runs} runs, {count.done} done before"
        )
    doing = "would run" if dry_run else "finished"
    number = summary.runs - summary.done_before if dry_run else summary.finished
    typer.echo(
        f"{doing} {number} of {summary.runs} runs; {summary.done_before} were done before: {summary.results}"
    )
    if summary.diverged:
        typer.echo(f"{summary.diverged} runs diverged; they are marked in the results.", err=True)
