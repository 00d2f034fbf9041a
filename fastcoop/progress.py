"""Progress of long work: a bar on a terminal, a line in a notebook, plain lines elsewhere, nothing with ``-q``."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from fastcoop import escape

# Seconds between plain lines: at first, and at most. In between they double, so that logs stay short.
PLAIN_LINE_EVERY = 5.0
MAX_LINE_EVERY = 300.0
NOTEBOOK_LINE_EVERY = 0.5


def is_shown() -> bool:
    """Return whether progress is shown: not if the "fastcoop" logger only passes errors."""
    return logging.getLogger("fastcoop").isEnabledFor(logging.WARNING)


def on_terminal() -> bool:
    """Return whether standard error is a terminal; it may also be closed."""
    return sys.stderr is not None and sys.stderr.isatty() and not in_notebook()


def in_notebook() -> bool:
    """Return whether standard error is shown below a notebook's cell, where a display can be updated."""
    return type(sys.stderr).__module__.startswith("ipykernel")


def print_line(text: str) -> None:
    """Print a line to standard error. A closed stream is no error: the work continues without it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(escape.visible(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return ``seconds`` as text in the largest fitting unit, such as "9 s", "12 min" or "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def time_left(seconds: float) -> str:
    """Return an estimate as text, such as "about 3 min left"."""
    if seconds < PLAIN_LINE_EVERY:
        return "a few seconds left"
    rounded = 10 * math.ceil(seconds / 10) if 20 <= seconds < 100 else seconds
    return f"about {duration(rounded)} left"


def counted(number: int | str, noun: str) -> str:
    """Return a number with its noun, such as "1 run", "2,000 runs", "2 batches" or "all shots"."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    shown = number if isinstance(number, str) else f"{number:,}"
    return f"{shown} {noun}{'' if str(number) == '1' else ending}"


class Advance(Protocol):
    """Report ``n`` more units done, and optionally a note on the current one."""

    def __call__(self, n: float = 1, note: str | None = None) -> None: ...


@contextmanager
def progress(title: str, total: float) -> Iterator[Advance]:
    """Show progress of ``total`` units on standard error while the block runs.

    On a terminal it is a bar (rich respects NO_COLOR), elsewhere now and then a line with the share done and the time
    left, which a notebook updates in place. Nothing is shown if the "fastcoop" logger only passes errors.

    Args:
        title: Shown before the bar.
        total: Number of units.

    Yields:
        A function ``advance(n=1, note=None)``.
    """
    if not is_shown():
        yield lambda n=1, note=None: None
    elif on_terminal():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        text = [TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[note]")]
        share = BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True)
        with Progress(text[0], *share, text[1], console=Console(stderr=True)) as bar:
            task = bar.add_task(escape.visible(title), total=total, note="")

            def advance(n: float = 1, note: str | None = None) -> None:
                shown: dict[str, Any] = {} if note is None else {"note": escape.visible(note)}
                bar.update(task, advance=n, **shown)

            yield advance
    else:
        with _plain(title, total) as advance:
            yield advance


class PlainLines:
    """Lines of progress without a terminal: a few in a log, fewer the longer the work takes; in a notebook, one line
    that is updated in place."""

    def __init__(self) -> None:
        self._start = self._printed = time.monotonic()
        self._in_notebook, self._shown = in_notebook(), None  # IPython's handle of the line

    def is_due(self) -> bool:
        """Return whether the last line is old enough for another one."""
        every = min(max(PLAIN_LINE_EVERY, self._printed - self._start), MAX_LINE_EVERY)
        return time.monotonic() - self._printed >= (NOTEBOOK_LINE_EVERY if self._in_notebook else every)

    def show(self, text: str, *details: str) -> None:
        """Print a line, in a log with lines of details below."""
        self._printed = time.monotonic()
        if not self._in_notebook:
            for line in (text, *(f"  {detail}" for detail in details)):
                print_line(line)
        elif self._shown is None:
            from IPython.display import display

            show: Any = display
            self._shown = show({"text/plain": escape.visible(text)}, raw=True, display_id=True)
        else:
            self._shown.update({"text/plain": escape.visible(text)}, raw=True)

    def finish(self, text: str) -> None:
        """Update a notebook's line, if there is one, for the last time."""
        if self._shown is not None:
            self.show(text)


@contextmanager
def _plain(title: str, total: float) -> Iterator[Advance]:
    lines, start, done = PlainLines(), time.monotonic(), 0.0

    def advance(n: float = 1, note: str | None = None) -> None:
        nonlocal done
        done += n
        if not done or not lines.is_due():
            return
        left = (time.monotonic() - start) * max(total - done, 0.0) / done
        share = 100.0 * min(done / total, 1.0) if total else 100.0
        lines.show(f"{title}: {share:.0f}%, {time_left(left)}{f' ({note})' if note else ''}")

    yield advance
    lines.finish(f"{title}: 100%")
