"""Context vectors replaced by class-specific ones at a layer's input, against the tower's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.methods.class_tokens import ClassTokenEncoder
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import NAMES, tiny_backbone


def plain_features(
    model, tokenizer, names, prompt: str, contexts: Tensor, tokens: Tensor, layer: int
) -> Tensor:
    """Every prompt of "X X X {}." at 77 tokens, its vectors behind the start token replaced before block ``layer``."""
    M = len(contexts)
    ids = tokenizer([prompt.replace("{}", name) for name in names])
    x = model.token_embedding(ids)
    x = (
        torch.cat([x[:, :1], contexts.expand(len(names), -1, -1), x[:, 1 + M :]], 1)
        + model.positional_embedding
    )
    for number, block in enumerate(model.transformer.resblocks):
        if number == layer:
            x = torch.cat([x[:, :1], tokens, x[:, 1 + M :]], 1)
        x = block(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)]
    return x @ model.text_projection


@pytest.mark.parametrize(("layer", "quick_gelu"), [(1, False), (2, True)])
@pytest.mark.parametrize("prompt", ["X X X {}.", "X X X {}, a type of pet."])
def test_features_and_gradients_are_the_towers(layer: int, quick_gelu: bool, prompt: str) -> None:
    backbone = tiny_backbone(quick_gelu=quick_gelu)
    draw = torch.Generator().manual_seed(1)
    names = (*NAMES, "dog")  # two classes with the same prompt
    given = [
        (0.3 * torch.randn(*shape, 32, generator=draw, dtype=torch.float64)).requires_grad_()
        for shape in ((3,), (len(names), 3))
    ]
    encoder = ClassTokenEncoder(
        backbone,
        names,
        PromptLayout.written(prompt.replace("X X X", "[V]x3").replace("{}", "[CLASS]")),
        layer,
    )
    found = encoder(*(one[None] for one in given))[0]
    expected = plain_features(backbone.model, backbone.tokenizer, names, prompt, *given, layer)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for mine, plain in zip(
        torch.autograd.grad(found, given, cotangent),
        torch.autograd.grad(expected, given, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(*(one[None] for one in given))[0], expected, rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("layer", [0, 3, 8])
def test_a_layer_that_the_tower_lacks_is_refused(backbone: Backbone, layer: int) -> None:
    with pytest.raises(UserError, match=f"a layer from 1 to 2, .* got {layer}: .* has 3 layers"):
        ClassTokenEncoder(backbone, NAMES, PromptLayout(3), layer)
    ClassTokenEncoder(backbone, NAMES, PromptLayout(3), 2)
    with pytest.raises(UserError, match=r"a layer of a deeper text tower, .* has 1 layer,"):
        ClassTokenEncoder(tiny_backbone(layers=1), NAMES, PromptLayout(3), 1)
