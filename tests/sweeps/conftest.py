"""The small world that sweeps are tested on, and a sweep that is interrupted in it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from fastcoop.sweeps import Summary, checkpoints
from tests.small_study import grid, run, world

__all__ = ["grid", "run", "run_interrupted", "world"]


@pytest.fixture
def run_interrupted(
    run: Callable[..., Summary],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., None]:
    """Run a grid with a checkpoint after every step, and Ctrl-C after checkpoint number ``stop`` (from 0)."""

    def run_until(stop: int, *arguments: Any, **options: Any) -> None:
        written, write = count(), checkpoints.write_state

        def write_and_stop(*state: Any) -> None:
            write(*state)
            if next(written) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoints, "EVERY", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_state", write_and_stop)
            with pytest.raises(KeyboardInterrupt):
                run(*arguments, **options)

    return run_until
