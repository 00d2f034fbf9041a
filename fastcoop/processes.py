"""The pool of worker processes, and their end when the parent process dies."""

from __future__ import annotations

import os
import threading
import time

import psutil

try:
    from joblib.externals.loky import ProcessPoolExecutor as ProcessPoolExecutor
except ImportError:  # a distribution's joblib, with loky as a package of its own
    from loky import ProcessPoolExecutor as ProcessPoolExecutor

CHECK_EVERY = 1.0  # seconds


def exit_with_parent(pid: int) -> None:
    """Exit this process as soon as process ``pid``, or the one that started this process, has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent) and psutil.pid_exists(pid):
            time.sleep(CHECK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
