"""An executor on the machines of a Dask cluster, through joblib's Dask backend.

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
from typing import Any
from uuid import uuid4

from fastcoop.errors import UserError
from fastcoop.sweeps.tasks import BatchFinished, Event, OnEvent, Task, WorkerBank, WorkerSpec, run_task

MAX_LOST_RESULTS = 8  # results lost on their way to this process before the cluster counts as unusable
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
        self._payload = ClusterPayload(uuid4().hex, spec, stores)
        self._lost = 0

    def run(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        try:
            while tasks:
                self._round(tasks, on_event, on_tick)
        finally:
            with suppress(Exception):  # a scheduler or worker that is gone has nothing to free
                self._client.run(_free_banks, self._payload.name)
            self._client.close()

    def _round(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        """Run the present tasks; those that ``on_event`` appends wait for the next round."""
        from distributed import KilledWorker
        from joblib import Parallel, delayed, parallel_config

        pending = {task.batch.name: task for task in tasks}
        tasks.clear()
        try:
            with parallel_config("dask", client=self._client, scatter=[self._payload], pure=False):
                parallel = Parallel(batch_size=1, pre_dispatch="2*n_jobs", return_as="generator_unordered")
                calls = [delayed(_TaskCall(name))(task, self._payload) for name, task in pending.items()]
                for events in parallel(calls):
                    for event in events:
                        if isinstance(event, BatchFinished):
                            del pending[event.batch.name]
                        on_event(event)
                    on_tick()
        except KilledWorker as error:  # names the call, and so the batch
            fatal = next((name for name in pending if name in str(error.task)), None)
            if fatal is None:
                raise
            cause = f"{error.allowed_failures + 1} workers died of it"
            on_event(BatchFinished(pending.pop(fatal).batch, error=cause, died=True))
        except (OSError, CancelledError, TimeoutError):  # a result was lost with the worker that held it
            self._lost += 1
            if self._lost > MAX_LOST_RESULTS:
                raise
        tasks.extend(pending.values())


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


class _TaskCall:
    """Runs a task on a worker and returns its events. Dask shows the call under the batch's name."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, task: Task, payload: ClusterPayload) -> list[Event]:
        import joblib

        events: list[Event] = []
        # Otherwise scikit-learn's joblib calls would go to the cluster and wait for the worker that waits for them.
        with _one_task, joblib.parallel_config("sequential"):
            run_task(task, _bank(payload), events.append)
        return events


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
