"""Every model that open_clip knows by name: used, or refused with the reason, by its config alone."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import open_clip
import pytest
from open_clip.model import _build_text_tower

from fastcoop.backbones import TextTower, load, load_backbone
from fastcoop.backbones.text_tower import refuse_config
from fastcoop.errors import UserError
from tests.advice import follows

NAMES = open_clip.list_models()
REASONS = {
    "another library's": "it is not one of open_clip's own text transformers but ",
    "not causal": "its attention is not causal",
    "class token": "its output is read at an appended class token",
}


def verdict(config: dict[str, Any]) -> str:
    """ "used", or the reason why not."""
    try:
        refuse_config(config)
    except UserError as error:
        reason = re.sub(r"^This text tower cannot be used for prompt learning: ", "", str(error))
        return next(short for short, text in REASONS.items() if reason.startswith(text))
    return "used"


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same kind of text tower, a few kilobytes large."""
    return config["text_cfg"] | {"layers": 1, "heads": 2, "width": 16, "vocab_size": 100}


@follows(
    "Choose a CLIP whose text tower is causal and read at the end token",
)
def test_every_config_is_used_or_refused_with_its_reason() -> None:
    verdicts = {name: verdict(open_clip.get_model_config(name)) for name in NAMES}
    for name, said in verdicts.items():
        text = open_clip.get_model_config(name)["text_cfg"]
        expected = (
            "another library's" if "hf_model_name" in text
            else "class token" if text.get("embed_cls")
            else "not causal" if text.get("no_causal_mask")
            else "used"
        )  # fmt: skip
        assert said == expected, name
    count = Counter(verdicts.values())
    assert count.keys() == {"used", *REASONS}
    assert count["used"] > len(NAMES) / 2
    for name in (*load.PAPER_BACKBONES, "ViT-L-14-336", "convnext_base", "EVA02-B-16"):
        assert verdicts[name] == "used"
    for name in ("ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "coca_ViT-B-32", "roberta-ViT-B-32", "nllb-clip-base"):
        assert verdicts[name] != "used"


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_itself_gets_the_same_verdict(name: str) -> None:
    config = open_clip.get_model_config(name)
    if "hf_model_name" in config["text_cfg"]:
        return  # its tower would be downloaded; refused by the config alone
    tower = _build_text_tower(8, small(config), bool(config.get("quick_gelu")))
    if verdict(config) == "used":
        found = TextTower.from_model(tower)
        assert (found.width, found.context_length) == (16, config["text_cfg"].get("context_length", 77))
    else:
        with pytest.raises(UserError, match="cannot be used for prompt learning"):
            TextTower.from_model(tower)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"pool_type": "last"}, 'read at "last"'),
        ({"qk_norm": True}, r"not the standard ones \(qk_norm\)"),
        ({"block_type": "custom"}, r"not the standard ones \(block_type\)"),
    ],
)
def test_kinds_of_tower_that_no_name_stands_for_yet(text: dict[str, Any], reason: str) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    changed = config | {"text_cfg": config["text_cfg"] | text}
    with pytest.raises(UserError, match=reason):
        refuse_config(changed)
    with pytest.raises(UserError, match="cannot be used for prompt learning"):
        TextTower.from_model(_build_text_tower(8, small(changed)))


def test_a_refused_model_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CLIP", "CustomTextCLIP"):
        monkeypatch.setattr(open_clip, kind, lambda **_: pytest.fail("was built"))
    for name in NAMES:
        if verdict(open_clip.get_model_config(name)) != "used":
            with pytest.raises(UserError, match="cannot be used for prompt learning"):
                load_backbone(name)
