"""Planning: keys, blocks that share runs, copies of a dataset, and the scale trial in a small form."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcoop.errors import UserError
from fastcoop.grids import read_grid
from fastcoop.grids.keys import RunKeys
from fastcoop.grids.planning import plan_runs
from fastcoop.methods import RunSpec
from fastcoop.results import load_results
from fastcoop.sweeps import Summary
from fastcoop.sweeps.loading import load_grid
from tests.small_world import write_backbone, write_dataset
from tests.sweeps.scale_trial import trial


def planned(grid: dict[str, Any], world: Path) -> list[RunSpec]:
    """Runs of a grid whose features are not cached."""
    loaded = load_grid(read_grid(grid), world / "data", "cpu")
    return plan_runs(loaded.runs())


def test_keys_do_not_depend_on_the_other_runs(world: Path, grid: dict[str, Any]) -> None:
    methods = grid["methods"] | {"ensemble": None, "text_bias": {"learning_rate": 0.1}}
    runs = planned(grid | {"methods": methods, "datasets": ["colours"], "shots": [1, 2, "all"]}, world)
    assert len({run.key for run in runs}) == len(runs) == 3 + 6 + 6 + 24
    for run in runs:
        assert run.key == RunKeys().of(run)


def test_blocks_share_runs_and_add_up_their_targets(world: Path, grid: dict[str, Any]) -> None:
    blocks = {
        "one": {"methods": {"coop": {"context_length": 2}}, "targets": {"colours": "shifted"}},
        "two": {
            "methods": {"coop": {"context_length": [2, 4]}},
            "targets": {"colours": ["other", "shifted"]},
        },
    }
    shared = {key: value for key, value in grid.items() if key != "methods"}
    runs = planned(shared | {"blocks": blocks}, world)
    assert len(runs) == 8
    first = [run for run in runs if run.settings.context_length == 2]
    assert {(run.dataset, *run.target_names) for run in first} == {("colours", "shifted", "other")}


def test_datasets_alike_but_for_their_pictures_are_two_and_copies_are_refused(
    run: Callable[..., Summary], world: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "data" / "first")
    write_dataset(tmp_path / "data" / "second", seed=5)  # the same files by name
    folders = {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}
    grid = grid | {"datasets": ["first", "second"], "shots": 1, "seeds": 1}
    assert run(grid, **folders, dry_run=True).runs == 14
    assert run(grid, **folders).finished == 14
    assert set(load_results(tmp_path / "results").dataset) == {"first", "second"}
    shutil.copytree(tmp_path / "data" / "first", tmp_path / "data" / "third")
    with pytest.raises(UserError, match="first and third have the same images"):
        run(grid | {"datasets": ["first", "third"]}, **folders)
    assert run(grid | {"datasets": "third"}, **folders).done_before == 7


def test_many_runs_are_planned_and_found_done(tmp_path: Path) -> None:
    """The trial's small form; its full one is a command (see scale_trial.py)."""
    for number, name in enumerate(("colours", "tints", "hues")):
        write_dataset(tmp_path / "data" / name, seed=number, train=2)
    write_backbone(tmp_path / "tiny")
    found = trial(3600, tmp_path, share=0.5)
    assert (found["runs"], found["done"], found["left"]) == (3600, 1800, 1800)
