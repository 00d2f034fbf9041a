"""The command line: one function per command. Everything else is in the other packages."""

from __future__ import annotations

import sys
from typing import NoReturn

from fastcoop.cli.interrupts import INTERRUPTED, handling_ctrl_c, say_stopped


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with a code of docs/exit-codes.md."""
    try:
        with handling_ctrl_c(ends_process=arguments is None):
            from fastcoop.cli.app import run  # within the block: this takes long enough to be interrupted

            code = run(arguments)
    except KeyboardInterrupt:
        say_stopped()
        code = INTERRUPTED
    sys.exit(code)
