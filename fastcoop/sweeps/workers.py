"""Who does the work on one machine: this process alone, or worker processes (joblib's loky) beside it."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Protocol

import psutil
import torch

from fastcoop.backbones.load import check_device
from fastcoop.checks import amount, shortened, whole_number
from fastcoop.engine.memory import FREE_SHARE, free_bytes
from fastcoop.errors import UserError
from fastcoop.grids.plan import World
from fastcoop.orphans import ProcessPoolExecutor, end_with
from fastcoop.results.batch import Batch
from fastcoop.sweeps import checkpoints
from fastcoop.sweeps.work import Event, Finished, Home, Supplies, Task, Tell, Workshop

SMALL = 20.0  # expected seconds of one core; a worker's start costs about 6
WORKER_BYTES = 700e6  # of a worker with its libraries and a small backbone, beside what training takes
MOST_JOBS = 1024
TICK = 0.5  # seconds between looks at the clock where nothing is told
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Crew(Protocol):
    """Does tasks until there are none left."""

    size: int
    keeps_checkpoints: bool

    def work(self, tasks: deque[Task], tell: Tell, tick: Callable[[], None]) -> None:
        """Do all ``tasks``, in order of beginning; ``tell`` may add more. Everything is told in the calling thread,
        which also calls ``tick`` now and then. Ends at once, whatever is under way, on KeyboardInterrupt."""


@dataclass(frozen=True)
class Team:
    """How many processes do the work, each on its device, and with how many threads. One is this process itself."""

    devices: tuple[str, ...]
    threads: int

    @property
    def size(self) -> int:
        return len(self.devices)


def choose_team(jobs: int, device: str, batches: Sequence[Batch]) -> Team:
    """Processes for these batches: ``jobs`` of them, or for -1 as many as it takes to be quick.

    On a CPU that is a process per core, each of one thread: batches of small towers gain little from a second
    thread, and nothing is shared but memory. Small sweeps are done alone, since a worker takes seconds to start.
    On GPUs it is a process for each.
    """
    cores = available_cores()
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if jobs < 0:
        fit = max(1, int(psutil.virtual_memory().available / WORKER_BYTES))
        wanted = gpus or min(cores, len(batches), fit)
        small = sum(batch.cost for batch in batches) < SMALL
        jobs = 1 if small or device.startswith("cuda:") else max(1, wanted)
    devices = tuple(f"cuda:{number % gpus}" if gpus > 1 else device for number in range(jobs))
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, cores // jobs)
    return Team(devices, min(threads, int(allowed)) if allowed.isdigit() and int(allowed) else threads)


def check_limits(jobs: int, memory_budget: float | None, device: str = "cpu") -> None:
    """Raises UserError for a number of processes or of GB that cannot be, or a device that this machine lacks."""
    if jobs != -1 or isinstance(jobs, bool):
        whole_number(jobs, "the number of jobs (-1: as many as are quickest)", 1, MOST_JOBS)
    if memory_budget is not None:
        amount(memory_budget, "the memory budget in GB")
    check_device(device)


def check_backend(backend: str, address: str | None, jobs: int) -> None:
    """Raises UserError for an unknown backend, or what means nothing beside it."""
    if backend not in ("local", "dask"):
        raise UserError(f'Expected the backend "local" or "dask", got {shortened(backend)}.')
    if address is not None and backend == "local":
        raise UserError("An address is that of a cluster's scheduler; give the backend dask with it.")
    if jobs != -1 and backend == "dask":
        raise UserError("The number of jobs is the cluster's with the backend dask; leave it out.")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sharers_of(jobs: int, device: str) -> int:
    """The most processes that ``choose_team`` would choose: memory is divided among them."""
    return jobs if jobs > 0 else len(_gpus_of(device)) or available_cores()


def budget_of(device: str, memory_budget: float | None, workers: int) -> int:
    """Bytes that a batch's training may take: a worker's part of ``memory_budget`` (GB), or of the free memory.

    Several GPUs are divided among the workers, and the memory of one among those that share it.
    """
    if memory_budget is not None:
        return max(1, int(memory_budget * 1e9 / workers))
    gpus = _gpus_of(device)
    devices = [torch.device(name) for name in gpus[:workers] or ("cpu",)]
    return int(FREE_SHARE * min(map(free_bytes, devices)) / math.ceil(workers / len(gpus or devices)))


def _gpus_of(device: str) -> tuple[str, ...]:
    """The GPUs that a device's name stands for; none for the CPU."""
    if device == "cuda":
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return (device,) if device.startswith("cuda:") else ()


