"""All that is left of a grid, done batch by batch: what comes back is kept, what fails is tried again or noted."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fastcoop.methods import Outcome, RunSpec
from fastcoop.results.records import Batch
from fastcoop.results.store import ResultsStore
from fastcoop.sweeps.batches import in_order, plan_batches, reformed
from fastcoop.sweeps.checkpoints import checkpoint_path, read_state, remove_stale, subset_state, write_state
from fastcoop.sweeps.live import Live, Pace
from fastcoop.sweeps.records import describe, record_outcome
from fastcoop.sweeps.work import Begun, Ended, Event, Finished, Progressed, Task
from fastcoop.sweeps.workers import Executor


@dataclass
class Tally:
    """What the work came to; ``failed``: errors by key. ``engine_seconds``: of all ``worker_seconds``, idle ones too,
    those spent in steps of the engine."""

    finished: int = 0
    diverged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    engine_seconds: float = 0.0
    worker_seconds: float = 0.0


def form_batches(
    planned: Mapping[str, RunSpec],
    pending: Mapping[str, RunSpec],
    recorded: Sequence[Batch],
    *,
    threads: int,
    budget: int,
) -> list[Batch]:
    """The batches of all ``pending`` runs, in order: those recorded before as they were, the others planned now.

    Args:
        planned: all of the grid by key: a recorded batch needs all its runs, done ones too, to come to the same bits.
        pending: by key, those to be done.
        threads, budget: of a newly planned batch.
    """
    learning = {key for key, run in pending.items() if not run.has_learned}
    before = reformed(recorded, planned, learning)
    taken = {key for batch in before for key in batch.keys}
    rest = [run for key, run in pending.items() if key not in taken]
    return in_order([*before, *plan_batches(rest, threads=threads, budget=budget)])


class Schedule:
    """The work of one sweep. ``tally`` says what came of it, also after an interruption."""

    def __init__(
        self,
        store: ResultsStore,
        planned: Mapping[str, RunSpec],
        pending: Mapping[str, RunSpec],
        batches: Sequence[Batch],
        with_checkpoints: bool = True,
    ):
        self.store, self.pending = store, dict(pending)
        self.tally = Tally()
        self._with_checkpoints = with_checkpoints
        self._queue: deque[Task] = deque()
        recorded = {batch.name: batch for batch in store.batches()}
        new = [batch for batch in batches if batch.trains and batch.name not in recorded]
        done = store.finished()
        over = [batch for batch in recorded.values() if all(key in done for key in batch.keys)]
        store.replace_batches(over, new)
        remove_stale(store.folder, {batch.name for batch in store.batches()})
        self._batches = list(batches)
        # Runs that a recorded batch learns again beside the others learn whatever else is known of them.
        self._companions = {key: planned[key] for batch in batches if batch.trains for key in batch.keys}

    def work(self, executor: Executor) -> None:
        """Do it all. Raises UserError where results cannot be kept."""
        start = time.monotonic()
        self._queue.extend(self._task(batch) for batch in self._batches)
        self._pace = Pace(self._batches, executor.size)
        self._live = Live(len(self.pending), self._pace)
        try:
            with self._live:
                executor.run(self._queue, self._tell, self._live.tick)
            remove_stale(self.store.folder, {batch.name for batch in self.store.batches()})
        finally:
            self.tally.worker_seconds += (time.monotonic() - start) * executor.size

    def _task(self, batch: Batch) -> Task:
        runs = self._companions if batch.trains else self.pending
        keeps = batch.trains and self._with_checkpoints
        path = checkpoint_path(self.store.folder.resolve(), batch.name) if keeps else None
        return Task(batch, tuple(runs[key].unbound() for key in batch.keys), path)

    def _tell(self, event: Event) -> None:
        if isinstance(event, Begun):
            self._pace.begin(event.batch)
        elif isinstance(event, Progressed):
            self._pace.progress(event.batch, event.runs)
        elif isinstance(event, Ended):
            self._ended(event.key, event.outcome)
        else:
            self._left(event)

    def _ended(self, key: str, outcome: Outcome) -> None:
        if key not in self.pending:
            return  # a companion, or a run that had ended before its batch was resumed
        run = self.pending[key]
        record_outcome(self.store, run, outcome)
        del self.pending[key]
        self.tally.finished += 1
        self.tally.diverged += outcome.status == "diverged"
        self._live.result(run, outcome)

    def _left(self, told: Finished) -> None:
        batch = told.batch
        self.tally.engine_seconds += told.engine
        self._pace.finish(batch, told.seconds)
        if told.warning:
            self._live.say(f"{told.warning}; a sweep that is stopped now starts those batches anew.")
        rest = [key for key in batch.keys if key in self.pending]
        again: list[Batch] = []
        if rest:
            error = told.error or f"{batch.method} told of no outcome"
            again = _retry(batch, rest, told.died)
            if again:
                how = "in halves" if len(again) > 1 else "once more"
                self._live.say(
                    f"A batch of {len(batch.keys)} {batch.method} runs failed, tried {how}: {error}."
                )
            else:
                self._failed(batch, rest, error)
        if batch.trains:
            if again:
                self._hand_over(batch, again)
            self.store.replace_batches([batch], again)
            if batch.keys not in {one.keys for one in again}:
                checkpoint_path(self.store.folder, batch.name).unlink(missing_ok=True)
        for one in again:
            self._pace.add(one)
            self._queue.append(self._task(one))

    def _failed(self, batch: Batch, keys: Sequence[str], error: str) -> None:
        for key in keys:
            self.store.record_failure(describe(self.pending.pop(key)), error)
            self.tally.failed[key] = error
            self._live.fail()
        self._live.say(f"{len(keys)} {batch.method} run{'s' if len(keys) > 1 else ''} failed: {error}.")

    def _hand_over(self, batch: Batch, again: Sequence[Batch]) -> None:
        """Let the parts of a batch go on from where it stood."""
        state = read_state(checkpoint_path(self.store.folder, batch.name))
        if state is None:
            return
        for part in again:
            if part.keys == batch.keys:
                continue
            numbers = [batch.keys.index(key) for key in part.keys]
            with suppress(OSError):  # on a full disk they begin anew
                write_state(checkpoint_path(self.store.folder, part.name), subset_state(state, numbers))


def _retry(batch: Batch, keys: Sequence[str], died: bool) -> list[Batch]:
    """What is tried of a batch that failed with these runs left: its halves, and halves of those until only the runs at
    fault have failed; once only where a process died, since that may take the machine's memory each time."""
    if died and batch.attempt:
        return []
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]] if len(keys) > 1 else [keys] if died else []
    budget = max(1, batch.budget // 2) if batch.budget is not None and died else batch.budget
    return [
        dataclasses.replace(
            batch,
            keys=tuple(part),
            budget=budget,
            cost=batch.cost * len(part) / len(batch.keys),
            attempt=batch.attempt + 1,
        )
        for part in parts
    ]
