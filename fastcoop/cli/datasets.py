"""``datasets``: which there are, and whether they are complete."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import datasets_app
from fastcoop.cli.options import AsJson, DataRoot
from fastcoop.cli.output import say, say_json

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
        say_json([{"name": f.name, "place": f.place, "status": f.status} for f in found])
        return
    name, status = (max(len(getattr(one, field)) for one in found) for field in ("name", "status"))
    for one in found:
        say(f"{one.name:<{name}}  {one.status:<{status}}  {one.place}")


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
        say_json(asdict(found))
    else:
        say(f"{found.title}  {found.images}")
        for key, (have, expected) in found.counts.items():
            if have or expected:
                say(f"  {key}: {have:,}" + ("" if expected is None else f" of {expected:,}"))
        more = len(found.missing) - LISTED
        missing = [f"missing: {path}" for path in found.missing[:LISTED]]
        missing += [f"missing: {more:,} more (--json lists them all)"] if more > 0 else []
        for line in (*found.problems, *missing, *(f"to do: {line}" for line in found.advice)):
            say(f"  {line}")
        if not found.problems:
            notes = f"; {len(found.notes)} note(s) on standard error, and with --json" if found.notes else ""
            say(f"  all there{notes}")
    if found.problems:
        raise typer.Exit(2)
