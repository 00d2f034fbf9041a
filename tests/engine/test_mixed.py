"""Prompts that mix words and vectors go through the same forest, as exactly."""

from __future__ import annotations

import pytest
import torch

from fastcoop.engine import encode_prompts, train
from fastcoop.prompts import PromptLayout
from tests.engine.test_exact import FEATURES, GRADIENTS, NAMES, contexts_for, relative
from tests.reference import reference_features, reference_mixed_features

PROMPTS = (
    "[V]x4 [CLASS], a type of pet.",
    "a photo of [V]x3 [CLASS] [V]x2 seen from above",
    "[CLASS] [V]x1, [V]x2 texture",
)


@pytest.mark.parametrize("class_specific", [False, True])
def test_mixed_prompts_match_the_reference_beside_others_in_one_forest(backbone, class_specific):
    torch.manual_seed(0)
    names = [name for name in NAMES if not name.endswith(")")]
    items = []
    for layout in (
        *(PromptLayout.written(prompt, class_specific) for prompt in PROMPTS),
        PromptLayout(4, "mid"),
    ):
        items.append((names, layout, contexts_for(layout, names, 2, backbone).requires_grad_()))
    outputs = encode_prompts(backbone, items)
    upstream = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    for (_, layout, contexts), out, up in zip(items, outputs, upstream, strict=True):
        for r in range(2):
            plain = contexts[r].detach().clone().requires_grad_()
            given = (backbone.model, backbone.tokenizer, names, plain)
            if layout.prompt is None:
                expected = reference_features(*given, layout.class_position)
            else:
                expected = reference_mixed_features(*given, layout.prompt)
            expected.backward(up[r])
            assert relative(out[r].detach(), expected.detach()) < FEATURES
            assert relative(contexts.grad[r], plain.grad) < GRADIENTS


def test_mixed_prompts_train_beside_others_as_alone(backbone, make_run):
    layouts = (PromptLayout.written(PROMPTS[0]), PromptLayout(4), PromptLayout.written(PROMPTS[1], True))
    runs = [make_run(layout) for layout in layouts]
    together = train(backbone, runs)
    for run, company in zip(runs, together, strict=True):
        (alone,) = train(backbone, [run])
        torch.testing.assert_close(alone.contexts, company.contexts, rtol=0, atol=1e-12)
        assert company.losses[-1] != company.losses[0]
