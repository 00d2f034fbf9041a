"""What plans know of backbones without torch equals what open_clip and torch say."""

from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcoop.backbones.planned import DeviceName, clip_tokenizer, count_tokens

THEIRS = open_clip.get_tokenizer("RN50")
TEXTS = [
    "", " ", "a photo of a cat.", "A Café's two  sea-lions, (no. 17); x_y!", "don't we'll they'VE I'd",
    "&amp;lt; &#39;",
    "ﬁne ﬂour “quotes” – dash…", "naÃ¯ve mojibake", "犬と猫", "🐶 dog", "İstanbul ſharp ß", "x" * 400, "a.b.c.",
    "10,000", "<start_of_text> a <end_of_text>", "\ttab\nline\r", "e\u0301 combining", "½ ² ③ Ⅷ", "\x00\x7f",
]  # fmt: skip


@pytest.mark.parametrize("length", [8, 77, 300])
def test_tokens_are_those_of_open_clip(length: int) -> None:
    vocabulary = [word.removesuffix("</w>") for word in THEIRS.encoder]
    texts = [*TEXTS, *(" ".join(vocabulary[start : start + 40]) for start in range(0, len(vocabulary), 40))]
    assert clip_tokenizer()(texts, context_length=length).tolist() == THEIRS(texts, length).tolist()
    assert [count_tokens(clip_tokenizer(), text) for text in TEXTS] == [
        count_tokens(THEIRS, text) for text in TEXTS
    ]


@given(st.text())
def test_tokens_of_any_text_are_those_of_open_clip(text: str) -> None:
    assert clip_tokenizer()([text]).tolist() == THEIRS([text]).tolist()


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_device_has_the_name_of_its_tensors(device: str) -> None:
    assert DeviceName.of(device) == str(torch.empty(0, device=device).device)
    assert DeviceName.of(device).type == torch.device(device).type
    assert (DeviceName.of("cuda"), DeviceName.of("cuda:1").type) == ("cuda:0", "cuda")
