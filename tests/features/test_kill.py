from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.features.small import contents, make_folder

TRIALS = 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_instant_the_rerun_ends_with_the_same_contents(tmp_path: Path) -> None:
    dataset = make_folder(tmp_path / "animals", train=8, val=4, test=8)
    trial = [sys.executable, "-m", "tests.features.kill_trial"]
    command = [*trial, str(dataset.root), str(tmp_path / "cache"), str(TRIALS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=600)
    assert int(done.stdout) == TRIALS
    stores = sorted((tmp_path / "cache").glob("*/tiny/animals.h5"))
    assert len(stores) >= 2
    expected = contents(tmp_path / "cache" / "whole" / "tiny" / "animals.h5")
    for store in stores:
        assert contents(store) == expected
        assert sorted(path.name for path in store.parent.iterdir()) == ["animals.h5", "animals.h5.lock"]
