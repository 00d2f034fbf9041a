"""Icons as small pictures: the fonts in the package ``qtawesome``, read without Qt, drawn with Pillow."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fastcoop.errors import UserError

SIZE = 64  # pixels of a drawn glyph's side
NEAR_DUPLICATE = 0.95  # cosine of blurred pixels
FRAME = 56  # pixels of a framed drawing's longer side
FAINT = 40  # grey that counts as ink

# family -> font files, each with a charmap beside it. The older editions (MDI 5, FA 5) repeat these.
FONTS: dict[str, tuple[str, ...]] = {
    "material": ("materialdesignicons6-webfont-6.9.96",),
    "phosphor": ("phosphor-1.3.0",),
    "remix": ("remixicon-2.5.0",),
    "awesome": ("fontawesome6-solid-webfont-6.7.2", "fontawesome6-regular-webfont-6.7.2"),
    "brands": ("fontawesome6-brands-webfont-6.7.2",),
    "codicon": ("codicon-0.0.36",),
    "elusive": ("elusiveicons-webfont-2.0",),
}
STYLES = {
    "outline",
    "variant",
    "fill",
    "line",
    "thin",
    "light",
    "bold",
    "sharp",
    "alt",
    "o",
    "solid",
    "regular",
}


@dataclass(frozen=True)
class Glyph:
    """One drawing: its font file's stem, its code point, and its name, such as ``"folder-lock-outline"``."""

    family: str
    font: str
    name: str
    codepoint: int

    @property
    def key(self) -> str:
        """A name unique over all families, such as ``"material/home-outline"``."""
        return f"{self.font}/{self.name}" if self.family == "awesome" else f"{self.family}/{self.name}"

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the name without those for its style; never empty."""
        words = self.name.split("-")
        kept = tuple(word for word in words if word not in STYLES and not word.isdigit())
        return kept or tuple(words)

    @property
    def style(self) -> tuple[str, ...]:
        """The words of the name that say how it is drawn, such as ``("outline",)``."""
        return tuple(word for word in self.name.split("-")[1:] if word in STYLES)


def fonts_folder() -> Path:
    """The folder of qtawesome's fonts. Raises UserError if that package is not installed."""
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "The demo draws its pictures from the fonts of the package qtawesome, which is not installed: "
            'run `pip install "fastcoop[demo]"`.'
        )
    return Path(spec.submodule_search_locations[0]) / "fonts"


def find_glyphs(families: Sequence[str] = tuple(FONTS)) -> list[Glyph]:
    """All glyphs of the families, in a fixed order; names for the same code point of one font count once."""
    folder = fonts_folder()
    glyphs = []
    for family in families:
        for font in FONTS[family]:
            stem, version = font.rsplit("-", 1)
            charmap = folder / f"{stem}-charmap-{version}.json"
            if not charmap.is_file():
                raise UserError(
                    f"The package qtawesome should hold {charmap.name}, but does not: install version 1.4.2."
                )
            seen = set()
            for name, code in sorted(
                json.loads(charmap.read_text(encoding="utf-8")).items(),
                key=lambda item: (len(item[0]), item[0]),
            ):
                codepoint = int(code, 16)
                if codepoint not in seen:
                    seen.add(codepoint)
                    glyphs.append(Glyph(family, font, name, codepoint))
    return glyphs


def draw(glyphs: Sequence[Glyph]) -> npt.NDArray[np.uint8]:
    """Draw glyphs white on black, centred: (n, 64, 64) uint8."""
    fonts = {font: _font(font) for font in {glyph.font for glyph in glyphs}}
    masks = np.zeros((len(glyphs), SIZE, SIZE), np.uint8)
    for mask, glyph in zip(masks, glyphs, strict=True):
        text = chr(glyph.codepoint)
        font = fonts[glyph.font]
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left, bottom - top
        if not width or not height:
            continue
        canvas = Image.new("L", (int(max(width, SIZE)), int(max(height, SIZE))))
        corner = ((canvas.width - width) / 2 - left, (canvas.height - height) / 2 - top)
        ImageDraw.Draw(canvas).text(corner, text, fill=255, font=font)
        mask[:] = np.asarray(
            canvas if canvas.size == (SIZE, SIZE) else canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
        )
    return masks


def _font(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(fonts_folder() / f"{font}.ttf"), 56)


def framed(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The drawings (n, 64, 64), each cut to its ink and scaled to one size: of a glyph in two sizes, one drawing."""
    return np.stack([_framed(mask) for mask in masks])


def _framed(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    rows, columns = np.nonzero(mask > FAINT)
    if not len(rows):
        return mask
    ink = Image.fromarray(mask).crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    scale = FRAME / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    frame = Image.new("L", (SIZE, SIZE))
    frame.paste(
        ink.resize((width, height), Image.Resampling.BICUBIC), ((SIZE - width) // 2, (SIZE - height) // 2)
    )
    return np.asarray(frame)


def blurred(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Unit vectors (n, 256) of the drawings shrunk to 16 x 16: what two near-duplicates share."""
    n = len(masks)
    small = masks.reshape(n, 16, SIZE // 16, 16, SIZE // 16).mean((2, 4), dtype=np.float32).reshape(n, 256)
    norms = np.linalg.norm(small, axis=1, keepdims=True)
    vectors: npt.NDArray[np.float32] = small / np.maximum(norms, 1e-6)
    return vectors
