"""Ctrl-C: the command ends with one line and exit code 130, whatever code it arrives in."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130  # the exit code of shells for Ctrl-C
STOPPED = "Stopped. Finished work is kept; the same command continues it."
RETRY_AFTER = 0.01  # seconds

interrupted = threading.Event()  # KeyboardInterrupt was raised, which libraries may replace by other errors


@contextmanager
def handling_ctrl_c(ends_process: bool) -> Iterator[None]:
    """Handle Ctrl-C in the block, unless something else does, or it is ignored as in the background of a shell.

    Args:
        ends_process: Whether the process ends after the block: Ctrl-C then ends it at once, as libraries that only
            clean up would print tracebacks.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted.clear()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if ends_process else handler)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not where libraries or Python would swallow or replace it."""
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
        if name == "__del__" or module in ("weakref", "_weakrefset"):
            # Python prints and ignores the exceptions of finalizers.
            _thread.start_new_thread(_interrupt_again, ())
            return
        if module == "importlib._bootstrap":
            # An exception within an import may be caught there, become another error, or abort the process in C++.
            say_stopped()
            os._exit(INTERRUPTED)
        if module == __package__:
            break
        frame = frame.f_back
    interrupted.set()
    raise KeyboardInterrupt


def _interrupt_again() -> None:
    time.sleep(RETRY_AFTER)
    _thread.interrupt_main()


def say_stopped() -> None:
    """Print the one line, with nothing but the system."""
    with suppress(OSError):
        os.write(2, f"{STOPPED}\n".encode())
