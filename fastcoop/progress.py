"""A progress bar with an estimate on a terminal; a plain line every few seconds elsewhere; nothing with ``-q``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_LINE_EVERY = 5.0  # seconds


class Advance(Protocol):
    """Report ``n`` more units done, and optionally what is being worked on."""

    def __call__(self, n: float = 1, note: str | None = None) -> None: ...


@contextmanager
def progress(title: str, total: float) -> Iterator[Advance]:
    """Show progress of ``total`` units on standard error while the block runs.

    Yields a function ``advance(n=1, note=None)``. NO_COLOR is respected (by rich); on anything but a terminal
    a plain line with the share done and the time left is printed at most every few seconds. Where the "fastcoop"
    logger is told to pass only errors, nothing is shown.
    """
    if not logging.getLogger("fastcoop").isEnabledFor(logging.WARNING):
        yield lambda n=1, note=None: None
    elif sys.stderr.isatty():
        yield from _bar(title, total)
    else:
        yield from _lines(title, total)


def _bar(title: str, total: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(n: float = 1, note: str | None = None) -> None:
            bar.advance(task, n)
            if note is not None:
                bar.update(task, note=note)

        yield advance


def _lines(title: str, total: float) -> Iterator[Advance]:
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
        print(
            f"{title}: {share:.0f}%, {left:.0f} s left{f' ({note})' if note else ''}",
            file=sys.stderr,
            flush=True,
        )

    yield advance
