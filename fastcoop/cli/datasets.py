"""``datasets``: which there are, and whether they are complete."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import datasets_app
from fastcoop.cli.options import AsJson, DataRoot

LISTED = 20  # missing files named on the screen


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context, data_root: DataRoot = Path("data"), as_json: AsJson = False) -> None:
    """Say which datasets there are, and whether they are complete.

    Example:  [bold]fastcoop datasets --data-root data[/bold]
    """
    if context.invoked_subcommand is not None:
        return
    from fastcoop.datasets.survey import survey

    found = survey(data_root)
    if as_json:
        typer.echo(
            json.dumps([{"name": f.name, "place": str(f.place), "status": f.status} for f in found], indent=1)
        )
        return
    name, status = (max(len(getattr(one, field)) for one in found) for field in ("name", "status"))
    for one in found:
        typer.echo(f"{one.name:<{name}}  {one.status:<{status}}  {one.place}")


@datasets_app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A dataset's name, or a folder.")],
    data_root: DataRoot = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Compare a dataset with Table 6, name what is missing, and say what to download.

    Example:  [bold]fastcoop datasets check oxford_pets --data-root data[/bold]
    """
    from fastcoop.datasets.survey import check_dataset

    found = check_dataset(name, data_root)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, default=str))
    else:
        typer.echo(f"{found.title}  {found.images}")
        for key, (have, expected) in found.counts.items():
            if have or expected:
                typer.echo(f"  {key}: {have:,}" + ("" if expected is None else f" of {expected:,}"))
        more = len(found.missing) - LISTED
        missing = [f"missing: {path}" for path in found.missing[:LISTED]]
        missing += [f"missing: {more:,} more (--json lists them all)"] if more > 0 else []
        for line in (*found.problems, *missing, *(f"to do: {line}" for line in found.advice)):
            typer.echo(f"  {line}")
        if not found.problems:
            notes = f"; {len(found.notes)} note(s) on standard error, and with --json" if found.notes else ""
            typer.echo(f"  all there{notes}")
    if found.problems:
        raise typer.Exit(2)
