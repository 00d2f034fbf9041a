"""What commands print: lines that a terminal shows as they are, and JSON that any reader takes."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import typer

from fastcoop import escape
from fastcoop.errors import UserError


def prepare_streams() -> None:
    """Make printing safe: closed streams go nowhere, and letters that a stream lacks show their codes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would be taken for the stream
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: object = "", err: bool = False) -> None:
    """Print one line to standard output (``err``: standard error), control characters as their codes."""
    _print(escape.visible(text), err)


def say_json(value: Any) -> None:
    """Print ``value`` as JSON; numbers that are not finite, which JSON does not have, as null."""
    _print(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _print(text: str, err: bool = False) -> None:
    try:
        typer.echo(text, err=err)
    except OSError as error:
        _drop(sys.stderr if err else sys.stdout)
        if not err and not isinstance(error, BrokenPipeError):
            raise UserError(f"Standard output cannot be written ({error.strerror}); free space.") from None


def flush() -> None:
    """Write out what is printed; where nobody reads it any more (``| head``), drop it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Let a stream go nowhere, also what it still holds."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
