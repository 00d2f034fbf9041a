"""What a sweep shows while it runs: new results, throughput and time left."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from fastcoop import escape
from fastcoop.methods import METHODS, Outcome, RunSpec
from fastcoop.progress import counted, duration, is_shown, on_terminal, print_line
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 12  # results on a terminal at once
LINE_EVERY = 5.0  # seconds between plain lines
COLUMN_WIDTHS = {"shots": 5, "seed": 4, "accuracy": 14, "seconds": 7}  # "62.5% diverged" fits

Kind = tuple[str, str]  # of work: method and backbone


class Pace:
    """Estimates the time left from the pace of each method with each backbone so far. Safe to use from two threads."""

    def __init__(self, batches: Iterable[Batch], workers: int):
        self.workers = max(1, workers)
        self._left: defaultdict[Kind, float] = defaultdict(float)  # costs, as `Batch.cost`
        self._done: defaultdict[Kind, float] = defaultdict(float)
        self._seconds: defaultdict[Kind, float] = defaultdict(float)
        self._running: dict[str, tuple[Batch, float, float]] = {}  # by name: start, runs done
        self._lock = threading.Lock()
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._left[batch.method, batch.backbone] += batch.cost

    def progress(self, batch: Batch, runs: float = 0.0) -> None:
        """Count ``runs`` more of a batch; the first call starts its time."""
        with self._lock:
            _, start, done = self._running.get(batch.name, (batch, time.monotonic(), 0.0))
            self._running[batch.name] = batch, start, min(len(batch.keys), done + runs)

    def finish(self, batch: Batch, seconds: float) -> None:
        kind = batch.method, batch.backbone
        with self._lock:
            self._running.pop(batch.name, None)
            self._left[kind] -= batch.cost
            self._done[kind] += batch.cost
            self._seconds[kind] += seconds

    def seconds_left(self) -> float:
        """Return the expected seconds until everything is done, if no worker is idle."""
        now = time.monotonic()
        with self._lock:
            left, done, seconds = self._left.copy(), self._done.copy(), self._seconds.copy()
            running = list(self._running.values())
        for batch, start, runs in running:
            if runs:
                kind, cost = (batch.method, batch.backbone), batch.cost * runs / len(batch.keys)
                left[kind], done[kind] = left[kind] - cost, done[kind] + cost
                seconds[kind] += now - start
        rates = {kind: seconds[kind] / done[kind] for kind in done if done[kind] and seconds[kind]}

        def rate(kind: Kind) -> float:
            # An unknown pace is that of the method with other backbones, or else the median of all: a method that is
            # far slower than planned says nothing about others.
            same = [one for (method, _), one in rates.items() if method == kind[0]]
            return rates.get(kind) or statistics.median(same or rates.values() or [1.0])

        return sum(max(cost, 0.0) * rate(kind) for kind, cost in left.items()) / self.workers


class Live:
    """A live table on a terminal, or else plain lines a few seconds apart, on standard error.

    rich draws the table from its own thread, while results arrive in another. Nothing is shown if the "fastcoop" logger
    only passes errors.
    """

    def __init__(self, runs: int, pace: Pace):
        self.runs, self.pace = runs, pace
        self.ended = self.failed = self.diverged = 0
        self._start = self._printed = time.monotonic()
        self._line = ""
        self._last: deque[tuple[RunSpec, Outcome]] = deque(maxlen=SHOWN)
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

    def result(self, run: RunSpec, outcome: Outcome) -> None:
        with self._lock:
            self.ended += 1
            self.diverged += outcome.status != "done"
            self._last.append((run, outcome))

    def fail(self) -> None:
        with self._lock:
            self.failed += 1

    def tick(self) -> None:
        """Print a line, if the last one is old enough and something has changed. To be called every now and then."""
        now = time.monotonic()
        if self._live is None and is_shown() and now - self._printed >= LINE_EVERY:
            self._printed = now
            last = f"; {_sentence(*self._last[-1])}" if self._last else ""
            if (line := self.state() + last) != self._line:
                print_line(line)
            self._line = line

    def say(self, text: str) -> None:
        if self._live:
            self._live.console.print(escape.visible(text), markup=False, highlight=False)
        elif is_shown():
            print_line(text)

    def state(self) -> str:
        """Return the sweep's progress as one line."""
        minutes = (time.monotonic() - self._start) / 60
        with self._lock:
            ended, failed, diverged = self.ended, self.failed, self.diverged
        parts = [f"{ended} of {counted(self.runs, 'run')}"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{diverged} diverged"] if diverged else []
        parts += [f"{ended / max(minutes, 1e-9):.0f} a minute"] if ended else []
        return ", ".join([*parts, f"{duration(self.pace.seconds_left())} left"])

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.state(), "bold"), title_justify="left", box=None, pad_edge=False)
        for name in ("dataset", "method"):
            table.add_column(name)  # long names wrap; numbers stay whole
        for name, width in COLUMN_WIDTHS.items():
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        with self._lock:
            last = list(self._last)
        for run, outcome in last:
            texts = (run.dataset, _label(run), *_numbers(run, outcome), f"{outcome.seconds:.1f}")
            table.add_row(*(Text(escape.visible(text)) for text in texts))  # a str would be read as markup
        return table


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
