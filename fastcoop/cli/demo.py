"""``demo``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson
from fastcoop.cli.output import show


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path("fastcoop-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="All figures, both backbones, the paper's schedule: 1 to 2 hours.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a small study on the demo datasets, from pictures to Figure 3.

    It needs no network, no GPU and no data. A second call finds everything done.

    Example:  [bold]fastcoop demo[/bold]
    """
    from fastcoop.demo.run import run_demo

    shown = run_demo(out, full)
    show(dataclasses.asdict(shown) if as_json else None, str(shown).split("\n"), as_json)
