"""Grid files that come with fastcoop are there by name, wherever one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcoop.errors import UserError
from fastcoop.grids import read_grid
from fastcoop.grids.grid import shipped_grid

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_every_grid_file_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in EXPERIMENTS.glob("*.yaml"):
        for name in (path.stem, path.name, f"experiments/{path.name}"):
            assert shipped_grid(name).read_bytes() == path.read_bytes()
    assert read_grid("experiments/photographs.yaml") == read_grid(EXPERIMENTS / "photographs.yaml")


def test_a_file_of_ones_own_comes_first_and_others_are_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fig3.yaml").write_text("backbones: a\ndatasets: b\nmethods: zero_shot\n")
    assert read_grid("fig3.yaml").datasets == ("b",)
    for wrong in ("elsewhere/fig3.yaml", "fig33", "fig3.yml"):
        assert shipped_grid(wrong) is None
        with pytest.raises(UserError, match="There is no grid file"):
            read_grid(wrong)
