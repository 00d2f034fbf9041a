"""Towers of every kind that open_clip builds go through the forest, and those that it cannot read are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastcoop.engine import PromptEncoder
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.engine.test_exact import FEATURES, GRADIENTS, NAMES, compare, contexts_for

TOWERS: dict[str, dict[str, Any]] = {
    "one layer": {"layers": 1},
    "two layers": {"layers": 2},
    "QuickGELU": {"quick_gelu": True},
    "tanh GELU": {"act_kwargs": {"approximate": "tanh"}},
    "LayerScale": {"ls_init_value": 0.5},
    "a narrow MLP": {"mlp_ratio": 2.5},
    "one head": {"width": 40, "heads": 1},
    "sixteen heads": {"width": 64, "heads": 16},
    "32 positions": {"context_length": 32},
    "no projection": {"kind": "CustomTextCLIP", "proj_type": "none"},
    "a linear projection": {"kind": "CustomTextCLIP", "proj_bias": True},
    "read at its own end token": {"kind": "CustomTextCLIP", "pool_type": "eos", "eos_id": 49407},
}


@pytest.mark.parametrize("kind", TOWERS)
def test_every_kind_of_tower_matches_the_reference(kind):
    backbone = tiny_backbone(**TOWERS[kind])
    torch.manual_seed(0)
    items = []
    for position in ("end", "mid", "front"):
        layout = PromptLayout(5, position, position == "mid")
        items.append((NAMES, layout, contexts_for(layout, NAMES, 2, backbone)))
    features, gradients = compare(backbone, items)
    assert features < FEATURES
    assert gradients < GRADIENTS


def test_a_tower_read_at_another_token_than_the_last_is_refused():
    other = tiny_backbone(kind="CustomTextCLIP", pool_type="eos", eos_id=2)
    with pytest.raises(
        UserError, match=r"reads its output at token 2, but its tokenizer ends a prompt with .* 49407"
    ):
        PromptEncoder(other, NAMES, PromptLayout(4))


def test_a_tower_read_at_the_largest_token_needs_that_to_be_the_last(backbone):
    def reversed_ids(texts, context_length=77):
        ids = backbone.tokenizer(texts, context_length=context_length)
        return torch.where(ids > 0, 49408 - ids, ids)

    with pytest.raises(UserError, match=r"reads its output at token .* ends a prompt with token 1;"):
        PromptEncoder(replace(backbone, tokenizer=reversed_ids), NAMES, PromptLayout(4))
