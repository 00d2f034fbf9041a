from __future__ import annotations

import numpy as np

from fastcoop.demo.glyphs import Glyph, draw, find_glyphs
from tools.pretrain.captions import style_of, words_of
from tools.pretrain.plan import unit_vectors


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
    assert (words_of(glyph), style_of(glyph)) == (("folder", "lock"), ("outline",))
    assert words_of(Glyph("awesome", "font", "0", 1)) == ("0",)


def test_a_bold_edition_is_a_near_duplicate_and_another_subject_is_not() -> None:
    by_name = {glyph.name: glyph for glyph in find_glyphs(["phosphor"])}
    vectors = unit_vectors(draw([by_name[name] for name in ("envelope", "envelope-light", "tree")]))
    assert vectors[0] @ vectors[1] > 0.95
    assert vectors[0] @ vectors[2] < 0.9
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
