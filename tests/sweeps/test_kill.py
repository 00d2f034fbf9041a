"""Sweeps survive being killed at any instant. The full form: python -m tests.sweeps.kill_trial --points 50"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

POINTS = 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trial forks its children")
def test_every_run_is_there_once_after_kills_at_random_points() -> None:
    command = [sys.executable, "-m", "tests.sweeps.kill_trial", "--points", str(POINTS)]
    trial = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert trial.returncode == 0, trial.stderr
    counts = json.loads(trial.stdout)
    assert counts["killed"] == POINTS
