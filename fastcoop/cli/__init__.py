"""The command line: one function per command. Everything else is in the other packages."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Any

import typer

from fastcoop.cli import bench, datasets, demo, exchange, features, report, results, sweep  # noqa: F401
from fastcoop.cli.app import app, prepare_help
from fastcoop.cli.output import flush, prepare_streams, say
from fastcoop.errors import FastcoopError

prepare_help()

# click's, which some versions of typer bundle.
CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with a code of docs/exit-codes.md.

    Input that cannot be used is one sentence on standard error and exit code 2.
    """
    # Read by torch's thread pool when it starts. On a shared machine, threads that spin while they wait make
    # training many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # open_clip downloads weights from a model hub. Send it no usage statistics.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    prepare_streams()
    try:
        with warnings.catch_warnings():
            # fastcoop refuses such an image in one line.
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            code = app(arguments, prog_name="fastcoop", standalone_mode=False) or 0
    except CommandLineError as error:
        code = error.exit_code
        if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help
            _refuse(_usage_error(error))
    except FastcoopError as error:
        code = _refuse(error)
    except UnicodeError as error:
        code = _refuse(_encoding_error(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            code = _refuse(
                f"There is no room to write to ({error.strerror}); free space and run the command again."
            )
        elif error.filename is None or error.strerror is None:
            raise
        else:
            code = _refuse(f"{error.filename!r} cannot be used: {error.strerror}.")
    flush()
    sys.exit(code)


def _refuse(sentence: object) -> int:
    for number, line in enumerate(str(sentence).split("\n")):
        say(line if number else f"fastcoop: {line}", err=True)
    return 2


def _usage_error(error: Any) -> str:
    sentence = " ".join(error.format_message().split()).removesuffix(".")
    command = error.ctx.command_path if getattr(error, "ctx", None) else "fastcoop"
    return f"{sentence}; `{command} --help` shows what it takes."


def _encoding_error(error: UnicodeError) -> str:
    """Return what to do about text that cannot be written, or bytes that are not text."""
    if isinstance(error, UnicodeEncodeError) and error.encoding.replace("_", "-").lower() != "utf-8":
        return (
            f"This system's locale has no way to write {error.object!r} ({error.encoding}); "
            "set PYTHONUTF8=1, or a locale of UTF-8, and run the same command again."
        )
    return f"A name or a file is not UTF-8 ({error}); rename or convert it."
