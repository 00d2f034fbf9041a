"""The application with all commands, and its errors as one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import warnings
from typing import Any

import typer

from fastcoop.cli import bench, data, exchange, results, study, sweep  # noqa: F401
from fastcoop.cli.groups import app
from fastcoop.cli.output import flush, prepare_streams, say
from fastcoop.errors import FastcoopError

# click's, which some versions of typer bundle.
CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(arguments: list[str] | None = None) -> int:
    """Run the command line. Input that cannot be used is one sentence on standard error and exit code 2."""
    # Read by torch's thread pool when it starts. On a shared machine, threads that spin while they wait make
    # training many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # open_clip downloads weights from a model hub. Send it no usage statistics.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    prepare_streams()
    code, problem = 2, ""
    try:
        with warnings.catch_warnings():
            # fastcoop refuses such an image in one line.
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            code = app(arguments, prog_name="fastcoop", standalone_mode=False) or 0
    except SystemExit:  # click, when the reader of its help has ended (`| head`)
        code = 0
    except CommandLineError as error:
        code = error.exit_code
        if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help
            command = error.ctx.command_path if getattr(error, "ctx", None) else "fastcoop"
            sentence = " ".join(error.format_message().split()).removesuffix(".")
            separator = "" if sentence.endswith("?") else ";"
            problem = f"{sentence}{separator} `{command} --help` shows what it takes."
    except FastcoopError as error:
        problem = str(error)
    except UnicodeError as error:
        problem = _encoding_problem(error)
    except OSError as error:
        if error.filename is not None and error.strerror is not None:
            problem = f"{error.filename!r} cannot be used: {error.strerror}."
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = (
                f"There is no room to write to ({error.strerror}); free space and run the command again."
            )
        elif "temporary directory" in str(error):  # on import of torch
            problem = f"{error.strerror}; free space there, or set TMPDIR to another folder."
        else:
            raise
    for number, line in enumerate(problem.split("\n") if problem else ()):
        say(line if number else f"fastcoop: {line}", err=True)
    flush()
    return code


def _encoding_problem(error: UnicodeError) -> str:
    """Return what to do about text that cannot be written, or bytes that are not text."""
    if isinstance(error, UnicodeEncodeError) and error.encoding.replace("_", "-").lower() != "utf-8":
        return (
            f"This system's locale has no way to write {error.object!r} ({error.encoding}); "
            "set PYTHONUTF8=1, or a locale of UTF-8, and run the same command again."
        )
    return f"A name or a file is not UTF-8 ({error}); rename or convert it."
