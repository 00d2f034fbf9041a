"""The pool of worker processes, and their end when the parent process dies."""

from __future__ import annotations

import os
import threading
import time

import psutil

try:
    from joblib.externals.loky import ProcessPoolExecutor
except ImportError:  # a distribution's joblib, with loky as a package of its own
    from loky import ProcessPoolExecutor

__all__ = ["ProcessPoolExecutor", "exit_with_parent"]

CHECK_EVERY = 1.0  # seconds


def exit_with_parent(pid: int) -> None:
    """Exit this process as soon as process ``pid``, or the one that started this process, has ended."""
    threading.Thread(target=_watch, args=(os.getppid(), pid), daemon=True).start()


def _watch(*pids: int) -> None:
    parent = pids[0]
    while os.getppid() == parent and all(psutil.pid_exists(pid) for pid in pids):
        time.sleep(CHECK_EVERY)
    os._exit(1)
