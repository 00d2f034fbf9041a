"""The pool of worker processes, their end when the parent process dies, and the processor that they run on."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil

try:
    from joblib.externals import loky
except ImportError:  # a distribution's joblib, with loky as a package of its own
    import loky

CHECK_EVERY = 1.0  # seconds


class ProcessPoolExecutor(loky.ProcessPoolExecutor):
    """loky's, whose workers Ctrl-C never reaches: while they start, it would end them with a traceback each."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().submit(*args, **kwargs)
        resource_tracker.ensure_running()  # its start unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process inherits
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent(pid: int) -> None:
    """Exit this process as soon as process ``pid``, or the one that started this process, has ended.

    Until then ignore Ctrl-C, which the parent handles.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent) and psutil.pid_exists(pid):
            time.sleep(CHECK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's model, or its architecture where the system does not name it."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    facts = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(": ")[2] for line in facts if line.startswith("model name")]
    return models[0] if models else platform.machine()
