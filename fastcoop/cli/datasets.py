"""``datasets`` and ``datasets check``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastcoop.cli.app import datasets_app
from fastcoop.cli.options import AsJson, DataRoot
from fastcoop.cli.output import show

if TYPE_CHECKING:
    from fastcoop.datasets.survey import Check

MAX_LISTED = 20  # missing files printed


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context, data_root: DataRoot = Path("data"), as_json: AsJson = False) -> None:
    """List the datasets in a folder, and whether they are complete.

    Example:  [bold]fastcoop datasets --data-root data[/bold]
    """
    if context.invoked_subcommand is not None:
        return
    from fastcoop.datasets.survey import survey

    found = survey(data_root)
    name, status = (
        max((len(getattr(one, field)) for one in found), default=0) for field in ("name", "status")
    )
    show(
        [{"name": one.name, "place": one.place, "status": one.status} for one in found],
        (f"{one.name:<{name}}  {one.status:<{status}}  {one.place}" for one in found),
        as_json,
    )


@datasets_app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A dataset's name, or a folder.")],
    data_root: DataRoot = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Compare a dataset with Table 6, and print what is missing and where to download it.

    Example:  [bold]fastcoop datasets check oxford_pets --data-root data[/bold]
    """
    from fastcoop.datasets.survey import check_dataset

    found = check_dataset(name, data_root)
    show(asdict(found), _lines(found), as_json)
    if found.problems:
        raise typer.Exit(2)


def _lines(found: Check) -> Iterator[str]:
    yield f"{found.title}  {found.images}"
    for key, (have, expected) in found.counts.items():
        if have or expected:
            yield f"  {key}: {have:,}" + ("" if expected is None else f" of {expected:,}")
    yield from (f"  {problem}" for problem in found.problems)
    yield from (f"  missing: {path}" for path in found.missing[:MAX_LISTED])
    if (more := len(found.missing) - MAX_LISTED) > 0:
        yield f"  missing: {more:,} more (--json lists them all)"
    yield from (f"  to do: {line}" for line in found.advice)
    if not found.problems:
        yield "  all there" + (
            f"; {len(found.notes)} note(s) on standard error, and with --json" if found.notes else ""
        )
