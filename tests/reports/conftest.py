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
        results = types.ModuleType("fastcoop.results")
        results.load_results = lambda folder: frame
        results.load_failures = lambda folder: pd.DataFrame()
        results.load_untested = lambda folder: pd.DataFrame()
        monkeypatch.setitem(sys.modules, "fastcoop.results", results)
        folder = tmp_path / "results"
        folder.mkdir()
        return folder

    return make
