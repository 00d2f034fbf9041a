"""``results``: what is in a results folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import results_app
from fastcoop.cli.options import AsJson
from fastcoop.errors import UserError


@results_app.command("list")
def list_results(
    results: Annotated[Path, typer.Argument(help="A results folder.")], as_json: AsJson = False
) -> None:
    """Show every run: what it was, its accuracy, and the beginning of its key."""
    from fastcoop.sweeps import load_results

    frame = load_results(results)
    columns = ["key", "backbone", "dataset", "label", "shots", "seed", "accuracy", "status", "seconds"]
    if as_json:
        typer.echo(frame[columns].to_json(orient="records", indent=1))
    else:
        shown = frame[columns].assign(key=frame.key.str[:12])
        typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.2f}"))


@results_app.command("export")
def export_results(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    to: Annotated[Path, typer.Argument(help="The file to write, .csv or .parquet.")],
) -> None:
    """Write the results table as tidy CSV or Parquet.

    Example:  [bold]fastcoop results export results/demo demo.csv[/bold]
    """
    from fastcoop.sweeps import load_results

    frame = load_results(results)
    if to.suffix == ".csv":
        frame.to_csv(to, index=False)
    elif to.suffix == ".parquet":
        try:
            frame.to_parquet(to, index=False)
        except ImportError:
            raise UserError("Writing Parquet needs pyarrow; install it, or export to a .csv file.") from None
    else:
        raise UserError(
            f"Results are exported to .csv or .parquet, not to {to.name}; choose one of those endings."
        )
    typer.echo(f"{len(frame)} rows: {to}")


@results_app.command("merge")
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Results folders to add.")],
    into: Annotated[Path, typer.Option(help="The folder they are added to.")],
) -> None:
    """Add the runs of several results folders to one, by key; conflicts are named.

    Example:  [bold]fastcoop results merge results/machine-a results/machine-b --into results/all[/bold]
    """
    from fastcoop.sweeps import merge_results

    typer.echo(f"{merge_results(folders, into)} runs added to {into}")
