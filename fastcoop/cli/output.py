"""What commands print: lines that a terminal shows literally, or JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import typer

from fastcoop import escape
from fastcoop.errors import UserError


def prepare_streams() -> None:
    """Make printing safe: open closed streams to nowhere, and print the codes of letters that a stream lacks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file opened would become the stream
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: object = "", err: bool = False) -> None:
    """Print one line to standard output (``err``: standard error), control characters as their codes."""
    _print(escape.visible(text), err)


def show(value: Any, lines: Iterable[object], as_json: bool) -> None:
    """Print a command's result: ``value`` as JSON, in which numbers that are not finite are null, or else ``lines``."""
    if as_json:
        text = json.dumps(value, default=_json_value)
        _print(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1))
        return
    for line in lines:
        say(line)


def _json_value(value: Any) -> Any:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else str(value)


def _print(text: str, err: bool = False) -> None:
    try:
        typer.echo(text, err=err)
    except OSError as error:
        _redirect_to_nowhere(sys.stderr if err else sys.stdout)
        if not err and not isinstance(error, BrokenPipeError):
            raise UserError(f"Standard output cannot be written ({error.strerror}); free space.") from None


def flush() -> None:
    """Write buffered output, or drop it if its reader has ended (``| head``)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            _redirect_to_nowhere(stream)


def _redirect_to_nowhere(stream: TextIO) -> None:
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
