"""Nearest words of a results folder, against a plain search over the whole vocabulary, run by run."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout, initial_contexts
from fastcoop.reports.words import read_words
from fastcoop.results import load_contexts, load_results
from fastcoop.sweeps import interpret, sweep
from tests.small_world import write_backbone, write_dataset


@pytest.fixture(scope="module")
def results(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One seed of a unified, a class-specific and a worded context."""
    folder = tmp_path_factory.mktemp("interpret")
    methods = [
        {"coop": {"context_length": 3, "class_specific": [False, True], "epochs": 2}},
        {"coop": {"init": "a photo of a", "epochs": 1}},
    ]
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 2, "seeds": 1, "views": 1, "methods": methods,
    }  # fmt: skip
    sweep(grid, data_root=world / "data", cache=world / "cache", results=folder, jobs=1)
    return folder


@pytest.fixture(scope="module")
def backbone(world: Path) -> Backbone:
    return backbone_from_spec(str(world / "tiny"))


@pytest.fixture(scope="module")
def kinds(results: Path, backbone: Backbone) -> dict[str, dict]:
    return read(results, backbone, k=2)


def read(results: Path, backbone: Backbone, **options: Any) -> dict[str, dict]:
    """{kind of context: what is stored of it}."""
    interpret(results, backbone, **options)
    kinds = {}
    for row in load_results(results).itertuples():
        kind = "specific" if row.class_specific else "unified" if row.init == "random" else "worded"
        kinds[kind] = json.loads((results / "nearest_words" / f"{row.key}.json").read_text())
        kinds[kind]["contexts"] = torch.from_numpy(load_contexts(results, row.key))
    return kinds


def plain_nearest(backbone: Backbone, vectors: torch.Tensor) -> torch.Tensor:
    embeddings = backbone.model.token_embedding.weight.detach()[
        :49406
    ].double()  # without the two special tokens
    return torch.cdist(vectors.double(), embeddings).min(1).values


def test_every_vector_of_every_class_is_read(kinds, backbone):
    for kind, stored in kinds.items():
        flat = stored["contexts"].flatten(0, -2)
        near = torch.tensor([vector["distances"][0] for vector in stored["vectors"]], dtype=torch.float64)
        torch.testing.assert_close(near, plain_nearest(backbone, flat), rtol=1e-4, atol=1e-6)
        length = 4 if kind == "worded" else 3
        assert [vector["position"] for vector in stored["vectors"]] == [
            1 + i % length for i in range(len(flat))
        ]
        assert all(len(vector["words"]) == 2 for vector in stored["vectors"])


def test_class_specific_readings_name_their_class_and_are_summarised(kinds):
    stored = kinds["specific"]
    names = [vector["class"] for vector in stored["vectors"]]
    assert names == [name for name in ("dark red", "green", "grey", "sky blue") for _ in range(3)]
    summary = stored["summary"]
    assert summary["classes"] == 4
    nearest = Counter(vector["words"][0] for vector in stored["vectors"])
    assert {tuple(pair) for pair in summary["words"]} <= set(nearest.items())
    assert sum(count for _, count in summary["words"]) >= min(10, len(nearest))
    distances = [vector["distances"][0] for vector in stored["vectors"]]
    assert summary["mean_distance"] == pytest.approx(sum(distances) / 12, rel=1e-4)
    assert "summary" not in kinds["unified"]


def test_classes_of_one_name_are_told_apart(world: Path, tmp_path: Path, backbone: Backbone) -> None:
    """ImageNet has two classes called "missile", and two called "sunglasses"."""
    data = write_dataset(tmp_path / "data" / "colours")
    (data / "dataset.yaml").write_text("class_names: {grey: green}")
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 0,
        "methods": {"coop": {"context_length": 2, "class_specific": True, "epochs": 1}},
    }  # fmt: skip
    sweep(grid, data_root=tmp_path / "data", cache=tmp_path / "cache", results=tmp_path / "results", jobs=1)
    (path,) = interpret(tmp_path / "results", backbone)
    names = [vector["class"] for vector in json.loads(path.read_text())["vectors"]]
    assert names[::2] == ["dark red", "green (class 1)", "green (class 2)", "sky blue"]
    read = read_words(tmp_path / "results", path.stem)
    assert read.vectors["class"].nunique() == 4


