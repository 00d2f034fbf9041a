"""Advice of the backbones package, followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from fastcoop.backbones import backbone_from_spec, load_backbone
from fastcoop.backbones.devices import resolve_device
from fastcoop.errors import UserError
from tests.advice import follows
from tests.backbones.test_kinds import write_model


@follows("found: {}; pass the file itself")
def test_a_folder_of_two_weights_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "two-files")
    weights = (folder / "open_clip_model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match="pass the file itself"):
        backbone_from_spec(str(folder))
    load_backbone("two-files", weights)


@follows("A seed draws random weights, and these are given (pretrained); leave it out")
def test_a_seed_beside_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    with pytest.raises(UserError, match="leave it out"):
        load_backbone("tiny", folder, seed=1)
    load_backbone("tiny", folder)


@follows('For included backbones, MODEL:TAG, folders and files, use backbone_from_spec("{}")')
def test_names_of_grid_files_in_python(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    for name in ("demo-resnet", str(folder)):
        with pytest.raises(UserError, match=r"use backbone_from_spec\("):
            load_backbone(name)
        assert backbone_from_spec(name).name == Path(name).name
    with pytest.raises(UserError, match=r'use backbone_from_spec\("RN50:openai"\)'):
        load_backbone("RN50:openai")


@follows('The device "{}" cannot be used on this machine; use {}')
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match="use cpu"):
        resolve_device("vulkan:7")
    resolve_device("cpu")


@follows(
    "name the tower's own tokenizer in the model config (hf_tokenizer_name), or correct its vocab_size",
    "name the tower's own tokenizer (hf_tokenizer_name), or correct eos_id",
)
@pytest.mark.parametrize(
    ("wrong", "right", "part"),
    [
        ({"vocab_size": 100}, {"vocab_size": 49408}, "or correct its vocab_size"),
        ({"pool_type": "eos", "eos_id": 2}, {"pool_type": "eos", "eos_id": 49407}, "or correct eos_id"),
    ],
)
def test_a_tokenizer_of_another_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], right: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError, match=part):
        backbone_from_spec(str(write_model(tmp_path / "wrong", **wrong)))
    backbone_from_spec(str(write_model(tmp_path / "right", **right)))

    def own_tokenizer(*_: object, context_length: int, **__: object) -> Any:
        plain = open_clip.SimpleTokenizer(context_length=context_length)

        def tokenize(texts: list[str], context_length: int) -> Any:
            ids = plain(texts, context_length=context_length)
            return ids.clamp(max=99) if "vocab_size" in wrong else ids.where(ids != 49407, 2)

        return tokenize

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", own_tokenizer)
    own = write_model(tmp_path / "own", **wrong, hf_tokenizer_name="own/tokenizer")
    (own / "tokenizer.json").touch()
    backbone_from_spec(str(own))


@follows('{} "{}" needs the package transformers; install it (pip install "fastcoop[hf]")')
def test_a_tokenizer_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "tiny", hf_tokenizer_name="some/tokenizer")
    (folder / "tokenizer.json").touch()

    def missing(*_: object, **__: object) -> None:
        raise ImportError("no transformers")

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", missing)
    with pytest.raises(UserError, match="needs the package transformers; install it"):
        backbone_from_spec(str(folder))
    plain = open_clip.SimpleTokenizer()
    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", lambda *_, **__: plain)
    backbone_from_spec(str(folder))


@follows("Choose another backbone, such as RN50 or ViT-B-16")
def test_what_needs_a_causal_tower(tmp_path: Path) -> None:
    backbone = backbone_from_spec(str(write_model(tmp_path / "tiny", True, no_causal_mask=True)))
    with pytest.raises(UserError, match=r"does not have: its attention is not causal\. Choose another"):
        _ = backbone.shared_text
    assert load_backbone("RN50").shared_text.layers == 12


@follows("Use zero-shot, a linear probe or an adapter with it")
def test_a_tower_without_a_table_of_words(tmp_path: Path) -> None:
    class OfBytes(torch.nn.Module):
        context_length, output_dim = 77, 24

        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.Linear(77, 24)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.weights(ids / 256)

    loaded = backbone_from_spec(str(write_model(tmp_path / "tiny", True, no_causal_mask=True)))
    loaded.model.text = OfBytes()
    backbone = replace(loaded)
    assert backbone.prompt_path.path is None
    with pytest.raises(UserError, match="This backbone cannot learn prompts"):
        _ = backbone.text.width
    assert backbone.encode_text(["a cat", "a dog"]).shape == (2, 24)
