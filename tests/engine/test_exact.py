"""The forest computes what the plain 77-token way computes: class features and gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcoop.engine import PromptEncoder, encode_prompts
from fastcoop.engine.forest import Forest, Trees, Workspace
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.engine.weights import fold
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout, initial_contexts
from fastcoop.prompts.layout import Slot, tokenize
from fastcoop.prompts.tree import build_tree
from tests.engine.conftest import tiny_backbone
from tests.reference import reference_features

# prefixes of each other, repeated, one token, twelve tokens, punctuation, non-ASCII letters
NAMES = (
    "cat", "cat fish", "cat fish pie", "dog", "dog", "boxer_dog", "Löwe", "été", "t-shirt (blue)",
    "the very long name of one class with twelve tokens inside it",
)  # fmt: skip
FEATURES, GRADIENTS = 1e-12, 1e-10
WORDS = {  # to start M vectors from, one token each
    1: "photo",
    4: "a photo of a",
    7: "a photo of the one and only",
    16: "this is a photo of one of the many things that there are in the world",
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def compare(backbone, items) -> tuple[float, float]:
    """Largest relative error of class features and of context gradients over the items' runs."""
    inputs = [(names, layout, contexts.clone().requires_grad_()) for names, layout, contexts in items]
    outputs = encode_prompts(backbone, inputs)
    upstream = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    errors = []
    for (names, layout, contexts), out, up in zip(inputs, outputs, upstream, strict=True):
        for r in range(len(contexts)):
            plain = contexts[r].detach().clone().requires_grad_()
            expected = reference_features(
                backbone.model, backbone.tokenizer, names, plain, layout.class_position
            )
            expected.backward(up[r])
            errors.append(
                (relative(out[r].detach(), expected.detach()), relative(contexts.grad[r], plain.grad))
            )
    features, gradients = torch.tensor(errors).amax(0).tolist()  # unlike max, it shows a nan
    return features, gradients


def contexts_for(layout, names, runs, backbone, scale=0.3):
    return scale * torch.randn(runs, *layout.shape(len(names), backbone.text.width), dtype=backbone.dtype)


def start_of(layout, start, backbone, names=NAMES):
    """The contexts, of one run, that a training starts from: random ones, or words."""
    words = WORDS[layout.context_length] if start == "words" else None
    return initial_contexts(backbone, layout, len(names), 0, words).to(backbone.dtype)[None]


@pytest.mark.parametrize("start", ["random", "words"])
@pytest.mark.parametrize("length", [1, 4, 7, 16])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_every_layout_matches_the_reference(backbone, position, class_specific, length, start):
    layout = PromptLayout(length, position, class_specific)
    features, gradients = compare(backbone, [(NAMES, layout, start_of(layout, start, backbone))])
    assert features < FEATURES
    assert gradients < GRADIENTS


def test_every_layout_and_start_at_once_in_one_forest_match_the_reference(backbone):
    layouts = [
        PromptLayout(length, position, class_specific)
        for length, position, class_specific in product(WORDS, ("end", "mid", "front"), (False, True))
    ]
    items = [
        (NAMES, layout, start_of(layout, start, backbone))
        for layout, start in product(layouts, ("random", "words"))
    ]
    features, gradients = compare(backbone, items)
    assert len(items) == 48
    assert features < FEATURES
    assert gradients < GRADIENTS


def test_the_names_are_as_hard_as_they_should_be(backbone):
    lengths = {
        name: len(tokens) - 2 for name, tokens in zip(NAMES, tokenize(backbone.tokenizer, NAMES), strict=True)
    }
    assert {1, 12} <= set(lengths.values())
    assert len(set(NAMES)) < len(NAMES)
    assert any(a != b and b.startswith(a) for a in NAMES for b in NAMES)
    assert any(not name.isascii() for name in NAMES)


def test_mixed_runs_in_one_forest_match_the_reference(backbone):
    items = []
    for length, position, class_specific, names, runs in [
        (4, "end", False, NAMES, 3), (16, "mid", True, NAMES[:4], 1), (7, "front", False, NAMES[3:], 2),
        (1, "end", True, NAMES[5:6], 1), (4, "end", False, NAMES[:2], 1),
    ]:  # fmt: skip
        layout = PromptLayout(length, position, class_specific)
        items.append((names, layout, contexts_for(layout, names, runs, backbone)))
    features, gradients = compare(backbone, items)
    assert features < FEATURES
    assert gradients < GRADIENTS


