"""Prompts are laid out as the official code lays them out."""

from __future__ import annotations

import re

import open_clip
import pytest
import torch

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


def test_a_character_that_is_many_tokens_is_not_cut():
    def tokenizer(texts: list[str], context_length: int) -> torch.Tensor:
        """As mT5's, which reads this letter as 18: cuts at the length, with the end token last."""
        rows = [[5] * 18 * text.count("ﷺ") + [6] * text.count("a") for text in texts]
        return torch.tensor(
            [[*row[: context_length - 1], 1, *[0] * context_length][:context_length] for row in rows]
        )

    assert tokenize(tokenizer, ["ﷺ" * 9], None) == [[5] * 162 + [1]]
    with pytest.raises(UserError, match="has 163 tokens"):
        tokenize(tokenizer, ["ﷺ" * 9])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[V]x4 [CLASS], a type of pet.", "V0 V1 V2 V3 boxer dog , a type of pet ."),
        ("a photo of [V]x2 [CLASS].", "a photo of V0 V1 boxer dog ."),
        ("[V] [CLASS] [V]x2, a [V] pet", "V0 boxer dog V1 V2 , a V3 pet"),
        ("[V]x2[CLASS] texture", "V0 V1 boxer dog texture"),
        ("a [V]x2 [V] kind of [CLASS]", "a V0 V1 V2 kind of boxer dog"),
    ],
)
@pytest.mark.parametrize("class_specific", [False, True])
def test_words_and_vectors_mix(prompt, expected, class_specific):
    layout = PromptLayout.written(prompt, class_specific)
    prompts = class_prompts(TOKENIZER, ["cat", "boxer_dog"], layout)
    m = layout.context_length
    assert layout.shape(2, 8) == ((2, m, 8) if class_specific else (m, 8))
    assert written(prompts[0]) == f"<start_of_text> {expected.replace('boxer dog', 'cat')} <end_of_text>"
    if class_specific:
        expected = re.sub(r"V(\d)", lambda vector: f"V{m + int(vector[1])}", expected)
    assert written(prompts[1]) == f"<start_of_text> {expected} <end_of_text>"


def officially(name, layout):
    """The official code's prompt: tokenized behind placeholders, cut after as many tokens as the bare name has."""
    m = layout.context_length
    tail = tokenize(TOKENIZER, [f"{' '.join(['X'] * m)} {name}."])[0][1 + m :]
    bare = len(tokenize(TOKENIZER, [name])[0]) - 2
    vectors = [f"V{i}" for i in range(m)]
    before = {"end": m, "mid": m // 2, "front": 0}[layout.class_position]
    cut = len(tail) if layout.class_position == "end" else bare
    words = [TOKENIZER.decode([token]).strip() for token in tail]
    return " ".join(["<start_of_text>", *vectors[:before], *words[:cut], *vectors[before:], *words[cut:]])


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_the_positions_are_cases_of_written_prompts(position, m):
    layout = PromptLayout(m, position)
    names = ["cat", "shirt (blue)", "L\u00f6we", "t-shirt!", "C++", "it's", "shirt (blue) ", " cat"]
    assert [written(p) for p in class_prompts(TOKENIZER, names, layout)] == [
        officially(name, layout) for name in names
    ]
    text = {
        "end": f"[V]x{m} [CLASS].",
        "mid": f"[V]x{m // 2} [CLASS] [V]x{m - m // 2}.",
        "front": f"[CLASS] [V]x{m}.",
    }[position]
    same = PromptLayout.written(text)
    assert same.prompt is None
    assert class_prompts(TOKENIZER, names, same) == class_prompts(TOKENIZER, names, layout)


@pytest.mark.parametrize(
    "prompt", ["[CLASS].", "[V]x4 a cat.", "[V]x0 [CLASS]", "[v]x4 [CLASS]", "[V] [CLASS] [CLASS]"]
)
def test_a_prompt_needs_its_class_and_a_vector(prompt):
    with pytest.raises(UserError, match=r"needs one \[CLASS\] and at least one vector"):
        PromptLayout.written(prompt)


def test_what_does_not_fit_is_named_with_its_count():
    long = " ".join(["word"] * 60)
    with pytest.raises(
        UserError, match=r'class "word word.* has 79 tokens .* 16 context vectors.* at most 77'
    ):
        class_prompts(TOKENIZER, ["cat", long], PromptLayout(16))
    assert len(class_prompts(TOKENIZER, [long], PromptLayout(14))[0]) == 77


def test_the_tokenizer_is_asked_for_no_more_positions_than_the_words_can_take():
    """It fills a row per class: for ImageNet's thousand, 16,384 positions of each take a second."""
    asked = []

    def tokenizer(texts, context_length):
        asked.append(context_length)
        return TOKENIZER(texts, context_length)

    assert class_prompts(tokenizer, ["cat", "猫" * 20], PromptLayout(4))
    assert max(asked) < 200


@pytest.mark.parametrize("names", [[], ["cat", ""], ["cat", "_"]])
def test_missing_names_are_refused(names):
    with pytest.raises(UserError, match="name"):
        class_prompts(TOKENIZER, names, PromptLayout(4))


def test_unusable_layouts_are_refused():
    with pytest.raises(UserError, match=r'"middle" is unknown.* "mid"'):
        PromptLayout(4, "middle")
    with pytest.raises(UserError, match="whole number from 1 to 4294967295, got 0"):
        PromptLayout(0)
