"""An executor on the machines of a Dask cluster.

Batches, and so results, are the same as on one machine. Dask gives the batches of a dead worker to others, which resume
from the last checkpoint if all workers see the results folder.
"""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from fastcoop.errors import UserError
from fastcoop.results.records import Batch
from fastcoop.sweeps.tasks import (
    BatchFinished,
    BatchProgress,
    Event,
    OnEvent,
    Task,
    WorkerBank,
    WorkerSpec,
    describe_error,
    run_task,
)
from fastcoop.sweeps.workers import TICK

CONNECT_TIMEOUT_S = 20.0  # for the scheduler, and for a first worker


@dataclass(frozen=True, eq=False)
class ClusterPayload:
    """Sent to every worker once: the spec, and the content of feature stores that workers cannot see as files."""

    name: str
    spec: WorkerSpec
    stores: dict[tuple[str, str], bytes]


class ClusterExecutor:
    """Runs tasks on all workers of a Dask cluster.

    Args:
        spec: What workers load.
        address: Of the scheduler, or the path of a scheduler file.
        folder: The results folder.

    Raises:
        UserError: There is no such cluster, or it has no workers.
    """

    def __init__(self, spec: WorkerSpec, address: str | None, folder: Path):
        self._client = _connect(address)
        try:
            self.size = len(self._client.nthreads())
            paths = [str(path) for path in spec.stores.values()]
            sees_stores = all(self._client.run(_sees, paths).values())
            self.keeps_checkpoints = all(self._client.run(_sees, [str(folder.resolve())]).values())
        except Exception as error:
            self._client.close()
            raise UserError(f"The cluster's workers do not answer as fastcoop's: {error}.") from None
        stores = {} if sees_stores else {names: path.read_bytes() for names, path in spec.stores.items()}
        self._payload, self._sent = ClusterPayload(uuid4().hex, spec, stores), None
        self._running: dict[str, tuple[Batch, Any]] = {}  # with their futures, by Dask's keys

    def run(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        arrived: SimpleQueue[Any] = SimpleQueue()  # messages of progress, and keys of futures that are done
        self._client.subscribe_topic(self._payload.name, lambda event: arrived.put(event[1]))
        try:
            while tasks or self._running:
                while tasks:
                    self._submit(tasks.popleft()).add_done_callback(lambda future: arrived.put([future.key]))
                with suppress(Empty):
                    key, *work = arrived.get(timeout=TICK)
                    if key in self._running:  # else it is a late message of progress
                        batch = self._running[key][0]
                        for event in [BatchProgress(batch, *work)] if work else self._results(key):
                            on_event(event)
                on_tick()
        finally:
            with suppress(Exception):  # a scheduler or worker that is gone has nothing to free
                self._client.run(_free_banks, self._payload.name)
            self._client.close()

    def _submit(self, task: Task) -> Any:
        key = f"{task.batch.name}-{uuid4().hex}"
        try:
            if self._sent is None or self._sent.status != "finished":  # or no worker is left that has it
                self._sent = self._client.scatter(self._payload, broadcast=True, hash=False)
            future = self._client.submit(_run, task, self._sent, key=key, pure=False)
        except Exception as error:
            raise UserError(
                f"The Dask cluster takes no more work ({error}), finished runs are kept; start its scheduler and "
                "workers, and run the same command again."
            ) from None
        self._running[key] = task.batch, future
        return future

    def _results(self, key: str) -> list[Event]:
        """Return the events of a task that is done, or that its workers died."""
        from distributed import KilledWorker

        batch, future = self._running.pop(key)
        try:
            events: list[Event] = future.result()
        except KilledWorker as error:
            events = [
                BatchFinished(batch, error=f"{error.allowed_failures + 1} workers died of it", died=True)
            ]
        except CancelledError:
            events = [BatchFinished(batch, error="all workers that held its features died", died=True)]
        except Exception as error:  # such as of a worker whose disk is full
            events = [BatchFinished(batch, error=describe_error(error))]
        return events


def _connect(address: str | None) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise UserError('The backend "dask" needs Dask; install fastcoop[cluster].') from None
    if address is None:
        raise UserError(
            'The backend "dask" needs the address of a scheduler; give --address tcp://HOST:8786.'
        )
    try:
        place = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        client = Client(**place, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
        client.wait_for_workers(1, timeout=CONNECT_TIMEOUT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            f"There is no Dask scheduler with workers at {address} ({error}); start `dask scheduler` and `dask worker`."
        ) from None
    return client


def _sees(paths: list[str]) -> bool:
    """Return whether all paths exist, as seen from a worker."""
    return all(Path(path).exists() for path in paths)


_banks: dict[str, tuple[WorkerBank, tempfile.TemporaryDirectory[str]]] = {}  # of this worker, by payload name
_one_task = threading.Lock()  # a Dask worker may have several threads, but trains one batch at a time


def _run(task: Task, payload: ClusterPayload) -> list[Event]:
    """Run a task on a worker and return its results. Progress is sent at once, under the payload's name."""
    from distributed import get_worker

    worker, results = get_worker(), list[Event]()
    key = worker.get_current_task()

    def on_event(event: Event) -> None:
        if isinstance(event, BatchProgress):
            worker.log_event(payload.name, (key, event.runs, event.before))
        else:
            results.append(event)

    with _one_task:
        run_task(task, _bank(payload), on_event)
    return results


def _bank(payload: ClusterPayload) -> WorkerBank:
    """Return this worker's bank for the payload; feature stores that came with it are written to files."""
    if payload.name not in _banks:
        _free_banks()
        stores, folder = dict(payload.spec.stores), tempfile.TemporaryDirectory(prefix="fastcoop-")
        for number, (names, content) in enumerate(payload.stores.items()):
            stores[names] = Path(folder.name) / f"{number}.h5"
            stores[names].write_bytes(content)
        _banks[payload.name] = WorkerBank(replace(payload.spec, stores=stores)), folder
    return _banks[payload.name][0]


def _free_banks(name: str | None = None) -> None:
    """Free what a sweep (None: every sweep) loaded on this worker, and the feature stores that came with it."""
    for one in [one for one in _banks if name in (None, one)]:
        _banks.pop(one)[1].cleanup()
