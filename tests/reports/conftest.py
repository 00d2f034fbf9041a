"""A results folder as a sweep leaves it, without the sweep: `load_results` is replaced, the words are
written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function from a results table to a folder that `report` reads as holding it."""

    def make(frame: pd.DataFrame) -> Path:
        for name, table in (("results", frame), ("failures", pd.DataFrame()), ("untested", pd.DataFrame())):
            monkeypatch.setattr(f"fastcoop.results.load_{name}", lambda folder, table=table: table)
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        return folder

    return make
