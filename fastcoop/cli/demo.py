"""The demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson
from fastcoop.cli.output import say, say_json


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder that everything goes into.")] = Path("fastcoop-demo"),
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="All figures and tables, both backbones, the paper's schedule: 1 to 2 hours."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the main job on the small world that ships with fastcoop: from pictures to Figure 3.

    Needs no network, no GPU and no data; a second call finds everything done.

    Example:  [bold]fastcoop demo[/bold]
    """
    from fastcoop.demo.run import run_demo

    shown = run_demo(out, full)
    if as_json:
        say_json(dataclasses.asdict(shown))
        return
    for line in str(shown).split("\n"):
        say(line)
