"""Options that several commands share. An option with several values takes them separated by commas."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from fastcoop.checks import expand_range
from fastcoop.errors import UserError


def comma_list(*names: str, help: str) -> Any:
    """Return an option with several values, ``--name A,B``, that may also be repeated.

    A value that has a comma itself stands in double quotes, as in a CSV file.
    """
    return Option(*names, help=help, metavar="A,B,...", callback=_split)


def _split(values: Sequence[str] | None) -> list[str]:
    rows = csv.reader(values or (), skipinitialspace=True)
    return [one.strip() for row in rows for one in row if one.strip()]


def numbers(text: str, option: str, also: Sequence[str] = ()) -> list[int | str]:
    """Return ``"1,2,5-8"``, the value of ``option``, as whole numbers; pieces in ``also`` stay text."""
    given = [piece.strip() for piece in text.split(",")]
    pieces = [str(one) for piece in given for one in (expand_range(piece) or (piece,))]
    for piece in pieces:
        if not piece.isdecimal() and piece not in also:
            raise UserError(f'Expected {option} to be whole numbers separated by commas, got "{piece}".')
    return [piece if piece in also else int(piece) for piece in pieces]


def shots_and_seeds(shots: str, seeds: str) -> tuple[list[int | str], list[int]]:
    """Return the values of ``--shots``, which may be "all", and of ``--seeds``."""
    return numbers(shots, "--shots", also=["all"]), [int(one) for one in numbers(seeds, "--seeds")]


def _device(value: str) -> str:
    """Refuse a device that this machine does not have, before anything is read or written."""
    if value not in ("auto", "cpu"):
        from fastcoop.backbones.devices import resolve_device

        resolve_device(value)
    return value


def given_options(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Return those of the named options that are on the command line, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in given]


FOUND_BY_NAME = Option(help="The backbone's folder or weights, if its name does not find it.")
BACKBONE = "RN50, MODEL:TAG, hf-hub:ORGANIZATION/NAME or a folder: `fastcoop backbones` lists them."
DEVICE = "Where the towers run: auto (a GPU if there is one), cpu, cuda or cuda:1."
CONDITION = (
    "Only rows with NAME=A,B (or !=, <, <=, >, >=), of a column or setting. Repeatable; all must hold."
)

CLASS_NAMES = "CSV of names for the classes of your own dataset (`fastcoop datasets names`)."

AsJson = Annotated[bool, Option("--json", help="Print JSON, for scripts.")]
BackboneSpec = Annotated[str, Option("--backbone", help=BACKBONE)]
Backbones = Annotated[
    list[str] | None, comma_list("--backbone", help="Backbones that are not found by name.")
]
Cache = Annotated[Path, Option(envvar="FASTCOOP_CACHE", help="Folder of the feature stores.")]
ClassNames = Annotated[Path | None, Option("--class-names", metavar="FILE", help=CLASS_NAMES)]
DataRoot = Annotated[Path, Option(envvar="FASTCOOP_DATA_ROOT", help="Folder of the datasets.")]
Device = Annotated[str, Option(help=DEVICE, callback=_device)]
Dtype = Annotated[str, Option(help="float16 or float32.")]
Recipe = Annotated[str, Option(help='Image transforms: "current" or "official-2021".')]
Results = Annotated[Path, Option("--results", help="The results folder.")]
ResultsFolder = Annotated[Path, Argument(help="A results folder.")]
RunKey = Annotated[str, Argument(help="A run's key, or its beginning.")]
Runs = Annotated[list[str] | None, comma_list("--run", help="Only these runs: keys, or their beginnings.")]
SkipUnreadable = Annotated[bool, Option("--skip-unreadable", help="Leave out images that cannot be decoded.")]
Where = Annotated[list[str] | None, Option(metavar="CONDITION", help=CONDITION)]
