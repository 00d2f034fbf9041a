"""The run loop: batches go to an executor, outcomes into the results folder, and failed batches are tried again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import psutil

from fastcoop.methods import Outcome, RunSpec
from fastcoop.methods.spec import method_names
from fastcoop.progress import counted
from fastcoop.results.records import Batch
from fastcoop.results.store import ResultsStore
from fastcoop.sweeps.checkpoints import checkpoint_path, read_state, remove_stale, subset_state, write_state
from fastcoop.sweeps.live import Live
from fastcoop.sweeps.pace import Pace
from fastcoop.sweeps.records import describe_run, record_outcome
from fastcoop.sweeps.tasks import BatchFinished, Event, RunFinished, Task
from fastcoop.sweeps.workers import Executor

MEMORY_EVERY = 2.0  # seconds between samples, each of which lists the machine's processes
RECORD_EVERY = 0.5  # seconds between writes of finished runs: the most results that a kill loses
MAX_UNRECORDED = 256


class RunLoop:
    """Runs batches and records their outcomes.

    Args:
        store: The results folder.
        planned: All runs of the grid, by key: a recorded batch needs all its runs, finished ones too, for the same
            bits.
        pending: The runs to do.
        batches: The batches of all pending runs, in order.
        executor: Runs them.

    Attributes:
        live: The display, which counts the runs with an outcome.
        pace: How fast the batches run.
        failed: Errors of failed runs, by key.
        engine_share: Share of all workers' time, idle or not, in training steps of the engine.
        peak_memory_bytes: Largest sum of the resident sizes of this process and its children.
    """

    def __init__(
        self,
        store: ResultsStore,
        planned: Mapping[str, RunSpec],
        pending: Mapping[str, RunSpec],
        batches: Sequence[Batch],
        executor: Executor,
    ):
        self.failed: dict[str, str] = {}
        self.engine_share = self._engine_seconds = 0.0
        self.peak_memory_bytes = 0
        self._store, self._pending, self._executor = store, dict(pending), executor
        self._tasks: deque[Task] = deque()
        self._unrecorded: list[tuple[RunSpec, Outcome]] = []
        self._sampled, self._recorded = -MEMORY_EVERY, -RECORD_EVERY
        # A pending run of a recorded batch trains as if nothing were known of it, together with the rest of the batch.
        training = {key: planned[key] for batch in batches if batch.trains for key in batch.keys}
        self._runs = {**pending, **training}
        recorded, done = {batch.name: batch for batch in store.batches()}, store.finished()
        over = [batch for batch in recorded.values() if all(key in done for key in batch.keys)]
        store.replace_batches(over, [b for b in batches if b.trains and b.name not in recorded])
        self._remove_stale_checkpoints()
        self.pace = Pace([], executor.size)
        done_before = sum(key in done and key not in pending for key in planned)
        self.live = Live(len(pending), self.pace, self._runs, done_before)
        self._add(batches)

    def run(self) -> None:
        """Run all batches. Raises UserError where results cannot be written."""
        start = time.monotonic()
        with self.live:
            try:
                self._executor.run(self._tasks, self._on_event, self._on_tick)
            except KeyboardInterrupt:
                self._record()
                kept, state = counted(len(self._store.finished()), "run"), self.live.state()
                self.live.say(f"{state}; kept in {self._store.folder}: {kept}")
                raise
            finally:
                self._record()
        self._remove_stale_checkpoints()
        worker_seconds = (time.monotonic() - start) * self._executor.size
        self.engine_share = self._engine_seconds / max(worker_seconds, 1e-9)

    def _add(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            keeps = batch.trains and self._executor.keeps_checkpoints
            path = checkpoint_path(self._store.folder.resolve(), batch.name) if keeps else None
            self.pace.add(batch)
            self._tasks.append(Task(batch, tuple(self._runs[key].unbound() for key in batch.keys), path))

    def _on_tick(self) -> None:
        self.live.tick()
        if time.monotonic() - self._recorded >= RECORD_EVERY or len(self._unrecorded) >= MAX_UNRECORDED:
            self._record()
        if time.monotonic() - self._sampled >= MEMORY_EVERY:
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory_bytes())
            self._sampled = time.monotonic()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, BatchFinished):
            self._on_batch_finished(event)
        elif isinstance(event, RunFinished):
            run = self._pending.pop(event.key, None)
            if run is not None:  # else it was done before, and trained again together with a pending one
                self._unrecorded.append((run, event.outcome))
                self.live.result(run, event.outcome)
        else:
            self.pace.follow(event)

    def _record(self) -> None:
        """Write the finished runs, all in one transaction."""
        runs, self._unrecorded = self._unrecorded, []
        if runs:
            with self._store.together():
                for run, outcome in runs:
                    record_outcome(self._store, run, outcome)
        self._recorded = time.monotonic()

    def _on_batch_finished(self, event: BatchFinished) -> None:
        self._record()
        batch = event.batch
        self._engine_seconds += event.engine_seconds
        if event.warning:
            self.live.say(f"{event.warning}; if the sweep is stopped now, those batches start over.")
        left = [key for key in batch.keys if key in self._pending]
        self.pace.finish(batch, len(left))
        error = event.error or f"{batch.method} reported no outcome"
        retries = _retries(batch, left, event.died)
        if retries:
            how = "in halves" if len(retries) > 1 else "once more"
            runs = counted(len(batch.keys), f"{batch.method} run")
            self.live.say(f"A batch of {runs} failed, tried {how}: {error.rstrip('.')}.")
        elif left:
            for key in left:
                self._store.record_failure(describe_run(self._pending.pop(key)), error)
                self.failed[key] = error
            self.live.failed = len(self.failed)
            names = method_names(self._runs[key] for key in left)
            self.live.say(f"{counted(len(left), f'{names} run')} failed: {error.rstrip('.')}.")
        if batch.trains:
            split_checkpoint(self._store, batch, retries)
            self._store.replace_batches([batch], retries)
            if batch.keys not in {one.keys for one in retries}:
                checkpoint_path(self._store.folder, batch.name).unlink(missing_ok=True)
        self._add(retries)

    def _remove_stale_checkpoints(self) -> None:
        remove_stale(self._store.folder, {batch.name for batch in self._store.batches()})


def split_checkpoint(store: ResultsStore, batch: Batch, parts: Sequence[Batch]) -> None:
    """Give the parts of a batch its training state, so that they resume from it."""
    parts = [part for part in parts if part.keys != batch.keys]
    state = read_state(checkpoint_path(store.folder, batch.name)) if parts else None
    for part in parts if state is not None else []:
        indices = [batch.keys.index(key) for key in part.keys]
        with suppress(OSError):  # on a full disk they start over
            write_state(checkpoint_path(store.folder, part.name), subset_state(state or {}, indices))


def memory_bytes() -> int:
    """Return the sum of the resident sizes of this process and its children. Shared pages count once per process."""
    total = 0
    for process in [this := psutil.Process(), *this.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended
            total += process.memory_info().rss
    return total


def _retries(batch: Batch, keys: Sequence[str], died: bool) -> list[Batch]:
    """Return the batches to try for the runs left of a failed batch: its halves, until only runs at fault have failed.

    After a worker died, which may take down the machine's memory each time, there is only one retry, with half of the
    memory budget.
    """
    if not keys or (died and batch.attempt):
        return []
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]] if len(keys) > 1 else [keys] if died else []
    budget = max(1, batch.budget // 2) if batch.budget is not None and died else batch.budget
    cost, attempt = batch.cost / len(batch.keys), batch.attempt + 1
    return [
        replace(batch, keys=tuple(part), budget=budget, cost=cost * len(part), attempt=attempt)
        for part in parts
    ]
