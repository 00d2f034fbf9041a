"""Executors on one machine: this process, or worker processes beside it; and how many of those to use."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Protocol

import psutil

from fastcoop.checks import MAX_JOBS, amount, shortened, whole_number
from fastcoop.engine.fit import FREE_FRACTION, free_bytes
from fastcoop.errors import UserError
from fastcoop.methods import FeatureBank
from fastcoop.processes import ProcessPoolExecutor, available_cores, exit_with_parent
from fastcoop.results.records import Batch
from fastcoop.sweeps import checkpoints
from fastcoop.sweeps.tasks import BatchFinished, Event, OnEvent, Task, WorkerBank, WorkerSpec, run_task

SMALL_SWEEP = 20.0  # expected seconds of one core; starting a worker takes about 6, or 2 without towers
WORKER_BYTES = 700e6  # a worker with its libraries and a small backbone, without what training takes
TICK = 0.5  # seconds between calls of on_tick while no event arrives
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Executor(Protocol):
    """Runs tasks: `SerialExecutor`, `ProcessExecutor` or `fastcoop.sweeps.cluster.ClusterExecutor`.

    Attributes:
        size: Number of processes that run tasks.
        keeps_checkpoints: Whether they can write into the results folder.
    """

    size: int
    keeps_checkpoints: bool

    def run(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        """Run ``tasks``, started in order, until there are none.

        ``on_event`` may append tasks. It is called in the calling thread, which also calls ``on_tick`` every now and
        then. On any exception, such as KeyboardInterrupt, running tasks are stopped at once.
        """


@dataclass(frozen=True)
class ExecutorConfig:
    """Worker processes: the device of each, and threads per process. A single one is this process itself."""

    devices: tuple[str, ...]
    threads: int

    @property
    def size(self) -> int:
        return len(self.devices)


def choose_team(jobs: int, device: str, batches: Sequence[Batch]) -> ExecutorConfig:
    """Choose the processes for ``batches``: ``jobs`` of them, or for -1 the number that is fastest.

    On a CPU that is one process of one thread per core: batches of small towers gain little from a second thread, and
    processes share nothing but memory. Small sweeps run in this process, since a worker takes seconds to start. With
    GPUs it is one process per GPU; more share them, and `budget_of` divides the memory of each.
    """
    cores, gpus = available_cores(), _gpus_of(device)
    if jobs < 0:
        fit = max(1, int(psutil.virtual_memory().available / WORKER_BYTES))
        small = sum(batch.cost for batch in batches) < SMALL_SWEEP
        jobs = 1 if small else len(gpus) or max(1, min(cores, len(batches), fit))
    devices = tuple(gpus[number % len(gpus)] if len(gpus) > 1 else device for number in range(jobs))
    threads, allowed = max(1, cores // jobs), os.environ.get("OMP_NUM_THREADS", "")
    return ExecutorConfig(
        devices, min(threads, int(allowed)) if allowed.isdigit() and int(allowed) else threads
    )


def check_options(jobs: int, memory_budget: float | None, backend: str, address: str | None) -> None:
    """Raise UserError for an option of `sweep` that cannot be used, or that another one leaves without effect."""
    if jobs != -1 or isinstance(jobs, bool):
        whole_number(jobs, "the number of jobs (-1: chosen automatically)", 1, MAX_JOBS)
    if memory_budget is not None:
        amount(memory_budget, "the memory budget in GB")
    if backend not in ("local", "dask"):
        raise UserError(f'Expected the backend "local" or "dask", got {shortened(backend)}.')
    if address is not None and backend == "local":
        raise UserError("An address is that of a cluster's scheduler; give the backend dask with it.")
    if jobs != -1 and backend == "dask":
        raise UserError("The number of jobs is the cluster's with the backend dask; leave it out.")


def max_workers(jobs: int, device: str) -> int:
    """Return the largest number of processes that `choose_team` can choose; memory is divided among them."""
    return jobs if jobs > 0 else len(_gpus_of(device)) or available_cores()


def budget_of(device: str, memory_budget: float | None, workers: int) -> int:
    """Return the bytes that one batch's training may use.

    That is a worker's share of ``memory_budget`` (GB), or of the free memory of the CPU or of the GPU that it shares
    with others.
    """
    if memory_budget is not None:
        return max(1, int(memory_budget * 1e9 / workers))
    devices = _gpus_of(device)[:workers] or ("cpu",)
    free = min(free_bytes(name) for name in devices)
    return int(FREE_FRACTION * free / math.ceil(workers / len(devices)))


def _gpus_of(device: str) -> tuple[str, ...]:
    """Return the GPUs that a device name stands for; () for the CPU."""
    if device == "cuda":
        import torch

        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return (device,) if device.startswith("cuda:") else ()


class SerialExecutor:
    """Runs tasks in this process, with the backbones and features it has loaded."""

    size = 1
    keeps_checkpoints = True

    def __init__(self, bank: FeatureBank):
        self._bank = bank

    def run(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        def report(event: Event) -> None:
            on_event(event)
            on_tick()

        while tasks:
            run_task(tasks.popleft(), self._bank, report)


class ProcessExecutor:
    """Runs tasks in worker processes, each with its own device and threads; one that dies is replaced."""

    keeps_checkpoints = True

    def __init__(self, spec: WorkerSpec, config: ExecutorConfig):
        self.size = config.size
        self._spec, self._config = spec, config

    def run(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        workers: dict[int, _Worker] = {}
        try:
            while True:
                for number, device in enumerate(self._config.devices):
                    if tasks and (number not in workers or workers[number].task is None):
                        if number not in workers:
                            workers[number] = _Worker(self._spec, device, self._config.threads)
                        workers[number].start(tasks.popleft())
                busy = {number: worker for number, worker in workers.items() if worker.task}
                if not busy:
                    return
                ready = wait([worker.connection for worker in busy.values()], TICK)
                for number, worker in busy.items():
                    if worker.connection not in ready and not worker.has_died:
                        continue
                    event = worker.next_event()
                    if isinstance(event, BatchFinished) and event.died:
                        del workers[number]
                    if event is not None:
                        on_event(event)
                on_tick()
        finally:
            for worker in workers.values():
                worker.kill()


class _Worker:
    """One worker process, its task, and the connection to it.

    The process is loky's, which starts without importing the caller's script and sets the environment. Each worker is a
    pool of one, because every worker has its own device and a dead worker must not break the tasks of the others. The
    pool gets one call for the life of the worker, and tasks travel through a pipe: loky would restart a worker whose
    memory has grown between calls, as it does when a backbone is loaded, and events come back while a task runs.
    """

    def __init__(self, spec: WorkerSpec, device: str, threads: int):
        self.task: Task | None = None
        self._is_ready = False
        self.connection, self._worker_end = Pipe()
        env = dict.fromkeys(THREAD_VARIABLES, str(threads))  # read when the numeric libraries are imported
        env["OMP_WAIT_POLICY"] = "PASSIVE"
        kind, _, number = device.partition(":")
        if number:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)].strip() if visible else number
        self._pool = ProcessPoolExecutor(1, env=env)
        log_level = logging.root.manager.disable  # as the command line's -q sets it
        arguments = replace(spec, device=kind), os.getpid(), checkpoints.EVERY, log_level
        try:
            self._call = self._pool.submit(_serve, self._worker_end, *arguments)
        except BaseException:  # Ctrl-C, which waits until the process has started
            self.kill()
            raise

    @property
    def has_died(self) -> bool:
        """Whether the process has ended and all its messages were read."""
        return self._call.done() and not self.connection.poll()

    def start(self, task: Task) -> None:
        """Send a task, once the worker has sent its first message: a pipe to a worker that dies before would block."""
        self.task = task
        if self._is_ready:
            with suppress(OSError):  # the worker died: next_event reports it
                self.connection.send(task)

    def next_event(self) -> Event | None:
        """Return the next event of the task, or that the worker died; None for the worker's first message."""
        assert self.task is not None
        try:
            if self.has_died:
                raise EOFError
            event = self.connection.recv()
        except (EOFError, OSError):
            batch, self.task = self.task.batch, None
            cause = _cause(self._call.exception())
            self.kill()
            return BatchFinished(batch, error=cause, died=True)
        if event is None:
            self._worker_end.close()  # from now on the worker's death ends every send and receive here
            self._is_ready = True
            self.start(self.task)
        if isinstance(event, BatchFinished):
            self.task = None
        return event

    def kill(self) -> None:
        self.connection.close()
        self._worker_end.close()
        self._pool.shutdown(wait=True, kill_workers=True)


def _serve(
    connection: Connection, spec: WorkerSpec, parent: int, checkpoint_every: float, log_level: int
) -> None:
    """Run tasks that arrive through ``connection`` and send their events back, until the parent closes it."""
    logging.disable(log_level)
    exit_with_parent(parent)
    logging.getLogger("fastcoop.datasets").setLevel(logging.ERROR)  # the parent has logged these warnings
    checkpoints.EVERY = checkpoint_every
    connection.send(None)
    bank = WorkerBank(spec)
    with suppress(EOFError, OSError):
        while True:
            run_task(connection.recv(), bank, connection.send)


def _cause(error: BaseException | None) -> str:
    """Return why a worker ended: its error, or the signal or exit code that loky reports."""
    if error is not None and not isinstance(error, BrokenExecutor):
        return f"the worker process ended with {type(error).__name__}: {error}"
    exits = re.search(r"\{(.+?)\}", str(error))
    how = f" by {exits[1]}" if exits else ""
    hint = "; the system kills processes so when memory runs out" if "SIGKILL" in how else ""
    return f"the worker process was ended{how}{hint}"
