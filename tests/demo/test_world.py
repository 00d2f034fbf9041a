from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcoop.datasets import load_dataset
from fastcoop.demo import world
from fastcoop.demo.world import DatasetPlan, build_world, drawings_of, plan
from fastcoop.errors import UserError
from tests.advice import follows
from tools.pretrain.plan import atlas, candidates, choose, held_out


@pytest.fixture(scope="module")
def plans() -> dict[str, DatasetPlan]:
    return {one.name: one for one in plan()}


def test_the_stored_plan_is_the_one_that_the_tool_chooses() -> None:
    assert choose() == plan()


def small(one: DatasetPlan) -> DatasetPlan:
    members = {
        split: {name: keys[:2] for name, keys in list(classes.items())[:2]}
        for split, classes in one.members.items()
    }
    return DatasetPlan(one.name, one.template, one.variation, members)


def test_every_class_has_pictures_enough(plans: dict[str, DatasetPlan]) -> None:
    for name in ("objects", "badges", "styles", "textures", "digits"):
        members = plans[name].members
        assert {len(keys) for keys in members["train"].values()} == {16}
        assert {len(keys) for keys in members["val"].values()} == {4}
        assert min(len(keys) for keys in members["test"].values()) >= 8
        assert 8 <= len(members["test"]) <= 24
    targets = [name for name in plans if name.startswith("objects-")]
    assert len(targets) >= 3
    for name in targets:
        assert set(plans[name].members) == {"test"}
        assert plans[name].members["test"].keys() <= plans["objects"].members["test"].keys()


def test_no_two_drawings_of_a_dataset_are_near_duplicates(plans: dict[str, DatasetPlan]) -> None:
    index, vectors, framed_vectors = atlas().index, atlas().vectors, atlas().framed_vectors
    for name in ("objects", "badges", "objects-phosphor"):
        sets = {split: plans[name].keys(split) for split in plans[name].members}
        if name.startswith("objects-"):
            sets["source"] = plans["objects"].keys("train", "val")
        keys = [index[key] for part in sets.values() for key in sorted(part)]
        assert len(set(keys)) == len(keys)
        near = vectors[keys] @ vectors[keys].T > 0.95
        np.fill_diagonal(near, False)
        assert not near.any()
        tests = [index[key] for key in sorted(sets["test"])]
        others = [index[key] for split in sets.keys() - {"test"} for key in sorted(sets[split])]
        assert (framed_vectors[tests] @ framed_vectors[others].T).max() <= 0.95


def test_pretraining_is_kept_from_test_glyphs_and_their_near_duplicates(
    plans: dict[str, DatasetPlan],
) -> None:
    every = atlas()
    kept_out = held_out(candidates())
    shown = [i for i, glyph in enumerate(every.glyphs) if glyph.key not in kept_out]
    tests = {key.split()[-1] for one in plans.values() for key in one.keys("test")}
    glyphs = sorted(every.index[key] for key in tests if key in every.index)
    assert len(glyphs) > 900
    assert (every.vectors[glyphs] @ every.vectors[shown].T).max() <= 0.95
    assert (every.framed_vectors[glyphs] @ every.framed_vectors[shown].T).max() <= 0.95
    assert len(shown) > 0.8 * len(every.glyphs)


def test_worlds_are_equal_and_load_as_datasets(
    plans: dict[str, DatasetPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [small(plans[name]) for name in ("badges", "styles", "textures", "digits", "objects-remix")]
    monkeypatch.setattr(world, "plan", lambda: some)
    names = build_world(tmp_path / "a")
    build_world(tmp_path / "b")
    assert names == ["badges", "styles", "textures", "digits", "objects-remix"]
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert sum(path.suffix == ".png" for path in files) == 4 * 12 + 4
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    dataset = load_dataset(tmp_path / "a" / "badges", None)
    assert dataset.class_names == ("alert", "check")
    assert dataset.template == "an icon with a {} badge."
    assert dataset.splits["train"].labels.tolist() == [0, 0, 1, 1]
    assert "test" in load_dataset(tmp_path / "a" / "objects-remix", None).splits
    first = (
        tmp_path
        / "a"
        / "badges"
        / "images"
        / json.loads((tmp_path / "a" / "badges" / "split.json").read_text())["train"][0][0]
    )
    with Image.open(first) as picture:
        assert picture.size == (64, 64)


def test_what_is_written_is_kept_and_what_is_old_is_renewed(
    plans: dict[str, DatasetPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "plan", lambda: [small(plans["textures"])])
    build_world(tmp_path)
    described = tmp_path / "textures" / "dataset.yaml"
    before = described.stat().st_mtime_ns
    build_world(tmp_path)
    assert described.stat().st_mtime_ns == before
    described.write_text("name: textures\n")
    build_world(tmp_path)
    assert "version" in described.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["textures"]


@follows("was not drawn by `fastcoop demo`; choose another folder (--out), or move it away")
def test_a_folder_of_ones_own_is_never_replaced(
    plans: dict[str, DatasetPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "plan", lambda: [small(plans["textures"])])
    own = tmp_path / "textures" / "wood" / "0.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"choose another folder \(--out\), or move it away"):
        build_world(tmp_path)
    assert own.read_bytes() == b"mine"
    build_world(tmp_path / "elsewhere")
    own.parents[1].rename(tmp_path / "mine")
    build_world(tmp_path)
    assert (tmp_path / "textures" / "split.json").is_file()


def test_textures_and_styles_differ_from_member_to_member() -> None:
    waves = drawings_of(["texture/waves/0", "texture/waves/1", "texture/waves/0"])
    assert (waves[0] == waves[2]).all()
    assert (waves[0] != waves[1]).mean() > 0.2
    solid, hatched = drawings_of(["solid remix/home-fill", "hatched remix/home-fill"])
    assert hatched.mean() < 0.8 * solid.mean()
