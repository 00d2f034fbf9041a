"""Work on the machines of a Dask cluster, through joblib's own backend for it.

Batches are the same as on one machine, so results are too. Dask gives a lost worker's batches to others; with a folder
that all workers see, they go on from their last checkpoint.
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
from fastcoop.sweeps.work import Event, Finished, Supplies, Task, Tell, Workshop

LOST_AT_MOST = 8  # times that results are lost on the way before the cluster counts as unusable
CONNECT = 20.0  # seconds to wait for the scheduler, and for a first worker


@dataclass(frozen=True, eq=False)
class Parcel:
    """What is sent to every worker once: the supplies, and feature stores where workers do not see the files."""

    name: str
    supplies: Supplies
    contents: dict[tuple[str, str], bytes]


class Cluster:
    """A crew of all the workers of a Dask cluster.

    Raises UserError where there is no such cluster, or no worker in it.
    """

    def __init__(self, supplies: Supplies, address: str | None, folder: Path):
        self._client = _connect(address)
        try:
            threads = list(self._client.nthreads().values())
            self.size = len(threads)
            paths = [str(path) for path in supplies.stores.values()]
            shared = all(self._client.run(_sees, paths).values())
            self.keeps_checkpoints = all(self._client.run(_sees, [str(folder.resolve())]).values())
        except Exception as error:
            self._client.close()
            raise UserError(f"The cluster's workers do not answer as fastcoop's: {error}.") from None
        contents = {} if shared else {names: path.read_bytes() for names, path in supplies.stores.items()}
        self._lost = 0
        self._parcel = Parcel(uuid4().hex, supplies, contents)

    def work(self, tasks: deque[Task], tell: Tell, tick: Callable[[], None]) -> None:
        try:
            while tasks:
                self._round(tasks, tell, tick)
        finally:
            with suppress(Exception):  # a scheduler or worker that has gone has nothing to free
                self._client.run(_close_workshops, self._parcel.name)
            self._client.close()

    def _round(self, tasks: deque[Task], tell: Tell, tick: Callable[[], None]) -> None:
        """Do the tasks there are now; those that are told to be tried again wait for the next round."""
        from distributed import KilledWorker
        from joblib import Parallel, delayed, parallel_config

        under_way = {task.batch.name: task for task in tasks}
        tasks.clear()
        try:
            with parallel_config("dask", client=self._client, scatter=[self._parcel], pure=False):
                parallel = Parallel(batch_size=1, pre_dispatch="2*n_jobs", return_as="generator_unordered")
                work = (delayed(_Doing(name))(task, self._parcel) for name, task in list(under_way.items()))
                for events in parallel(work):
                    for event in events:
                        if isinstance(event, Finished):
                            del under_way[event.batch.name]
                        tell(event)
                    tick()
        except KilledWorker as error:  # it names the task by what it calls, and so by the batch
            fatal = next((name for name in under_way if name in str(error.task)), None)
            if fatal is None:
                raise
            batch = under_way.pop(fatal).batch
            tell(Finished(batch, error=f"{error.allowed_failures + 1} workers died of it", died=True))
        except (
            OSError,
            CancelledError,
            TimeoutError,
        ):  # a result was lost on its way, with the worker that held it
            self._lost += 1
            if self._lost > LOST_AT_MOST:
                raise
        tasks.extend(under_way.values())


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
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        client = Client(**where, timeout=CONNECT, set_as_default=False)
        client.wait_for_workers(1, timeout=CONNECT)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            f"There is no Dask scheduler with workers at {address} ({error}); start `dask scheduler` and `dask worker`."
        ) from None
    return client


def _sees(paths: list[str]) -> bool:
    """Whether all these are there, seen from a worker."""
    return all(Path(path).exists() for path in paths)


_workshops: dict[str, tuple[Workshop, tempfile.TemporaryDirectory[str]]] = {}
_one_at_a_time = threading.Lock()  # a worker of several threads still trains one batch at a time


class _Doing:
    """On a worker: do a task and bring back all that is told of it. Dask calls the call by the batch's name."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, task: Task, parcel: Parcel) -> list[Event]:
        import joblib

        events: list[Event] = []
        # scikit-learn's own joblib calls would go to the cluster, and wait there for the worker that waits for them.
        with _one_at_a_time, joblib.parallel_config("sequential"):
            _workshop(parcel).do(task, events.append)
        return events


def _workshop(parcel: Parcel) -> Workshop:
    """This process's workshop for these supplies, with the feature stores that came along written out."""
    if parcel.name not in _workshops:
        _close_workshops()
        stores, folder = dict(parcel.supplies.stores), tempfile.TemporaryDirectory(prefix="fastcoop-")
        for number, (names, content) in enumerate(parcel.contents.items()):
            path = Path(folder.name) / f"{number}.h5"
            path.write_bytes(content)
            stores[names] = path
        _workshops[parcel.name] = Workshop(replace(parcel.supplies, stores=stores)), folder
    return _workshops[parcel.name][0]


def _close_workshops(name: str | None = None) -> None:
    """Free what a sweep (all of them without ``name``) loaded on this worker, and the features that came along."""
    for one in list(_workshops) if name is None else [name]:
        if one in _workshops:
            _workshops.pop(one)[1].cleanup()
