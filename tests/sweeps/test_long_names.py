"""Class names that no prompt can hold are refused before anything is cached or recorded, whatever the method."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from fastcoop.backbones import backbone_from_spec
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.methods import Data
from fastcoop.methods.text import check_class_names, check_prompts
from fastcoop.results import load_results
from fastcoop.sweeps import evaluate, sweep
from tests.small_world import write_backbone

METHODS: list[Any] = [
    "zero_shot",
    {"zero_shot": {"prompt": "a picture of {}, taken somewhere."}},
    "ensemble",
    {"text_bias": {"epochs": 1}},
    {"text_transform": {"epochs": 1}},
    {"finetune_image_encoder": {"epochs": 1}},
    {"coop": {"context_length": 2, "epochs": 1}},
]


@pytest.fixture
def places(world: Path, tmp_path: Path) -> dict[str, Any]:
    for name in ("colours", "other"):
        shutil.copytree(world / "data" / name, tmp_path / "data" / name)
    return {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}


def grid(world: Path, method: Any, **more: Any) -> dict[str, Any]:
    return {
        **{"backbones": str(world / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1},
        **{"methods": [method]},
        **more,
    }


def rename(folder: Path, name: str) -> None:
    (folder / "dataset.yaml").write_text(f"class_names: {{green: {name}}}", encoding="utf-8")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("where", ["colours", "other"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_long_name_is_refused_before_caching(
    world: Path, places: dict[str, Any], method: Any, where: str, dry_run: bool
) -> None:
    rename(places["data_root"] / where, "word " * 90)
    targets = {"targets": {"colours": ["other"]}} if where == "other" else {}
    with pytest.raises(
        UserError, match=r'class "word word.* has \d\d+ tokens .* reads at most 77; '
    ) as caught:
        sweep(grid(world, method, **targets), dry_run=dry_run, **places)
    assert len(str(caught.value)) < 900
    assert not places["cache"].exists()
    assert not places["results"].exists()
    if method == "zero_shot" and not dry_run:  # doing what is said
        rename(places["data_root"] / where, "word " * 60)
        sweep(grid(world, method, **targets), jobs=1, **places)
        assert load_results(places["results"]).status.eq("done").all()


def test_a_probe_makes_no_prompts(world: Path, places: dict[str, Any]) -> None:
    rename(places["data_root"] / "colours", "word " * 90)
    summary = sweep(grid(world, "linear_probe"), jobs=1, **places)
    assert (summary.finished, dict(summary.failed)) == (1, {})


@pytest.mark.parametrize("method", ["zero_shot", METHODS[-1]], ids=str)
def test_a_target_whose_names_are_too_long_is_not_evaluated(
    world: Path, places: dict[str, Any], method: Any
) -> None:
    sweep(grid(world, method), jobs=1, **places)
    rename(places["data_root"] / "other", "word " * 90)
    with pytest.raises(UserError, match='class "word word'):
        evaluate(
            places["results"], ["other"], backbones=[str(world / "tiny")], data_root=places["data_root"],
            cache=places["cache"],
        )  # fmt: skip
    assert not list(places["cache"].rglob("other.h5"))
    assert set(load_results(places["results"]).dataset) == {"colours"}


def test_a_name_that_the_tokenizer_reads_as_nothing(world: Path, places: dict[str, Any]) -> None:
    (places["data_root"] / "colours" / "dataset.yaml").write_text('class_names: {green: "\\a"}')
    with pytest.raises(UserError, match="reads as nothing"):
        sweep(grid(world, "zero_shot"), **places)
    assert not places["cache"].exists()


@pytest.mark.parametrize("name", ["🦉", "{}", "[CLASS]", "{0}", "%s", "[V]x4", "猫"])
def test_odd_names_are_prompted_as_they_are(world: Path, places: dict[str, Any], name: str) -> None:
    rename(places["data_root"] / "colours", f'"{name}"')
    methods = {"zero_shot": None, "ensemble": None, "coop": {"context_length": 2, "epochs": 1}}
    summary = sweep(grid(world, methods), jobs=1, **places)
    assert (summary.finished, dict(summary.failed)) == (3, {})


def test_prompts_of_few_characters_are_not_tokenized(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble of ImageNet is 80,000 prompts, which take half a minute; a character is one token at most."""
    backbone = backbone_from_spec(str(world / "tiny"))
    dataset = Dataset("imagenet", world, tuple(IMAGENET_CLASSNAMES), "{}", {}, "", "ImageNet", world)
    asked: list[str] = []
    counting = replace(
        backbone, tokenizer=lambda texts, **how: asked.extend(texts) or backbone.tokenizer(texts, **how)
    )
    check_prompts(counting, Data(dataset, None), "a bad photo of a {}.")
    check_class_names(counting, Data(dataset, None))
    assert len(asked) < 20


@pytest.mark.parametrize("method", ["coop", "cocoop", "tcp"])
def test_vectors_that_the_tower_cannot_read_are_refused_before_caching(
    places: dict[str, Any], tmp_path: Path, method: str
) -> None:
    settings = {"init": "random", "context_length": 75, "epochs": 1} | (
        {"layer": 1} if method == "tcp" else {}
    )
    given = {
        "backbones": str(write_backbone(tmp_path / "deep", text_layers=2)), "datasets": "colours", "shots": 1,
        "seeds": 1, "views": 1, "methods": {method: settings},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"tokens with its 75 context vectors.* use fewer context vectors"):
        sweep(given, **places, jobs=1, dry_run=True)
    assert not places["cache"].exists()
