"""The application and its groups, which commands are added to, and the options of all commands."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from fastcoop import escape
from fastcoop.cli.interrupts import INTERRUPTED, STOPPED, interrupted
from fastcoop.cli.output import say

# The order in which a study uses them; other commands follow.
ORDER = [
    "demo", "datasets", "backbones", "cache-features", "features", "sweep", "results", "evaluate", "report",
    "interpret",
]  # fmt: skip


class StudyOrder(TyperGroup):
    """A group whose help lists commands in the order in which a study uses them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) and not interrupted.is_set():
                raise
            say(STOPPED, err=True)
            raise typer.Exit(INTERRUPTED) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="fastcoop",
    cls=StudyOrder,
    help="Prompt learning for CLIP (CoOp): cache image features once, then train thousands of runs together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
features_app = typer.Typer(help="Check and import feature stores.", no_args_is_help=True)
datasets_app = typer.Typer()
results_app = typer.Typer(help="List, compare, export and merge results.", no_args_is_help=True)
app.add_typer(features_app, name="features")
app.add_typer(datasets_app, name="datasets")
app.add_typer(results_app, name="results")


def _print_version(asked: bool) -> None:
    if asked:
        from fastcoop import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done; 1 some runs failed, or fastcoop has a fault; 2 an argument or input cannot be used, "
    "and one sentence names it; 130 interrupted."
)
def _configure(
    verbose: Annotated[bool, Option("--verbose", "-v", help="Print more.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print errors only.")] = False,
    version: Annotated[
        bool, Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_LiteralText())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("fastcoop").setLevel(logging.DEBUG if verbose else logging.WARNING)
    # Libraries set the levels of their own loggers when they are imported.
    logging.disable(logging.WARNING if quiet else logging.NOTSET)
    if quiet:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"  # for worker processes


class _LiteralText(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape.visible(super().format(record), keep="\n")