class Alone:
    """This process, with what it has loaded."""

    size = 1
    keeps_checkpoints = True

    def __init__(self, world: World):
        self._home = Home(world)

    def work(self, tasks: deque[Task], tell: Tell, tick: Callable[[], None]) -> None:
        def tell_and_tick(event: Event) -> None:
            tell(event)
            tick()

        while tasks:
            self._home.do(tasks.popleft(), tell_and_tick)


class Workers:
    """Processes on this machine, each with its own supplies, threads and device; one that dies is replaced.

    A process ends when this one does, however that came.
    """

    keeps_checkpoints = True

    def __init__(self, supplies: Supplies, team: Team):
        self.size = team.size
        self._supplies, self._team = supplies, team

    def work(self, tasks: deque[Task], tell: Tell, tick: Callable[[], None]) -> None:
        workers: list[_Worker | None] = [None] * self.size
        try:
            while True:
                for number in range(self.size):
                    worker = workers[number]
                    if tasks and (worker is None or worker.task is None):
                        if worker is None:
                            worker = _Worker(self._supplies, self._team.devices[number], self._team.threads)
                            workers[number] = worker
                        worker.begin(tasks.popleft())
                busy = {worker.connection: n for n, worker in enumerate(workers) if worker and worker.task}
                if not busy:
                    return
                heard = wait(list(busy), TICK)
                for connection, number in busy.items():
                    worker = workers[number]
                    assert worker is not None
                    if connection not in heard and not worker.dead:
                        continue
                    event = worker.next_event()
                    if isinstance(event, Finished) and event.died:
                        workers[number] = None
                    if event is not None:
                        tell(event)
                tick()
        finally:
            for worker in workers:
                if worker is not None:
                    worker.kill()


class _Worker:
    """One process, its task, and the connection to it.

    A task is sent only after the worker has sent its first message and the parent has closed its copy of the worker's
    end. Until then the parent itself keeps the pipe open, and sending more than the buffer of a pipe to a worker that
    died while it started would block forever.
    """

    def __init__(self, supplies: Supplies, device: str, threads: int):
        self.task: Task | None = None
        self._ready = False
        self.connection, self._theirs = Pipe()
        # Read by the numeric libraries when they start, before a worker's first line.
        env = {name: str(threads) for name in THREADS}
        env["OMP_WAIT_POLICY"] = "PASSIVE"
        kind, _, number = device.partition(":")
        if number:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            env["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(number)].strip() if seen else number
        self._executor = ProcessPoolExecutor(1, env=env)
        supplies = replace(supplies, device=kind)
        quiet = logging.root.manager.disable  # as the command line's -q sets it
        self._served = self._executor.submit(
            _serve, self._theirs, supplies, os.getpid(), checkpoints.EVERY, quiet
        )

    @property
    def dead(self) -> bool:
        return self._served.done() and not self.connection.poll()

    def begin(self, task: Task) -> None:
        self.task = task
        if self._ready:
            self._send()

    def _send(self) -> None:
        with suppress(OSError):  # next_event reports that the worker died
            self.connection.send(self.task)

    def next_event(self) -> Event | None:
        """What it says next: of its work, or that it died. Nothing, where it only says that it is there."""
        assert self.task is not None
        try:
            if self.dead:
                raise EOFError
            event = self.connection.recv()
        except (EOFError, OSError):
            batch, self.task = self.task.batch, None
            cause = _cause(self._served.exception())
            self.kill()
            return Finished(batch, error=cause, died=True)
        if event is None:
            # From now on the worker alone holds its end, so its death ends every send and receive here.
            self._theirs.close()
            self._ready = True
            self._send()
        if isinstance(event, Finished):
            self.task = None
        return event

    def kill(self) -> None:
        self.connection.close()
        self._theirs.close()
        self._executor.shutdown(wait=True, kill_workers=True)


def _serve(
    connection: Connection, supplies: Supplies, parent: int, checkpoint_every: float, quiet: int
) -> None:
    """A worker's life: tasks come, what they come to goes back."""
    logging.disable(quiet)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    end_with(parent)
    logging.getLogger("fastcoop.datasets").setLevel(
        logging.ERROR
    )  # the parent has warned of the same datasets
    checkpoints.EVERY = checkpoint_every
    connection.send(None)
    workshop = Workshop(supplies)
    with suppress(EOFError, OSError):  # the parent has gone, or wants no more
        while True:
            workshop.do(connection.recv(), connection.send)


def _cause(error: BaseException | None) -> str:
    """Return why a worker ended: the error that it ended with, or the signal or exit code that loky saw."""
    if error is not None and not isinstance(error, BrokenExecutor):
        return f"the worker process ended with {type(error).__name__}: {error}"
    exits = re.search(r"\{(.+?)\}", str(error))
    how = f" by {exits[1]}" if exits else ""
    hint = "; the system kills processes so when memory runs out" if "SIGKILL" in how else ""
    return f"the worker process was ended{how}{hint}"
