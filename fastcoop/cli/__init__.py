"""The command line: one thin function per command. Logic lives in the rooms."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer

from fastcoop.cli import (  # noqa: F401  each adds its commands
    bench,
    datasets,
    demo,
    evaluate,
    exchange,
    features,
    report,
    results,
    sweep,
)
from fastcoop.cli.app import app, reflow_help
from fastcoop.errors import UserError

reflow_help()


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: a UserError is one sentence on standard error and exit code 2, and so is what the system says
    of a file that it does not let us use."""
    # Read by torch's thread pool when it starts: on a shared machine, threads that spin while they wait for one that
    # lost its core make training many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Weights are fetched from the hub that open_clip names; nothing else is told to it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            # Pillow's two lines about an image that is refused in one of ours.
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            app(arguments)
    except UserError as error:
        typer.echo(f"fastcoop: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        typer.echo(f"fastcoop: {error.filename!r} cannot be used: {error.strerror}.", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
