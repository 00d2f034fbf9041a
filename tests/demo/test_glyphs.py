from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fastcoop.demo.glyphs import Glyph, blurred, draw, find_glyphs
from fastcoop.errors import UserError


def test_glyphs_have_names_and_drawings() -> None:
    glyphs = find_glyphs(["phosphor"])
    assert len({glyph.key for glyph in glyphs}) == len(glyphs) > 4000
    by_name = {glyph.name: glyph for glyph in glyphs}
    house, tree = draw([by_name["house"], by_name["tree"]])
    assert house.shape == (64, 64)
    assert 0.02 < house.mean() / 255 < 0.6
    assert abs(house.astype(int) - tree).mean() > 5


def test_words_leave_out_style() -> None:
    glyph = Glyph("material", "font", "folder-lock-outline", 1)
    assert (glyph.words, glyph.style) == (("folder", "lock"), ("outline",))
    assert Glyph("awesome", "font", "0", 1).words == ("0",)


def test_a_bold_edition_is_a_near_duplicate_and_another_subject_is_not() -> None:
    by_name = {glyph.name: glyph for glyph in find_glyphs(["phosphor"])}
    vectors = blurred(draw([by_name[name] for name in ("envelope", "envelope-light", "tree")]))
    assert vectors[0] @ vectors[1] > 0.95
    assert vectors[0] @ vectors[2] < 0.9
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_without_the_fonts_the_way_to_get_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "fastcoop\[demo\]"'):
        find_glyphs(["remix"])
