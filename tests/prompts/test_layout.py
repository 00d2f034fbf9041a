"""Prompts are laid out as the official code lays them out."""

from __future__ import annotations

import open_clip
import pytest

from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout, class_prompts
from fastcoop.prompts.layout import tokenize

TOKENIZER = open_clip.get_tokenizer("RN50")


def written(prompt) -> str:
    """A prompt with V<n> for learned vectors and words for tokens."""
    words = [
        f"V{slot.number}" if slot.learned else TOKENIZER.decode([slot.number]).strip() for slot in prompt
    ]
    return " ".join(words)


@pytest.mark.parametrize(
    ("position", "class_specific", "expected"),
    [
        ("end", False, "V0 V1 V2 boxer dog ."),
        ("mid", False, "V0 boxer dog V1 V2 ."),
        ("front", False, "boxer dog V0 V1 V2 ."),
        ("end", True, "V3 V4 V5 boxer dog ."),
        ("mid", True, "V3 boxer dog V4 V5 ."),
    ],
)
def test_where_vectors_and_names_stand(position, class_specific, expected):
    prompts = class_prompts(TOKENIZER, ["cat", "boxer_dog"], PromptLayout(3, position, class_specific))
    assert written(prompts[1]) == f"<start_of_text> {expected} <end_of_text>"


def test_a_name_whose_last_character_merges_with_the_full_stop():
    end, mid = (class_prompts(TOKENIZER, ["shirt (blue)"], PromptLayout(2, p))[0] for p in ("end", "mid"))
    assert written(end) == "<start_of_text> V0 V1 shirt ( blue ). <end_of_text>"
    assert written(mid) == "<start_of_text> V0 shirt ( blue ). V1 <end_of_text>"


def test_prompts_equal_the_tokenizer_s_where_words_fill_the_context():
    layout = PromptLayout(4)
    for name in ("Löwe", "t-shirt", "New York City"):
        prompt = class_prompts(TOKENIZER, [name], layout)[0]
        whole = tokenize(TOKENIZER, [f"a photo of a {name}."])[0]
        assert len(prompt) == len(whole)
        assert [slot.number for slot in prompt[5:]] == whole[5:]


def test_what_does_not_fit_is_named_with_its_count():
    long = " ".join(["word"] * 60)
    with pytest.raises(
        UserError, match=r'class "word word.* has 79 tokens .* 16 context vectors.* at most 77'
    ):
        class_prompts(TOKENIZER, ["cat", long], PromptLayout(16))
    assert len(class_prompts(TOKENIZER, [long], PromptLayout(14))[0]) == 77


@pytest.mark.parametrize("names", [[], ["cat", ""], ["cat", "_"]])
def test_missing_names_are_refused(names):
    with pytest.raises(UserError, match="name"):
        class_prompts(TOKENIZER, names, PromptLayout(4))


def test_unusable_layouts_are_refused():
    with pytest.raises(UserError, match=r'"middle" is unknown.* "mid"'):
        PromptLayout(4, "middle")
    with pytest.raises(UserError, match="at least 1, but 0"):
        PromptLayout(0)
