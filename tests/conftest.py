"""Settings of all tests: one thread per process, no network, and worker processes only for whole runs."""

from __future__ import annotations

import os

import pytest

# Tests run side by side: two torch programs that both use all cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Start no worker processes where only some tests were asked for."""
    chosen = config.option.keyword or any(
        "::" in argument or argument.endswith(".py") for argument in config.args
    )
    return 0 if chosen else None


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports become empty files: drawing takes most of the time of tests that read what reports say."""
    monkeypatch.setattr("fastcoop.reports.style._draw", lambda figure: [b""] * 3)
