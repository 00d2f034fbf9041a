"""What a sweep shows while it runs: the share of its work done, what is running, new results and the time left."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from fastcoop import escape
from fastcoop.datasets.files import abbreviate
from fastcoop.methods import METHODS, Outcome, RunSpec
from fastcoop.methods.schedule import steps_of
from fastcoop.methods.spec import method_names
from fastcoop.progress import PlainLines, counted, is_shown, on_terminal, print_line, time_left
from fastcoop.results.records import Batch

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 12  # results at once on a terminal, and below plain lines of a young sweep
SHOWN_LATER = 3  # new results below a later plain line
SHOWN_RUNNING = 4  # running batches on a terminal at once
YOUNG = 60.0  # seconds
MAX_UNKNOWN = 1 / 2  # of the expected time left: more of it without a known pace, and none is stated
MAX_WAITED = 0.9  # of the expected time of a batch that reports no progress, however long it has run
COLUMN_WIDTHS = {"shots": 5, "seed": 4, "accuracy": 14, "seconds": 7}  # "62.5% diverged" fits

Kind = tuple[str, str, bool]  # of work: method, backbone, and whether the engine trains it


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
            self._works[_kind(batch)].left += batch.cost

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

    def finish(self, batch: Batch, failed: int = 0) -> None:
        """Count the end of a batch, ``failed`` runs of which have no outcome."""
        with self.lock:
            one = self._running.pop(batch.keys, _Running(batch, time.monotonic()))
            self._count(one, batch.cost * (1 - failed / len(batch.keys)) - one.done)
            self._works[_kind(batch)].left -= batch.cost - one.done

    def _count(self, one: _Running, cost: float, timed: bool = True) -> None:
        """Count ``cost`` more of a batch as done, ``timed`` if it took the time since the last such call."""
        work, now = self._works[_kind(one.batch)], time.monotonic()
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
        rates = {
            kind: work.seconds / work.timed
            for kind, work in self._works.items()
            if work.timed and work.seconds
        }
        of_method = {(method, trains) for method, _, trains in rates}

        def rate(kind: Kind) -> float:
            # An unknown pace is that of the method with other backbones, or else the median of methods alike: one that
            # is far slower than planned says nothing about others. Costs of tests, of trainings in the engine and of
            # those outside are guessed in different ways.
            same = [one for other, one in rates.items() if (other[0], other[2]) == (kind[0], kind[2])]
            alike = [one for other, one in rates.items() if _group(other) == _group(kind)]
            return rates.get(kind) or statistics.median(same or alike or [1.0])

        over = sum(work.done * rate(kind) for kind, work in self._works.items())
        rest = {kind: max(work.left, 0.0) * rate(kind) for kind, work in self._works.items()}
        todo, longest = sum(rest.values()), 0.0
        share = over / (over + todo) if over else 0.0
        unknown = sum(rest[kind] for kind in rest if (kind[0], kind[2]) not in of_method)
        if not rates or unknown > MAX_UNKNOWN * todo:
            return share, None
        for one in self._running.values():
            of_batch = (1 - one.share) * one.batch.cost * rate(_kind(one.batch))
            waited = min(time.monotonic() - one.since, MAX_WAITED * of_batch)
            todo, longest = todo - waited, max(longest, of_batch - waited)
        return share, max(todo / self.workers, longest, 0.0)


def _kind(batch: Batch) -> Kind:
    return batch.method, batch.backbone, batch.trains


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
        specs: The runs of its batches, by key.
        done_before: Number of the grid's other runs, which are done.
    """

    def __init__(
        self, runs: int, pace: Pace, specs: Mapping[str, RunSpec] | None = None, done_before: int = 0
    ):
        self.runs, self.pace, self.specs, self.done_before = runs, pace, specs or {}, done_before
        self.finished = self.failed = self.diverged = 0
        self._start, self._lines, self._line = time.monotonic(), PlainLines(), ""
        self._last: deque[tuple[RunSpec, Outcome]] = deque(maxlen=SHOWN)
        self._new = 0  # results since the last plain line
        self._texts: dict[tuple[str, ...], tuple[str, int]] = {}  # of batches and their steps, by keys
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
        self._lines.finish(self.state())

    def result(self, run: RunSpec, outcome: Outcome) -> None:
        with self.pace.lock:
            self.finished += 1
            self._new += 1
            self.diverged += outcome.status != "done"
            self._last.append((run, outcome))

    def tick(self) -> None:
        """Print a line, if the last one is old enough and something has changed. To be called every now and then."""
        if self._live is not None or not is_shown() or not self._lines.is_due():
            return
        line = "; ".join([self.state(), *self._running(1)])
        shown = min(self._new, SHOWN if time.monotonic() - self._start < YOUNG else SHOWN_LATER)
        if line != self._line or shown:
            results = [_sentence(*one) for one in list(self._last)[len(self._last) - shown :]]
            more = [f"and {counted(self._new - shown, 'earlier result')}"] if self._new > shown else []
            self._lines.show(line, *results, *more)
        self._line, self._new = line, 0

    def say(self, text: str) -> None:
        if self._live:
            self._live.console.print(escape.visible(text), markup=False, highlight=False)
        elif is_shown():
            print_line(text)

    def state(self) -> str:
        """Return the sweep's progress as one line."""
        with self.pace.lock:
            left = self.pace.seconds_left() if self.finished + self.failed < self.runs else None
            share = math.floor(100 * self.pace.share())
            parts = [f"{share}% done, {self.finished} of {counted(self.runs, 'run')}"]
            parts[0] += f" ({self.done_before:,} before)" if self.done_before else ""
            parts += [f"{self.failed} failed"] if self.failed else []
            parts += [f"{self.diverged} diverged"] if self.diverged else []
            return ", ".join([*parts, *([time_left(left)] if left is not None else [])])

    def _running(self, most: int) -> list[str]:
        """Return what is running now, a sentence each, and how many more."""
        running = self.pace.running()
        sentences = []
        for batch, share in running[:most]:
            if batch.keys not in self._texts:
                runs = [self.specs[key] for key in batch.keys]
                self._texts[batch.keys] = describe(runs), sum(map(steps_of, runs))
            text, steps = self._texts[batch.keys]
            of_steps = f"{math.floor(100 * share)}% of {counted(steps, 'step')}: " if steps else ""
            sentences.append(f"now {of_steps}{text}")
        more = [f"and {counted(len(running) - most, 'more batch')}"] if len(running) > most else []
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
        with self.pace.lock:
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
    label = labels[0] if len(labels) == 1 else f"{counted(len(labels), 'kind')} of {method_names(runs)}"
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
