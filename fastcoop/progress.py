"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing with ``-q``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from fastcoop import escape

PLAIN_LINE_EVERY = 5.0  # seconds


def is_shown() -> bool:
    """Return whether progress is shown: not if the "fastcoop" logger only passes errors."""
    return logging.getLogger("fastcoop").isEnabledFor(logging.WARNING)


def on_terminal() -> bool:
    """Return whether standard error is a terminal; it may also be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


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


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 run", "2,000 runs" or "2 batches"."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"


class Advance(Protocol):
    """Report ``n`` more units done, and optionally a note on the current one."""

    def __call__(self, n: float = 1, note: str | None = None) -> None: ...


@contextmanager
def progress(title: str, total: float) -> Iterator[Advance]:
    """Show progress of ``total`` units on standard error while the block runs.

    On a terminal it is a bar (rich respects NO_COLOR), elsewhere a line every few seconds with the share done and the
    time left. Nothing is shown if the "fastcoop" logger only passes errors.

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
        yield _line_printer(title, total)


def _line_printer(title: str, total: float) -> Advance:
    start = last = time.monotonic()
    done = 0.0

    def advance(n: float = 1, note: str | None = None) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < PLAIN_LINE_EVERY or not done:
            return
        last = now
        left = (now - start) * max(total - done, 0.0) / done
        share = 100.0 * min(done / total, 1.0) if total else 100.0
        print_line(f"{title}: {share:.0f}%, {duration(left)} left{f' ({note})' if note else ''}")

    return advance
