"""The application that commands join."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastcoop import escape
from fastcoop.cli.output import say

INTERRUPTED = 130  # the exit code of shells for Ctrl-C

# As a study goes; commands that are not named come last.
ORDER = (
    "demo",
    "datasets",
    "cache-features",
    "features",
    "sweep",
    "results",
    "evaluate",
    "report",
    "interpret",
)


class InOrder(TyperGroup):
    """Lists its commands in the order in which a study uses them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("Stopped. What was written is whole; the same command does what is left.", err=True)
            raise typer.Exit(INTERRUPTED) from None

    def list_commands(self, ctx: Any) -> list[str]:
        names = list(self.commands)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="fastcoop",
    cls=InOrder,
    help="Prompt learning for CLIP (CoOp): features once, then thousands of runs together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
features_app = typer.Typer(help="Look into feature stores.", no_args_is_help=True)
datasets_app = typer.Typer()
results_app = typer.Typer(help="Look into results folders.", no_args_is_help=True)
app.add_typer(features_app, name="features")
app.add_typer(datasets_app, name="datasets")
app.add_typer(results_app, name="results")


def _version(asked: bool) -> None:
    if asked:
        from fastcoop import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done; 1 some runs failed, or a fault of fastcoop's own; 2 something given cannot be used, "
    "and one sentence says what; 130 interrupted."
)
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("fastcoop").setLevel(logging.DEBUG if verbose else logging.WARNING)
    # Libraries set their own loggers' levels when they are imported; this holds whatever they set.
    logging.disable(logging.WARNING if quiet else logging.NOTSET)
    if quiet:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"  # of worker processes


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape.visible(super().format(record), keep="\n")


def reflow_help() -> None:
    """Let a terminal break the lines of every command's help; paragraphs stay."""
    for command in _commands(app):
        text = inspect.getdoc(command.callback) if command.callback else None
        if text and not command.help:
            command.help = "\n\n".join(" ".join(part.split("\n")) for part in text.split("\n\n"))


def _commands(group: typer.Typer) -> Iterator[Any]:
    yield from group.registered_commands
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            yield from _commands(inner.typer_instance)
