"""Run a measurement in a fresh process, as the official code runs each experiment.

A process that has measured other datasets for an hour holds gigabytes of freed memory in fragments. In such a process
the official method was faster, fastcoop slower, and fewer classes fitted than in a fresh one.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any, TypeVar

import torch

from fastcoop.errors import UserError
from fastcoop.orphans import ProcessPoolExecutor, exit_with_parent

Result = TypeVar("Result")


def run_in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """Return ``function(*args)``, computed in a new process with as many threads as this one.

    Raises:
        UserError: the system ended the process, as it does when memory runs out.
    """
    pool = ProcessPoolExecutor(1)
    try:
        # Pickled here, because tensors sent between processes use shared memory, which may be small.
        call = pickle.dumps((function, args))
        threads, log_level = torch.get_num_threads(), logging.root.manager.disable
        return pool.submit(_call, os.getpid(), threads, log_level, call).result()
    except BrokenExecutor:
        raise UserError(
            "The system ended the process that measured, as it does when memory runs out; "
            "measure fewer or smaller lists of class names (--datasets)."
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _call(parent: int, threads: int, log_level: int, pickled: bytes) -> Any:
    logging.disable(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent(parent)
    torch.set_num_threads(threads)
    function, args = pickle.loads(pickled)
    return function(*args)
