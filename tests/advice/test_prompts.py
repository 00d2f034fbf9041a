"""The advice in messages of the prompts and the engine, followed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastcoop.backbones import Backbone
from fastcoop.engine import PromptEncoder
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout, initial_contexts, word_tokens
from tests.advice import follows
from tests.engine.conftest import tiny_backbone

NAMES = ["cat", "dog"]
LONG = "word " * 70 + "word"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone(torch.float32)


@follows("choose a tokenizer that belongs to the tower")
def test_a_tokenizer_that_belongs_to_the_tower(backbone):
    def reversed_ids(texts, context_length=77):
        ids = backbone.tokenizer(texts, context_length=context_length)
        return torch.where(ids > 0, 49408 - ids, ids)

    with pytest.raises(UserError, match="choose a tokenizer that belongs to the tower"):
        PromptEncoder(replace(backbone, tokenizer=reversed_ids), NAMES, PromptLayout(4))
    PromptEncoder(backbone, NAMES, PromptLayout(4))


@follows("which the text tower reads, got {}; use fewer context vectors")
def test_fewer_context_vectors(backbone):
    with pytest.raises(UserError, match="use fewer context vectors"):
        initial_contexts(backbone, PromptLayout(78), 2, seed=1)
    initial_contexts(backbone, PromptLayout(16), 2, seed=1)


@follows("set the context length to {}")
def test_the_words_own_context_length(backbone):
    with pytest.raises(UserError, match="set the context length to 4"):
        initial_contexts(backbone, PromptLayout(16), 2, seed=1, words="a photo of a")
    initial_contexts(backbone, PromptLayout(4), 2, seed=1, words="a photo of a")


@follows("give some, or leave them out for random vectors")
def test_some_words_or_none(backbone):
    with pytest.raises(UserError, match="give some, or leave them out"):
        initial_contexts(backbone, PromptLayout(1), 2, seed=1, words=" ")
    initial_contexts(backbone, PromptLayout(1), 2, seed=1, words="photo")
    initial_contexts(backbone, PromptLayout(1), 2, seed=1)


@follows("leave out class_position={}", "make the layout with PromptLayout.written")
@pytest.mark.parametrize(
    "wrong", [{"context_length": 4, "class_position": "mid"}, {"context_length": 3}], ids=str
)
def test_a_layout_from_a_written_prompt(wrong):
    prompt = "[V]x4 [CLASS], a type of pet."
    with pytest.raises(
        UserError, match=r"leave out class_position=mid|make the layout with PromptLayout\.written"
    ):
        PromptLayout(prompt=prompt, **wrong)
    assert PromptLayout(4, prompt=prompt) == PromptLayout.written(prompt)


@follows("reads at most {}; shorten it")
def test_shorter_words(backbone):
    with pytest.raises(UserError, match="shorten it"):
        word_tokens(backbone, LONG + LONG)
    word_tokens(backbone, LONG)


@follows("shorten the name or use fewer context vectors")
def test_a_shorter_name_or_fewer_vectors(backbone):
    with pytest.raises(UserError, match="shorten the name or use fewer context vectors"):
        PromptEncoder(backbone, ["cat", LONG], PromptLayout(16))
    PromptEncoder(backbone, ["cat", "word"], PromptLayout(16))
    PromptEncoder(backbone, ["cat", LONG], PromptLayout(3))
