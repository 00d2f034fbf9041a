"""A results folder as a sweep leaves it, without the sweep: `load_results` is replaced, the words are
written."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function from a results table to a folder that `report` reads as holding it."""

    def make(frame: pd.DataFrame) -> Path:
        sweeps = types.ModuleType("fastcoop.sweeps")
        sweeps.load_results = lambda folder: frame
        sweeps.load_failures = lambda folder: pd.DataFrame()
        sweeps.load_untested = lambda folder: pd.DataFrame()
        monkeypatch.setitem(sys.modules, "fastcoop.sweeps", sweeps)
        folder = tmp_path / "results"
        folder.mkdir()
        return folder

    return make
