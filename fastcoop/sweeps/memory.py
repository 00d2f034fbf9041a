"""How much memory a sweep takes, worker processes and all."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

EVERY = 0.5  # seconds between looks


class PeakMemory:
    """Watches, within ``with``, the resident sizes of this process and all that it started; ``peak`` is the largest sum
    seen, in bytes. Pages that processes share count for each, so the sum is rather too large than too small."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._look()

    def _look(self) -> None:
        this = psutil.Process()
        self.peak = max(self.peak, sum(map(_resident, [this, *this.children(recursive=True)])))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended
        return 0
