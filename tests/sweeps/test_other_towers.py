"""Sweeps over backbones whose text towers are not CLIP's: CoCa, SigLIP, and one of Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcoop.backbones import Backbone, PromptPath
from fastcoop.errors import UserError
from fastcoop.methods import METHODS
from fastcoop.results import load_results
from fastcoop.sweeps import sweep
from tests.advice import follows
from tests.backbones.small_models import cut_models, write_folder, write_hub
from tests.small_world import write_dataset

NAMES = ("coca_ViT-B-32", "ViT-B-16-SigLIP2", "roberta-ViT-B-32")
OTHERS = {"coop", "kgcoop", "prograd", "tcp", "cocoop", "cross_modal"}  # learn prompts, or take seconds
METHODS_OF = {
    NAMES[0]: {"zero_shot", "ensemble", "linear_probe", "prolip", "finetune_image_encoder"},
    NAMES[1]: METHODS.keys() - OTHERS - {"prolip"},
    NAMES[2]: METHODS.keys() - OTHERS,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dataset and three backbones."""
    root = tmp_path_factory.mktemp("world")
    write_hub(root / "hub")
    write_dataset(root / "data" / "colours", train=3, val=1, test=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_models(monkeypatch, root / "hub")
        for name in NAMES:
            write_folder(root / name, name)
        yield root


def run(world: Path, results: Path, name: str, methods: dict[str, Any]) -> Any:
    grid = {
        "backbones": str(world / name),
        "datasets": "colours",
        "shots": 2,
        "seeds": 1,
        "views": 1,
        "methods": methods,
    }
    return sweep(grid, data_root=world / "data", cache=world / "cache", results=results, jobs=1)


@pytest.mark.parametrize("name", NAMES)
def test_methods_without_context_vectors_run(world: Path, tmp_path: Path, name: str) -> None:
    methods = METHODS_OF[name]
    summary = run(world, tmp_path / "results", name, dict.fromkeys(sorted(methods)))
    assert (summary.finished, summary.failed) == (len(methods), {})
    assert load_results(tmp_path / "results").accuracy.notna().all()


def test_features_before_a_projection_need_one(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SigLIP2 does not end in a linear projection"):
        run(world, tmp_path / "results", NAMES[1], {"prolip": None})


@follows("Leave out the method there, or use a backbone such as RN50 or ViT-B-16")
def test_a_method_that_cannot_run_is_refused_when_runs_are_planned(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"zero_shot": None, "tcp": {"epochs": 1}}
    with pytest.raises(
        UserError, match=r'"tcp" cannot run on the backbone roberta.* Leave out the method there'
    ):
        run(world, tmp_path / "tcp", NAMES[2], methods)
    assert run(world, tmp_path / "rest", NAMES[2], {"zero_shot": None}).finished == 1
    monkeypatch.setattr(Backbone, "prompt_path", PromptPath(None, "its text tower has no table"))
    with pytest.raises(
        UserError, match=r'"coop" cannot run on the backbone roberta.*: its text tower has no table'
    ):
        run(world, tmp_path / "coop", NAMES[2], {"zero_shot": None, "coop": {"epochs": 1}})
    assert run(world, tmp_path / "probe", NAMES[2], {"zero_shot": None, "linear_probe": None}).finished == 2
