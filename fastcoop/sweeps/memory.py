"""Peak memory of a sweep, worker processes included."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

EVERY = 0.5  # seconds between samples


class PeakMemory:
    """Context manager that samples the resident sizes of this process and its children.

    ``peak`` is the largest sum seen, in bytes. Pages shared by processes count once per process, so the sum is an upper
    bound.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        this = psutil.Process()
        self.peak = max(self.peak, sum(map(_resident_bytes, [this, *this.children(recursive=True)])))


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended
        return 0
