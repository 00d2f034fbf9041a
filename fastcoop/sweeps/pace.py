"""The pace of batches: how much of the work is done, the seconds that each kind of it takes, and the time left."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastcoop.methods import METHODS
from fastcoop.results.records import Batch
from fastcoop.sweeps.tasks import BatchProgress

MAX_UNKNOWN = 1 / 2  # of the expected time left: more of it without a known pace, and none is stated
MAX_WAITED = 0.9  # of the expected time of a batch that reports no progress, however long it has run

Kind = tuple[str, str, bool]  # of work: method, backbone, and whether a trainer trains it


def kind_of(batch: Batch) -> Kind:
    """Return the kind of a batch's work."""
    return batch.method, batch.backbone, batch.trains


@dataclass
class _Work:
    """The work of one kind, as `Batch.cost`: what is left, what is done, and what of that took ``seconds``."""

    left: float = 0.0
    done: float = 0.0
    timed: float = 0.0
    seconds: float = 0.0


@dataclass
class _Running:
    """A batch that runs: how much of its cost is done, and since when it has reported nothing."""

    batch: Batch
    since: float
    done: float = 0.0

    @property
    def share(self) -> float:
        return self.done / self.batch.cost if self.batch.cost else 0.0


class Pace:
    """Measures how much of the work is done, by the pace of each method with each backbone so far.

    Safe to use from two threads, as is all that holds its ``lock``.
    """

    def __init__(self, batches: Iterable[Batch], workers: int):
        self.workers = max(1, workers)
        self.lock = threading.RLock()
        self._works: defaultdict[Kind, _Work] = defaultdict(_Work)
        self._running: dict[tuple[str, ...], _Running] = {}  # by keys
        self._shown_share = 0.0
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        with self.lock:
            self._works[kind_of(batch)].left += batch.cost

    def start(self, batch: Batch) -> None:
        """Count the time of a batch from now on, and none of its work so far: it may start again elsewhere."""
        with self.lock:
            if (one := self._running.get(batch.keys)) is not None:
                self._count(one, -one.done, timed=False)
            self._running[batch.keys] = _Running(batch, time.monotonic())

    def progress(self, batch: Batch, runs: float = 0.0, before: float = 0.0) -> None:
        """Count ``runs`` more of a batch, and ``before`` that an earlier sweep did."""
        run_cost = batch.cost / len(batch.keys)
        with self.lock:
            one = self._running.setdefault(batch.keys, _Running(batch, time.monotonic()))
            if before:
                self._count(one, before * run_cost, timed=False)
            if runs:
                self._count(one, min(runs * run_cost, batch.cost - one.done))

    def follow(self, event: BatchProgress) -> None:
        """Count what a task reports."""
        if event.runs or event.before:
            self.progress(event.batch, event.runs, event.before)
        else:
            self.start(event.batch)

    def finish(self, batch: Batch, failed: int = 0) -> None:
        """Count the end of a batch, ``failed`` runs of which have no outcome."""
        with self.lock:
            one = self._running.pop(batch.keys, _Running(batch, time.monotonic()))
            self._count(one, batch.cost * (1 - failed / len(batch.keys)) - one.done)
            self._works[kind_of(batch)].left -= batch.cost - one.done

    def _count(self, one: _Running, cost: float, timed: bool = True) -> None:
        """Count ``cost`` more of a batch as done, ``timed`` if it took the time since the last such call."""
        work, now = self._works[kind_of(one.batch)], time.monotonic()
        work.left -= cost
        work.done += cost
        one.done += cost
        if timed:
            work.timed += max(cost, 0.0)
            work.seconds += now - one.since
        one.since = now

    def running(self) -> list[tuple[Batch, float]]:
        """Return the batches that run now, each with the share of its work that is done."""
        with self.lock:
            return [(one.batch, one.share) for one in self._running.values()]

    def rates(self) -> dict[Kind, float]:
        """Return the seconds of one worker per unit of `Batch.cost`, of each kind of work that was timed."""
        with self.lock:
            works = self._works.items()
            return {kind: work.seconds / work.timed for kind, work in works if work.timed and work.seconds}

    def share(self) -> float:
        """Return the share of all work that is done. It never falls."""
        with self.lock:
            self._shown_share = max(self._shown_share, self._measure()[0])
            return self._shown_share

    def seconds_left(self) -> float | None:
        """Return the expected seconds until everything is done, if no worker is idle; None before there is ground for
        it: a pace of most of the work that is left."""
        with self.lock:
            return self._measure()[1]

    def _measure(self) -> tuple[float, float | None]:
        rates = self.rates()
        of_method = {(method, trains) for method, _, trains in rates}
        over = sum(work.done * _rate(kind, rates) for kind, work in self._works.items())
        rest = {kind: max(work.left, 0.0) * _rate(kind, rates) for kind, work in self._works.items()}
        todo, longest = sum(rest.values()), 0.0
        share = over / (over + todo) if over else 0.0
        unknown = sum(rest[kind] for kind in rest if (kind[0], kind[2]) not in of_method)
        if not rates or unknown > MAX_UNKNOWN * todo:
            return share, None
        for one in self._running.values():
            of_batch = (1 - one.share) * one.batch.cost * _rate(kind_of(one.batch), rates)
            waited = min(time.monotonic() - one.since, MAX_WAITED * of_batch)
            todo, longest = todo - waited, max(longest, of_batch - waited)
        return share, max(todo / self.workers, longest, 0.0)


def _rate(kind: Kind, rates: Mapping[Kind, float]) -> float:
    """Return the rate of a kind of work.

    An unknown one is that of the method with other backbones, or else the median of methods alike: one that is far
    slower than planned says nothing about others. Costs of tests, of trainings in the engine and of those outside are
    guessed in different ways.
    """

    def group(kind: Kind) -> tuple[bool, bool]:
        method = METHODS.get(kind[0])
        return method is None or method.learns, kind[2]

    same = [one for other, one in rates.items() if (other[0], other[2]) == (kind[0], kind[2])]
    alike = [one for other, one in rates.items() if group(other) == group(kind)]
    return rates.get(kind) or statistics.median(same or alike or [1.0])