def test_what_one_would_see_by_chance_stands_beside(kinds, backbone):
    generator = torch.Generator().manual_seed(5)
    noise = 0.02 * torch.randn(300, 16, generator=generator)
    for stored in kinds.values():
        assert stored["by_chance"] == pytest.approx(float(plain_nearest(backbone, noise).mean()), rel=0.02)
        for vector, context in zip(stored["vectors"][:1], stored["contexts"].flatten(0, -2), strict=False):
            directions = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator), dim=-1)
            same = plain_nearest(backbone, directions * context.norm())
            assert vector["chance"] == pytest.approx(float(same.mean()), rel=0.1)
    start = initial_contexts(backbone, PromptLayout(3), 4, seed=1)
    expected = float(plain_nearest(backbone, start).mean())
    assert kinds["unified"]["initial"] == pytest.approx(expected, rel=1e-4)
    assert kinds["worded"]["initial"] == pytest.approx(0, abs=1e-6)
    assert kinds["worded"]["start_words"] == ["a", "photo", "of", "a"]


def test_cosine_distances(results, backbone):
    stored = read(results, backbone, metric="cosine")["unified"]
    embeddings = backbone.model.token_embedding.weight.detach()[:49406].double()
    context = stored["contexts"].double()
    cosines = (context @ embeddings.T) / context.norm(dim=1)[:, None] / embeddings.norm(dim=1)
    near = [vector["distances"][0] for vector in stored["vectors"]]
    assert near == pytest.approx((1 - cosines.max(1).values).tolist(), rel=1e-3)
    assert stored["metric"] == "cosine"


def test_other_scripts_are_not_available_on_request(results, backbone):
    def words(**options: Any) -> list[str]:
        kinds = read(results, backbone, k=400, **options)
        return [word for vector in kinds["specific"]["vectors"] for word in vector["words"]]

    written, latin = words(), words(latin_only=True)
    hidden = [word for word, shown in zip(written, latin, strict=True) if shown == "N/A" != word]
    assert hidden
    assert all(max(word) > "\u024f" for word in hidden)
    assert all(shown == word for word, shown in zip(written, latin, strict=True) if shown != "N/A")
    assert all(max(word) < "\u20d0" for word in latin)


def test_nothing_to_read_is_said(results, backbone):
    with pytest.raises(UserError, match="whole number from 1"):
        interpret(results, backbone, k=0)


def test_every_run_that_is_named_must_be_there(results, backbone):
    (key, *_), (other, *_) = (load_results(results).key[:1], ["zzzz"])
    with pytest.raises(UserError, match=r"no CoOp run zzzz over tiny; `fastcoop results list .*` shows"):
        interpret(results, backbone, runs=[key[:8], other])
    for written in (key[:12], key[:12].upper()):
        (one,) = interpret(results, backbone, runs=written)
        assert one.stem == key


def test_files_hold_the_options(results, backbone):
    interpret(results, backbone)
    for options in ({"k": 3}, {"metric": "cosine"}, {"latin_only": True}, {"trained_only": False}):
        for path in interpret(results, backbone, **options):
            stored = json.loads(path.read_text())
            assert options.items() <= stored.items()
            assert len(stored["vectors"][0]["words"]) == options.get("k", 5)


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results, tmp_path / "results"))


def test_missing_and_damaged_contexts_are_named_and_left_out(copy, backbone, caplog):
    one, other, _ = sorted((copy / "contexts").iterdir())
    shutil.rmtree(copy / "nearest_words", ignore_errors=True)
    one.unlink()
    assert len(interpret(copy, backbone)) == 2
    assert (
        f"1 of 3 runs of {copy} are left out; the first: {copy} has no learned contexts for run"
        in caplog.text
    )
    assert f"there is no {one}." in caplog.text
    other.write_bytes(other.read_bytes()[:-1])
    assert len(interpret(copy, backbone)) == 1
    assert f"{other} is damaged" in caplog.text or "2 of 3 runs" in caplog.text
    with pytest.raises(UserError, match=f"there is no {re.escape(str(one))}"):
        interpret(copy, backbone, runs=[one.stem[:12]])
    with pytest.raises(UserError, match=f"{re.escape(str(other))} is damaged"):
        interpret(copy, backbone, runs=[other.stem])
    shutil.rmtree(copy / "contexts")
    with pytest.raises(
        UserError, match=r"has no learned contexts for run .*: there is no .*\.safetensors\.$"
    ):
        interpret(copy, backbone)


def test_a_backbone_without_runs_is_told_from_those_with(results, tmp_path):
    other = backbone_from_spec(str(write_backbone(tmp_path / "wider", embed_dim=24)))
    with pytest.raises(
        UserError, match=r"no CoOp run over wider \(its CoOp runs are over tiny\); `fastcoop results"
    ):
        interpret(results, other)
