"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.errors import UserError

DataRoot = Annotated[Path, typer.Option(help="Folder that holds the datasets.")]
Cache = Annotated[Path, typer.Option(help="Folder of the feature stores.")]


def _device(value: str) -> str:
    """Refuse a device that this machine does not have, before anything is read or written."""
    if value != "cpu":
        from fastcoop.backbones.load import check_device

        check_device(value)
    return value


Device = Annotated[str, typer.Option(help='Where the towers run: "cpu" or "cuda".', callback=_device)]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be decoded, and say which.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
BackboneSpec = Annotated[
    str,
    typer.Option(
        "--backbone", help="RN50, ViT-B/16, MODEL:TAG, demo-resnet, or a folder with config and weights."
    ),
]


def without_effect(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Which of these options were given on the command line, as one writes them."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in given]


def numbers(text: str, what: str) -> list[int | str]:
    """``"1,2,all"`` as a list."""
    values: list[int | str] = []
    for piece in text.split(","):
        piece = piece.strip()
        if piece == "all" and what == "shots":
            values.append("all")
        elif piece.isdecimal():
            values.append(int(piece))
        else:
            raise UserError(f'--{what} should be whole numbers separated by commas; "{piece}" came.')
    return values
