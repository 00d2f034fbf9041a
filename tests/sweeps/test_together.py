"""Several processes on one cache and one results folder: the numbers of one alone, or one sentence.

The full form: python -m tests.sweeps.kill_trial --together 20
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastcoop.errors import UserError
from fastcoop.results import database, load_predictions, load_results
from fastcoop.sweeps import Summary
from tests.advice import follows

Sweep = Callable[..., Summary]


@follows("that has %s open; close it to continue")
def test_a_program_that_reads_does_not_end_a_sweep(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Another program has read, and keeps its transaction open for longer than SQLite waits."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.01)
    monkeypatch.setattr(database, "NOTICE_AFTER", 0.1)
    run(grid, results=tmp_path, only=["zero_shot"])
    reader = sqlite3.connect(tmp_path / "results.sqlite", isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM runs").fetchone()
    waiting = threading.Event()
    monkeypatch.setattr(database.log, "warning", lambda *said: (waiting.set(), caplog.records.append(said)))

    def release() -> None:
        waiting.wait(60)
        reader.execute("COMMIT")

    threading.Thread(target=release).start()
    assert run(grid, results=tmp_path, only=["linear_probe"]).finished == 4
    assert waiting.is_set()
    told = [
        said
        for said in caplog.records
        if isinstance(said, tuple) and "Waiting for another program" in said[0]
    ]
    assert len(told) == 1
    assert str(told[0][1]).endswith("results.sqlite")
    assert len(load_results(tmp_path)) == 6
    reader.close()


def test_our_readers_hold_no_lock_once_they_return(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    from fastcoop.results import read as results

    run(grid, results=tmp_path, only=["zero_shot"])
    key = load_results(tmp_path).key[0]
    for read in (
        lambda: results.load_runs(tmp_path),
        lambda: results.load_failures(tmp_path),
        lambda: results.find_key(tmp_path, key[:8]),
        lambda: results.load_run(tmp_path, key),
        lambda: load_predictions(tmp_path, key),
    ):
        read()
        with closing(sqlite3.connect(tmp_path / "results.sqlite", timeout=0, isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")


def test_a_database_that_is_just_being_made_holds_no_results_yet(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").touch()
    with pytest.raises(UserError, match="holds no results yet"):
        load_results(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trial forks its children")
def test_processes_at_random_moments_come_to_undisturbed_numbers() -> None:
    command = [sys.executable, "-m", "tests.sweeps.kill_trial", "--together", "2"]
    trial = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert trial.returncode == 0, trial.stderr
    assert json.loads(trial.stdout)["rounds"] == 2
