"""A measurement in a process of its own, as fresh as an experiment's the official way.

After an hour of other datasets' steps a process holds gigabytes that it gives to none but itself, in pieces: there the
official way was seen to be quicker than in a fresh process, fastcoop slower, and fewer classes fitted.
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


def apart(function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)`` from a new process, with as many threads as this one.

    Raises what the function raises, and UserError where the system ends the process.
    """
    pool = ProcessPoolExecutor(1)
    try:
        # Pickled here: tensors that processes hand each other would go through shared memory, which may be small.
        call = pickle.dumps((function, args))
        return pool.submit(
            _call, os.getpid(), torch.get_num_threads(), logging.root.manager.disable, call
        ).result()
    except BrokenExecutor:
        raise UserError(
            "The process that measured was ended by the system, which does so when memory runs out; "
            "measure fewer or smaller lists of class names (--datasets)."
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _call(parent: int, threads: int, quiet: int, pickled: bytes) -> Any:
    logging.disable(quiet)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    exit_with_parent(parent)
    torch.set_num_threads(threads)
    function, args = pickle.loads(pickled)
    return function(*args)
