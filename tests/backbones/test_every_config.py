"""Every model that open_clip knows by name: how it learns prompts, by the table and by its tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import _build_text_tower

from fastcoop.backbones import PlainTower, TextTower, catalog, load
from fastcoop.backbones.text_tower import prompt_path, text_tower

NAMES = open_clip.list_models()
REASONS = {
    "hf_model_name": "it is not one of open_clip's own text transformers",
    "embed_cls": "its output is read at an appended class token",
    "no_causal_mask": "its attention is not causal",
}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same kind of text tower, a few kilobytes large."""
    return config["text_cfg"] | {"layers": 1, "heads": 2, "width": 16, "vocab_size": 100}


def test_the_table_says_how_every_model_learns_prompts() -> None:
    table = catalog._table()
    for name in NAMES:
        text = open_clip.get_model_config(name)["text_cfg"]
        reason = next((reason for option, reason in REASONS.items() if text.get(option)), "")
        assert table[name]["reason"].startswith(reason), name
        assert table[name]["path"] == ("plain" if reason else "shared"), name
        assert bool(table[name]["reason"]) == bool(reason), name
    for name in (*load.PAPER_BACKBONES, "ViT-L-14-336", "convnext_base", "EVA02-B-16"):
        assert table[name]["path"] == "shared"
    for name in ("ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "coca_ViT-B-32", "roberta-ViT-B-32", "nllb-clip-base"):
        assert table[name]["path"] == "plain"


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_itself_gets_the_same_verdict(name: str) -> None:
    config, listed = open_clip.get_model_config(name), catalog._table()[name]
    if "hf_model_name" in config["text_cfg"]:
        return  # its tower would be downloaded
    tower = _build_text_tower(8, small(config), bool(config.get("quick_gelu")))
    with torch.device("meta"):
        outline = _build_text_tower(8, small(config), bool(config.get("quick_gelu")))
    assert prompt_path(tower) == prompt_path(outline) == (listed["path"], listed["reason"])
    found, length = text_tower(tower), config["text_cfg"].get("context_length", 77)
    assert type(found) is (TextTower if listed["path"] == "shared" else PlainTower)
    assert (found.width, found.context_length, found.layers, found.heads) == (16, length, 1, 2)
    assert listed["tokens"] == length
    assert listed["image_size"] == np.max(config["vision_cfg"].get("image_size", 224))
    assert found.dim == (16 if config["text_cfg"].get("proj_type") == "none" else 8)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"pool_type": "last"}, 'read at "last"'),
        ({"qk_norm": True}, "its blocks are CustomResidualAttentionBlock"),
        ({"block_type": "custom"}, "its blocks are CustomResidualAttentionBlock"),
    ],
)
def test_kinds_of_tower_that_no_name_stands_for_yet(text: dict[str, Any], reason: str) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    changed = config | {"text_cfg": config["text_cfg"] | text}
    path = prompt_path(_build_text_tower(8, small(changed)))
    assert path.path == "plain"
    assert reason in path.reason
