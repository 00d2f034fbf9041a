"""What a sweep shows while it runs: results as they come, throughput and time left."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
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
NUMBERS = {
    "shots": 5,
    "seed": 4,
    "accuracy": 14,
    "seconds": 7,
}  # columns, and what they need ("62.5% diverged")


class Pace:
    """How fast work goes: what is left of each kind (a method, by backbone) at the rate seen so far.

    Safe to read from another thread than the one that changes it.
    """

    def __init__(self, batches: Iterable[Batch], workers: int):
        self.workers = max(1, workers)
        self._left: dict[tuple[str, str], float] = {}
        self._done: dict[tuple[str, str], float] = {}
        self._spent: dict[tuple[str, str], float] = {}
        self._begun: dict[str, tuple[Batch, float, float]] = {}  # batch, when, cost done
        self._lock = threading.Lock()
        for batch in batches:
            self.add(batch)

    def add(self, batch: Batch) -> None:
        kind = batch.method, batch.backbone
        with self._lock:
            self._left[kind] = self._left.get(kind, 0.0) + batch.cost

    def begin(self, batch: Batch) -> None:
        with self._lock:
            self._begun[batch.name] = batch, time.monotonic(), 0.0

    def progress(self, batch: Batch, runs: float) -> None:
        with self._lock:
            if batch.name in self._begun:
                _, when, done = self._begun[batch.name]
                done = min(batch.cost, done + runs * batch.cost / len(batch.keys))
                self._begun[batch.name] = batch, when, done

    def finish(self, batch: Batch, seconds: float) -> None:
        kind = batch.method, batch.backbone
        with self._lock:
            self._begun.pop(batch.name, None)
            self._left[kind] -= batch.cost
            self._done[kind] = self._done.get(kind, 0.0) + batch.cost
            self._spent[kind] = self._spent.get(kind, 0.0) + seconds

    def seconds_left(self) -> float:
        """Expected seconds until all is done, if no worker is ever idle."""
        now = time.monotonic()
        with self._lock:
            done, spent, left = dict(self._done), dict(self._spent), dict(self._left)
            begun = list(self._begun.values())
        for batch, when, cost in begun:
            kind = batch.method, batch.backbone
            if cost:
                done[kind] = done.get(kind, 0.0) + cost
                spent[kind] = spent.get(kind, 0.0) + now - when
                left[kind] -= cost
        rates = {kind: spent[kind] / done[kind] for kind in done if done[kind]}
        return sum(max(cost, 0.0) * _rate(kind, rates) for kind, cost in left.items()) / self.workers


def _rate(kind: tuple[str, str], rates: Mapping[tuple[str, str], float]) -> float:
    """Seconds per cost of a kind of work, as seen of that kind, else of its method on other backbones, else of the
    kind in the middle, since one that is far slower than thought says nothing of the others."""
    alike = [rate for other, rate in rates.items() if other[0] == kind[0]]
    return rates.get(kind) or statistics.median(alike or rates.values() or [1.0])


class Live:
    """A table that is drawn anew on a terminal; plain lines, a few seconds apart, elsewhere. On standard error.

    rich draws the table from a thread of its own; results come from the sweep's. Nothing is shown where the "fastcoop"
    logger passes errors only.
    """

    def __init__(self, runs: int, pace: Pace):
        self.runs, self.pace = runs, pace
        self.ended = self.failed = self.diverged = 0
        self._start = self._said = time.monotonic()
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
        """A run has ended."""
        with self._lock:
            self.ended += 1
            self.diverged += outcome.status != "done"
            self._last.append((run, outcome))

    def fail(self) -> None:
        """A run has failed for good."""
        with self._lock:
            self.failed += 1

    def tick(self) -> None:
        """Called now and then; says something where it is time to."""
        now = time.monotonic()
        if self._live is None and is_shown() and now - self._said >= LINE_EVERY:
            self._said = now
            last = f"; {_words(*self._last[-1])}" if self._last else ""
            if (line := self.state() + last) != self._line:
                print_line(line)
            self._line = line

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._live.console.print(escape.visible(text), markup=False, highlight=False)
        elif is_shown():
            print_line(text)

    def state(self) -> str:
        """How far the sweep is, in a line."""
        minutes = (time.monotonic() - self._start) / 60
        with self._lock:
            ended, failed, diverged = self.ended, self.failed, self.diverged
        parts = [f"{ended} of {self.runs} runs"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{diverged} diverged"] if diverged else []
        if ended:
            parts.append(f"{ended / max(minutes, 1e-9):.0f} a minute")
        parts.append(f"{duration(self.pace.seconds_left())} left")
        return ", ".join(parts)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.state(), "bold"), title_justify="left", box=None, pad_edge=False)
        for name in ("dataset", "method"):
            table.add_column(name)  # what is too long goes on in the next line; numbers stay whole
        for name, width in NUMBERS.items():
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        with self._lock:
            last = list(self._last)
        for run, outcome in last:
            texts = (run.dataset, _label(run), *_numbers(run, outcome), f"{outcome.seconds:.1f}")
            table.add_row(*(Text(escape.visible(text)) for text in texts))  # a str would be read as markup
        return table


def _numbers(run: RunSpec, outcome: Outcome) -> tuple[str, str, str]:
    accuracy = next(
        (f"{one.accuracy:.1f}%" for one in outcome.scores.values() if one.accuracy == one.accuracy), ""
    )
    if outcome.status != "done":
        accuracy = f"{accuracy} {outcome.status}".lstrip()
    learned = run.subset is not None
    return (str(run.shots), str(run.seed), accuracy) if learned else ("", "", accuracy)


def _words(run: RunSpec, outcome: Outcome) -> str:
    shots, seed, accuracy = _numbers(run, outcome)
    where = f", {shots} shot{'s' * (shots != '1')}, seed {seed}" if shots else ""
    return f"{_label(run)} on {run.dataset}{where}: {accuracy}"


def _label(run: RunSpec) -> str:
    return METHODS[run.method].label(run.settings)
