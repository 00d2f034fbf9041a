"""What a sweep shows while it runs: the share of its work done, what is running, new results and the time left."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from fastcoop import escape
from fastcoop.errors import abbreviate
from fastcoop.methods import METHODS, Outcome, RunSpec
from fastcoop.methods.schedule import steps_of
from fastcoop.methods.spec import method_names
from fastcoop.progress import PlainLines, counted, is_shown, on_terminal, print_line, time_left
from fastcoop.sweeps.pace import Pace

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 12  # results at once on a terminal, and below plain lines of a young sweep
SHOWN_LATER = 3  # new results below a later plain line
SHOWN_RUNNING = 4  # running batches on a terminal at once
YOUNG = 60.0  # seconds
COLUMN_WIDTHS = {"shots": 5, "seed": 4, "accuracy": 14, "seconds": 7}  # "62.5% diverged" fits


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
                self._texts[batch.keys] = describe_runs(runs), sum(map(steps_of, runs))
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


def describe_runs(runs: Sequence[RunSpec]) -> str:
    """Return the runs of a batch in a few words."""
    labels = list(dict.fromkeys(map(_label, runs)))
    label = labels[0] if len(labels) == 1 else f"{counted(len(labels), 'kind')} of {method_names(runs)}"
    text = label
    shots = sorted(
        {run.shots for run in runs if run.shots}, key=lambda shots: (isinstance(shots, str), shots)
    )
    if shots:
        text += f", {counted(f'{shots[0]} to {shots[-1]}' if len(shots) > 1 else shots[0], 'shot')}"
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
    few_shot = f", {counted(shots, 'shot')}, seed {seed}" if shots else ""
    return f"{_label(run)} on {run.dataset}{few_shot}: {accuracy}"


def _label(run: RunSpec) -> str:
    return METHODS[run.method].label(run.settings)
