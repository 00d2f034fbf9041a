"""Follow the advice in messages about grid files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastcoop.errors import UserError
from fastcoop.grids import read_grid
from fastcoop.grids.planning import plan_runs
from fastcoop.sweeps.loading import load_grid
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset

TOP = "backbones: b\ndatasets: [d, e]\n"
MANY = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]\n" for n in range(1, 7))


@follows(
    'A block cannot be called "{}", which is a method; rename it',
    "leave it out of its own targets",
    '"{}" holds for the whole grid; put it at its top',
    "The method {} is listed twice with the same settings; leave one",
    "The aliases of {} stand for more than {} values; write fewer",
    "check its indentation and quotes",
    '"{}" was given before, in line {}; leave one',
    "{} is nested too deeply, or an alias is in what it stands for; write its values out",
    "{}YAML reads {} as {}; write {}, or the number that is meant",
)
@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        ("blocks: {coop: {methods: coop}}", "rename it", "blocks: {unified: {methods: coop}}"),
        ("methods: coop\ntargets: {d: [d, e]}", "leave it out", "methods: coop\ntargets: {d: [e]}"),
        ("blocks: {x: {methods: coop, views: 0}}", "put it at its top", "views: 0\nblocks: {x: {methods: coop}}"),
        ("methods: [coop, coop]", "listed twice .*; leave one", "methods: [coop]"),
        (f"methods: coop\nk0: &k0 [a]\n{MANY}", "aliases .* write fewer", "methods: &m [coop]"),
        ('methods: {coop: {init: "a}}', "check its indentation and quotes", 'methods: {coop: {init: "a"}}'),
        ("methods: &m [*m]", "write its values out", "methods: &m [coop]"),
        ("methods: coop\nseeds: 010", "YAML reads 010 as 8; write 8", "methods: coop\nseeds: 8"),
        ("methods: coop\nseeds: 1\nseeds: 2", "given before, in line 4; leave one", "methods: coop\nseeds: 2"),
    ],
)  # fmt: skip
def test_files(tmp_path: Path, wrong: str, message: str, right: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(TOP + wrong)
    with pytest.raises(UserError, match=message):
        read_grid(file)
    file.write_text(TOP + right)
    assert [*read_grid(file).runs()]


@follows("{} draws, of the seeds 1 to {}; write seeds: [{}] for this seed alone")
def test_a_number_of_seeds(caplog: pytest.LogCaptureFixture) -> None:
    given = {"backbones": "b", "datasets": "d", "shots": 1, "methods": "coop"}
    assert read_grid(given | {"seeds": 10}).blocks[0].seeds == tuple(range(1, 11))
    assert "seeds: 10 means 10 draws, of the seeds 1 to 10; write seeds: [10]" in caplog.text
    assert read_grid(given, ["seeds=3"]).blocks[0].seeds == (1, 2, 3)
    caplog.clear()
    for seeds, expected in ((1, (1,)), ("1-10", tuple(range(1, 11))), ([10], (10,))):
        assert read_grid(given | {"seeds": seeds}).blocks[0].seeds == expected
    assert read_grid(given, ["seeds=[10]"]).blocks[0].seeds == (10,)
    assert not caplog.text


def test_a_seed_that_is_no_number_of_draws() -> None:
    given = {"backbones": "b", "datasets": "d", "shots": 1, "methods": "coop"}
    with pytest.raises(UserError, match=r"expected 1 to 100 draws, a list of seeds such as \[2024\]"):
        read_grid(given | {"seeds": 2024})
    assert read_grid(given | {"seeds": [2024]}).blocks[0].seeds == (2024,)


@follows(
    "--set gives {} twice; leave one of them",
    "in a grid, got {} of type {}; convert it to a list or to text",
    "as a key of a mapping in a grid, got {}; change the key",
)
@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        (({}, ["shots=1", "shots=2"]), "leave one of them", ({}, ["shots=2"])),
        (
            ({}, ["methods.coop.init=[a"]),
            "check its indentation and quotes",
            ({}, ['methods.coop.init="[a"']),
        ),
        (({"shots": (n for n in [1, 2])}, []), "convert it", ({"shots": [1, 2]}, [])),
        (({"datasets": [b"d"]}, []), "convert it", ({"datasets": [b"d".decode()]}, [])),
        (
            ({"methods": {"coop": {"epochs": {(1, 2): 5}}}}, []),
            "change the key",
            ({"methods": {"coop": {"epochs": {1: 5, 2: 5}}}}, []),
        ),
    ],
)
def test_mappings_and_options(wrong: Any, message: str, right: Any) -> None:
    grid = {"backbones": "b", "datasets": "d", "methods": "coop"}
    with pytest.raises(UserError, match=message):
        read_grid(grid | wrong[0], wrong[1])
    assert [*read_grid(grid | right[0], right[1]).runs()]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data" / "colours", train=1, val=1, test=1)
    write_backbone(tmp_path / "tiny")
    return tmp_path


def plan(world: Path, **changed: Any) -> list[Any]:
    """Plan a grid whose features are not cached."""
    grid = {"backbones": str(world / "tiny"), "datasets": "colours", "methods": "zero_shot"} | changed
    loaded = load_grid(read_grid(grid), world / "data", "cpu")
    return plan_runs(loaded.runs())


@follows("so their runs would be the same; use one of them", "name it under targets instead")
def test_a_backbone_of_two_names_and_a_dataset_without_training_images(world: Path) -> None:
    shutil.copytree(world / "tiny", world / "copy")
    with pytest.raises(UserError, match=r"same weights.*use one of them"):
        plan(world, backbones=[str(world / "tiny"), str(world / "copy")])
    assert len(plan(world)) == 1
    write_dataset(world / "data" / "shifted", train=0, val=0, test=1, seed=1)
    with pytest.raises(UserError, match="name it under targets instead"):
        plan(world, methods="linear_probe", shots=1, seeds=1, datasets=["colours", "shifted"])
    (run,) = plan(world, methods="linear_probe", shots=1, seeds=1, targets={"colours": "shifted"})
    assert run.target_names == ("shifted",)


@follows('The {} "{}" and "{}" are both called {}; rename one', "are of two datasets called {}; rename one")
def test_two_things_of_one_name(world: Path) -> None:
    other = write_dataset(world / "elsewhere" / "colours", train=2, val=1, test=1, seed=1)
    with pytest.raises(UserError, match="both called colours; rename one"):
        plan(world, datasets=["colours", str(other)])
    with pytest.raises(UserError, match="two datasets called colours; rename one"):
        plan(world, datasets=["colours:base", f"{other}:new"])
    other.rename(other.with_name("tints"))
    tints = str(other.with_name("tints"))
    assert len(plan(world, datasets=["colours", tints])) == 2
    assert len(plan(world, datasets=["colours:base", f"{tints}:new"])) == 2
