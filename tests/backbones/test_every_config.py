"""Every model that open_clip knows by name: how it learns prompts, by its config alone and by its tower."""

from __future__ import annotations

from collections import Counter
from typing import Any

import open_clip
import pytest
from open_clip.model import _build_text_tower

from fastcoop.backbones import PlainTower, TextTower, load, prompt_path_of
from fastcoop.backbones.text_tower import prompt_path, text_tower

NAMES = open_clip.list_models()
REASONS = {
    "hf_model_name": "it is not one of open_clip's own text transformers but ",
    "embed_cls": "its output is read at an appended class token",
    "no_causal_mask": "its attention is not causal",
}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same kind of text tower, a few kilobytes large."""
    return config["text_cfg"] | {"layers": 1, "heads": 2, "width": 16, "vocab_size": 100}


def test_every_config_says_how_it_learns_prompts() -> None:
    paths = {name: prompt_path_of(open_clip.get_model_config(name)) for name in NAMES}
    for name, path in paths.items():
        text = open_clip.get_model_config(name)["text_cfg"]
        reason = next((reason for option, reason in REASONS.items() if text.get(option)), "")
        assert path.reason.startswith(reason), name
        assert path.path == ("plain" if reason else "shared"), name
        assert bool(path.reason) == bool(reason), name
    count = Counter(path.path for path in paths.values())
    assert count["shared"] > len(NAMES) / 2
    for name in (*load.PAPER_BACKBONES, "ViT-L-14-336", "convnext_base", "EVA02-B-16"):
        assert paths[name].path == "shared"
    for name in ("ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "coca_ViT-B-32", "roberta-ViT-B-32", "nllb-clip-base"):
        assert paths[name].path == "plain"


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_itself_gets_the_same_verdict(name: str) -> None:
    config = open_clip.get_model_config(name)
    if "hf_model_name" in config["text_cfg"]:
        return  # its tower would be downloaded
    tower = _build_text_tower(8, small(config), bool(config.get("quick_gelu")))
    length, expected = config["text_cfg"].get("context_length", 77), prompt_path_of(config)
    assert prompt_path(tower) == expected
    found = text_tower(tower)
    assert type(found) is (TextTower if expected.path == "shared" else PlainTower)
    assert (found.width, found.context_length, found.layers, found.heads) == (16, length, 1, 2)
    assert found.dim == (16 if config["text_cfg"].get("proj_type") == "none" else 8)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"pool_type": "last"}, 'read at "last"'),
        ({"qk_norm": True}, "not the standard ones (qk_norm)"),
        ({"block_type": "custom"}, "not the standard ones (block_type)"),
    ],
)
def test_kinds_of_tower_that_no_name_stands_for_yet(text: dict[str, Any], reason: str) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    changed = config | {"text_cfg": config["text_cfg"] | text}
    assert reason in prompt_path_of(changed).reason
    assert prompt_path(_build_text_tower(8, small(changed))).path == "plain"
