"""What a sweep shows while it runs: the share of its work done, what is running, new results and the time left."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from fastcoop import escape
from fastcoop.datasets.files import abbreviate
from fastcoop.methods import METHODS, Outcome, RunSpec
from fastcoop.methods.schedule import steps_of
from fastcoop.progress import PlainLines, counted, is_shown, on_terminal, time_left
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 12  # results at once on a terminal, and below plain lines of a young sweep
SHOWN_LATER = 3  # new results below a later plain line
SHOWN_RUNNING = 4  # running batches on a terminal at once
YOUNG = 60.0  # seconds
MAX_WAITED = 0.9  # of the expected time of a batch that reports no progress, however long it has run
COLUMN_WIDTHS = {"shots": 5, "seed": 4, "accuracy": 14, "seconds": 7}  # "62.5% diverged" fits

Kind = tuple[str, str, bool]  # of work: method, backbone, and whether the engine trains it


@dataclass
class _Running:
    """A batch that has started. Work in units of its runs: ``before`` of an earlier sweep, ``done`` since ``start``."""

    batch: Batch
    start: float
    before: float = 0.0
    done: float = 0.0

    @property
    def kind(self) -> Kind:
        return self.batch.method, self.batch.backbone, self.batch.trains

    @property
    def run_cost(self) -> float:
        return self.batch.cost / len(self.batch.keys)

    @property
    def share(self) -> float:
        return (self.before + self.done) / len(self.batch.keys)


class Pace:
    """Measures how much of the work is done, by the pace of each method with each backbone so far.

    Safe to use from two threads.
    """

    def __init__(self, batches: Iterable[Batch], workers: int):
        self.workers = max(1, workers)
        self._left: defaultdict[Kind, float] = defaultdict(float)  # costs, as `Batch.cost`
        self._done: defaultdict[Kind, float] = defaultdict(float)
        self._timed: defaultdict[Kind, float] = defaultdict(float)  # costs of what took ``_seconds``
        self._seconds: defaultdict[Kind, float] = defaultdict(float)
        self._running: dict[tuple[str, ...], _Running] = {}  # by keys
        self._shown_share = 0.0
        self._lock = threading.Lock()
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._left[_Running(batch, 0.0).kind] += batch.cost

    def progress(self, batch: Batch, runs: float = 0.0, before: float = 0.0) -> None:
        """Count ``runs`` more of a batch, and ``before`` that an earlier sweep did; the first call starts its time."""
        with self._lock:
            one = self._running.setdefault(batch.keys, _Running(batch, time.monotonic()))
            one.before += before
            one.done = min(len(batch.keys) - one.before, one.done + runs)

    def finish(self, batch: Batch, seconds: float, failed: int = 0) -> None:
        """Count the end of a batch, ``failed`` runs of which have no outcome."""
        over = batch.cost * (1 - failed / len(batch.keys))
        with self._lock:
            one = self._running.pop(batch.keys, _Running(batch, 0.0))
            self._left[one.kind] -= batch.cost
            self._done[one.kind] += over
            self._timed[one.kind] += max(0.0, over - one.before * one.run_cost)
            self._seconds[one.kind] += seconds

    def running(self) -> list[tuple[Batch, float]]:
        """Return the batches that run now, each with the share of its work that is done."""
        with self._lock:
            return [(one.batch, one.share) for one in self._running.values()]

    def share(self) -> float:
        """Return the share of all work that is done. It never falls."""
        share, _ = self._measure()
        with self._lock:
            self._shown_share = max(self._shown_share, share)
            return self._shown_share

    def seconds_left(self) -> float | None:
        """Return the expected seconds until everything is done, if no worker is idle; None before a pace is known."""
        return self._measure()[1]

    def _measure(self) -> tuple[float, float | None]:
        now = time.monotonic()
        with self._lock:
            left, done, timed, seconds = (
                costs.copy() for costs in (self._left, self._done, self._timed, self._seconds)
            )
            running = [replace(one) for one in self._running.values()]
        for one in running:
            left[one.kind] -= one.share * one.batch.cost
            done[one.kind] += one.share * one.batch.cost
            if one.done:
                timed[one.kind] += one.done * one.run_cost
                seconds[one.kind] += now - one.start
        rates = {kind: seconds[kind] / cost for kind, cost in timed.items() if cost > 0 and seconds[kind]}

        def rate(kind: Kind) -> float:
            # An unknown pace is that of the method with other backbones, or else the median of methods alike: one that
            # is far slower than planned says nothing about others. Costs of tests, of trainings in the engine and of
            # those outside are guessed in different ways.
            same = [one for (method, _, _), one in rates.items() if method == kind[0]]
            alike = [one for other, one in rates.items() if _group(other) == _group(kind)]
            return rates.get(kind) or statistics.median(same or alike or [1.0])

        over = sum(cost * rate(kind) for kind, cost in done.items())
        todo = sum(max(cost, 0.0) * rate(kind) for kind, cost in left.items())
        share, longest = over / (over + todo) if over else 0.0, 0.0
        for one in running:
            rest = (1 - one.share) * one.batch.cost * rate(one.kind)
            waited = 0.0 if one.done else min(now - one.start, MAX_WAITED * rest)
            todo, longest = todo - waited, max(longest, rest - waited)
        return share, max(todo / self.workers, longest, 0.0) if rates else None


def _group(kind: Kind) -> tuple[bool, bool]:
    method = METHODS.get(kind[0])
    return method is None or method.learns, kind[2]


class Live:
    """A live table on a terminal, or else plain lines, on standard error.

    rich draws the table from its own thread, while results arrive in another. Nothing is shown if the "fastcoop" logger
    only passes errors.

    Args:
        runs: Number of runs to do.
        pace: Measures their progress.
        done_before: Number of the grid's other runs, which are done.
    """

    def __init__(self, runs: int, pace: Pace, done_before: int = 0):
        self.runs, self.pace, self.done_before = runs, pace, done_before
        self.ended = self.failed = self.diverged = 0
        self._start, self._lines, self._line = time.monotonic(), PlainLines(), ""
        self._last: deque[tuple[RunSpec, Outcome]] = deque(maxlen=SHOWN)
        self._new = 0  # results since the last plain line
        self._texts: dict[tuple[str, ...], tuple[str, int]] = {}  # and steps of running batches, by keys
        self._lock = threading.Lock()
        self._live = None
        if is_shown() and on_terminal():
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(
                console=Console(stderr=True), get_renderable=self._table, refresh_per_second=4, transient=True
            )

    def __enter__(self) -> Live:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if self._lines.is_open:
            self._lines.show(self.state())
        self._lines.close()

    def start(self, batch: Batch, runs: Sequence[RunSpec]) -> None:
        """Show that a batch of these runs has started."""
        with self._lock:
            self._texts[batch.keys] = describe(runs), sum(map(steps_of, runs))

    def result(self, run: RunSpec, outcome: Outcome) -> None:
        with self._lock:
            self.ended += 1
            self._new += 1
            self.diverged += outcome.status != "done"
            self._last.append((run, outcome))

    def fail(self) -> None:
        with self._lock:
            self.failed += 1

    def tick(self) -> None:
        """Print a line, if the last one is old enough and something has changed. To be called every now and then."""
        if self._live is not None or not is_shown() or not self._lines.is_due():
            return
        line = "; ".join([self.state(), *self._running(1)])
        with self._lock:
            shown = min(self._new, SHOWN if time.monotonic() - self._start < YOUNG else SHOWN_LATER)
            last, more, self._new = list(self._last)[len(self._last) - shown :], self._new - shown, 0
        if line != self._line or last:
            results = [_sentence(*one) for one in last]
            self._lines.show(line, *results, *([f"and {counted(more, 'earlier result')}"] if more else []))
        self._line = line

    def say(self, text: str) -> None:
        if self._live:
            self._live.console.print(escape.visible(text), markup=False, highlight=False)
        elif is_shown():
            self._lines.say(text)

    def state(self) -> str:
        """Return the sweep's progress as one line."""
        with self._lock:
            ended, failed, diverged = self.ended, self.failed, self.diverged
        left = self.pace.seconds_left() if ended + failed < self.runs else None
        parts = [f"{math.floor(100 * self.pace.share())}% done, {ended} of {counted(self.runs, 'run')}"]
        parts[0] += f" ({self.done_before:,} before)" if self.done_before else ""
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{diverged} diverged"] if diverged else []
        return ", ".join([*parts, *([time_left(left)] if left is not None else [])])

    def _running(self, most: int) -> list[str]:
        """Return what is running now, a sentence each, and how many more."""
        running = self.pace.running()
        with self._lock:
            texts = [(*self._texts.get(batch.keys, (batch.method, 0)), share) for batch, share in running]
            if len(self._texts) > len(running):
                self._texts = {
                    batch.keys: self._texts[batch.keys] for batch, _ in running if batch.keys in self._texts
                }
        sentences = [
            f"now {math.floor(100 * share)}% of {counted(steps, 'step')}: {text}" if steps else f"now {text}"
            for text, steps, share in texts[:most]
        ]
        more = [f"and {counted(len(texts) - most, 'more batch')}"] if len(texts) > most else []
        return sentences + more

    def _table(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("dataset", "method"):
            table.add_column(name)  # long names wrap; numbers stay whole
        for name, width in COLUMN_WIDTHS.items():
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        with self._lock:
            last = list(self._last)
        for run, outcome in last:
            texts = (run.dataset, _label(run), *_numbers(run, outcome), f"{outcome.seconds:.1f}")
            table.add_row(*(Text(escape.visible(text)) for text in texts))  # a str would be read as markup
        running = [
            Text(escape.visible(text), "dim", no_wrap=True, overflow="ellipsis")
            for text in self._running(SHOWN_RUNNING)
        ]
        return Group(Text(self.state(), "bold"), *running, *([table] if last else []))


def describe(runs: Sequence[RunSpec]) -> str:
    """Return the runs of a batch in a few words."""
    labels = list(dict.fromkeys(map(_label, runs)))
    label = labels[0] if len(labels) == 1 else f"{counted(len(labels), 'kind')} of {runs[0].method}"
    text = label
    shots = sorted(
        {run.shots for run in runs if run.shots}, key=lambda shots: (isinstance(shots, str), shots)
    )
    if shots:
        several = f"{shots[0]} to {shots[-1]}" if len(shots) > 1 else shots[0]
        text += f", {several} shot{'s' * (shots != [1])}"
    if len(runs) > 1:
        text += f", {counted(len(runs), 'run')}"
    elif shots:
        text += f", seed {runs[0].seed}"
    return f"{text}, on {abbreviate(sorted({run.dataset for run in runs}))}"


def _numbers(run: RunSpec, outcome: Outcome) -> tuple[str, str, str]:
    accuracies = [scores.accuracy for scores in outcome.scores.values()]
    accuracy = next((f"{one:.1f}%" for one in accuracies if one == one), "")  # not NaN
    if outcome.status != "done":
        accuracy = f"{accuracy} {outcome.status}".lstrip()
    return (str(run.shots), str(run.seed), accuracy) if run.shots else ("", "", accuracy)


def _sentence(run: RunSpec, outcome: Outcome) -> str:
    shots, seed, accuracy = _numbers(run, outcome)
    few_shot = f", {shots} shot{'s' * (shots != '1')}, seed {seed}" if shots else ""
    return f"{_label(run)} on {run.dataset}{few_shot}: {accuracy}"


def _label(run: RunSpec) -> str:
    return METHODS[run.method].label(run.settings)
