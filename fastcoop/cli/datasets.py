"""``datasets``: which there are, and whether they are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import datasets_app
from fastcoop.cli.options import AsJson, DataRoot


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context, data_root: DataRoot = Path("data"), as_json: AsJson = False) -> None:
    """List the datasets and what of them is under the data root.

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
    width = max(len(one.name) for one in found)
    for one in found:
        typer.echo(f"{one.name:<{width}}  {one.status:<24}  {one.place}")


@datasets_app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A dataset's name, or a folder.")],
    data_root: DataRoot = Path("data"),
) -> None:
    """Compare a dataset with Table 6, name what is missing, and say what to download.

    Example:  [bold]fastcoop datasets check oxford_pets --data-root data[/bold]
    """
    from fastcoop.datasets.survey import check_dataset

    found = check_dataset(name, data_root)
    typer.echo(f"{found.title}  {found.images}")
    for key, (have, expected) in found.counts.items():
        typer.echo(f"  {key}: {have:,}" + ("" if expected is None else f" of {expected:,}"))
    for line in (*found.problems, *(f"missing: {path}" for path in found.missing[:20]), *found.advice):
        typer.echo(f"  {line}")
    if found.problems:
        raise typer.Exit(2)
