"""Worker processes that do not outlive the one that wants their work."""

from __future__ import annotations

import os
import threading
import time

import psutil

try:
    from joblib.externals.loky import ProcessPoolExecutor
except ImportError:  # a distribution's joblib, beside loky as a package of its own
    from loky import ProcessPoolExecutor

__all__ = ["ProcessPoolExecutor", "end_with"]

WATCH_EVERY = 1.0  # seconds between a worker's looks at whether its parent is still there


def end_with(parent: int) -> None:
    """From now on end this process when process ``parent``, or the one that started it, ends in whatever way."""
    threading.Thread(target=_watch, args=(os.getppid(), parent), daemon=True).start()


def _watch(*parents: int) -> None:
    above = parents[0]
    while os.getppid() == above and all(psutil.pid_exists(parent) for parent in parents):
        time.sleep(WATCH_EVERY)
    os._exit(1)
