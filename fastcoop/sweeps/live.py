"""What a sweep shows while it runs: new results, throughput and time left."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from fastcoop import escape
from fastcoop.methods import METHODS, Outcome, RunSpec
from fastcoop.progress import duration, is_shown, on_terminal, print_line
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 12  # results on a terminal at once
LINE_EVERY = 5.0  # seconds between plain lines
COLUMN_WIDTHS = {"shots": 5, "seed": 4, "accuracy": 14, "seconds": 7}  # "62.5% diverged" fits


@dataclass
class _Work:
    """Costs of the work of one method with one backbone, in `Batch.cost`, and the seconds spent."""

    left: float = 0.0
    done: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Seconds per unit of cost; 0 if unknown."""
        return self.seconds / self.done if self.done else 0.0


@dataclass
class _Running:
    batch: Batch
    start: float
    done: float = 0.0


class Pace:
    """Estimates the time left from the pace of each method with each backbone so far. Safe to use from two threads."""

    def __init__(self, batches: Iterable[Batch], workers: int):
        self.workers = max(1, workers)
        self._work: defaultdict[tuple[str, str], _Work] = defaultdict(_Work)
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._work[batch.method, batch.backbone].left += batch.cost

    def begin(self, batch: Batch) -> None:
        with self._lock:
            self._running[batch.name] = _Running(batch, time.monotonic())

    def progress(self, batch: Batch, runs: float) -> None:
        with self._lock:
            if running := self._running.get(batch.name):
                running.done = min(batch.cost, running.done + runs * batch.cost / len(batch.keys))

    def finish(self, batch: Batch, seconds: float) -> None:
        with self._lock:
            self._running.pop(batch.name, None)
            _add(self._work[batch.method, batch.backbone], batch.cost, seconds)

    def seconds_left(self) -> float:
        """Return the expected seconds until everything is done, if no worker is idle."""
        now = time.monotonic()
        with self._lock:
            work = {kind: replace(one) for kind, one in self._work.items()}
            running = list(self._running.values())
        for one in running:
            if one.done:
                _add(work[one.batch.method, one.batch.backbone], one.done, now - one.start)

        def rate(method: str, backbone: str) -> float:
            # An unknown pace is that of the method with other backbones, or else the median of all: a method that is
            # far slower than planned says nothing about others.
            known = [one.rate for one in work.values() if one.rate] or [1.0]
            same = [one.rate for kind, one in work.items() if kind[0] == method and one.rate]
            return work[method, backbone].rate or statistics.median(same or known)

        return sum(max(one.left, 0.0) * rate(*kind) for kind, one in work.items()) / self.workers


def _add(work: _Work, cost: float, seconds: float) -> None:
    work.left, work.done, work.seconds = work.left - cost, work.done + cost, work.seconds + seconds


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

            console = Console(stderr=True)
            self._live = RichLive(
                console=console, get_renderable=self._table, refresh_per_second=4, transient=True
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
        parts = [f"{ended} of {self.runs} runs"]
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