def test_padding_without_a_start_token_changes_nothing():
    """A short prompt is padded, and padding has no constant to read."""
    tower = fold(tiny_backbone().text)
    names = [[1], [2, 3], [3, 2, 1]]
    vectors = torch.randn(len(names), tower.width, dtype=tower.dtype)
    up = torch.randn(len(names), tower.dim, dtype=tower.dtype)

    def encode(*classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [
            (Slot(True, n), *(Slot(False, token) for token in names[name]), Slot(False, 99))
            for n, name in enumerate(classes)
        ]
        forest_pass = ForestPass(Forest(tower, [(TreeLayout(build_tree(prompts), tower), 1)]))
        workspace = Workspace(tower)
        features = forest_pass.forward(vectors[[*classes]], workspace)
        return features, forest_pass.backward(up[[*classes]], workspace)

    alone = [encode(n) for n in range(len(names))]
    for together, of_classes in zip(encode(0, 1, 2), zip(*alone, strict=True), strict=True):
        assert relative(together, torch.cat(of_classes)) < FEATURES


def test_small_chunks_change_nothing(backbone, monkeypatch):
    monkeypatch.setattr("fastcoop.engine.forest.CPU_CHUNK", 7)
    layout = PromptLayout(4, "mid")
    features, gradients = compare(backbone, [(NAMES, layout, contexts_for(layout, NAMES, 5, backbone))])
    assert features < FEATURES
    assert gradients < GRADIENTS


def test_word_initialized_contexts_equal_the_written_prompt(backbone):
    layout = PromptLayout(4)
    start = initial_contexts(backbone, layout, len(NAMES), 0, "a photo of a")
    ours = PromptEncoder(backbone, NAMES, layout)(start[None].double())[0]
    written = backbone.encode_text([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    assert relative(ours, written) < FEATURES


@pytest.mark.parametrize("heads", [4, 2])  # of 8 numbers, or of 16, which the kernels for CPUs take
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_float32_agrees_to_1e_5(position, class_specific, heads):
    backbone32 = tiny_backbone(torch.float32, heads=heads)
    torch.manual_seed(0)
    layouts = [PromptLayout(length, position, class_specific) for length in (1, 4, 7, 16)]
    items = [(NAMES, layout, contexts_for(layout, NAMES, 2, backbone32)) for layout in layouts]
    features, gradients = compare(backbone32, items)
    assert features < 1e-5
    assert gradients < 1e-5


def test_a_prompt_that_does_not_fit_is_refused_with_its_class_and_count(backbone):
    with pytest.raises(UserError, match=r'class "word word.*" has 83 tokens'):
        PromptEncoder(backbone, ["cat", " ".join(["word"] * 64)], PromptLayout(16))


def test_contexts_of_another_shape_are_refused(backbone):
    with pytest.raises(UserError, match=r"Expected contexts of shape \(4, 32\).* got \(1, 5, 32\)"):
        PromptEncoder(backbone, ["cat", "dog"], PromptLayout(4))(torch.zeros(1, 5, 32))


words = st.sampled_from(["red", "tall", "dog", "house", "été", "o'clock", "x2", "supercalifragilistic"])
name_lists = st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6)
layouts = st.builds(
    PromptLayout,
    st.integers(1, 9),
    st.sampled_from(["end", "mid", "front"]),
    st.booleans(),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(name_lists, layouts, st.integers(1, 3)), min_size=1, max_size=4))
def test_random_forests_match_the_reference(backbone, items):
    torch.manual_seed(0)
    built = [(names, layout, contexts_for(layout, names, runs, backbone)) for names, layout, runs in items]
    features, gradients = compare(backbone, built)
    assert features < FEATURES
    assert gradients < GRADIENTS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residual_gradients_are_summed_in_float32_at_least(dtype):
    """Layers whose parts are below the last digit of a bfloat16 sum: what they add up to is known to a few percent."""
    sums = []
    for precision in (torch.float64, dtype):
        torch.manual_seed(0)
        trees = Trees(tiny_backbone(layers=12), precision)
        small = tuple(replace(b, out=b.out / 8192, proj=b.proj / 8192) for b in trees.tower.blocks)
        trees.replace_tower(replace(trees.tower, blocks=small))
        forest = Forest(trees.tower, [(trees[NAMES, PromptLayout(4)], 1)])
        forest_pass, workspace = ForestPass(forest), Workspace(trees.tower)
        forest_pass.forward(torch.randn(4, trees.tower.width, dtype=torch.float64), workspace)
        start = torch.randn(forest.rows, trees.tower.width, dtype=torch.float64).sign()
        grad = start.to(torch.promote_types(precision, torch.float32), copy=True)
        for layer in range(10, 0, -1):
            grad = forest_pass.layer_backward(layer, grad, workspace)
        sums.append(grad.double() - start)
    assert relative(sums[1], sums[0]) < 0.05
