"""Icons as small grayscale drawings, rendered with Pillow from the icon fonts in the package ``qtawesome``."""

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

SIZE = 64  # pixels of a drawing's side
FONT_SIZE = 56  # pixels
Drawing = npt.NDArray[np.uint8]  # (SIZE, SIZE), white on black

# Family -> font files, each with a charmap beside it. The older editions (MDI 5, FA 5) repeat these.
FONTS: dict[str, tuple[str, ...]] = {
    "material": ("materialdesignicons6-webfont-6.9.96",),
    "phosphor": ("phosphor-1.3.0",),
    "remix": ("remixicon-2.5.0",),
    "awesome": ("fontawesome6-solid-webfont-6.7.2", "fontawesome6-regular-webfont-6.7.2"),
    "brands": ("fontawesome6-brands-webfont-6.7.2",),
    "codicon": ("codicon-0.0.36",),
    "elusive": ("elusiveicons-webfont-2.0",),
}


@dataclass(frozen=True)
class Glyph:
    """An icon: its family, the stem of its font file, its name (``"folder-lock-outline"``) and its code point."""

    family: str
    font: str
    name: str
    codepoint: int

    @property
    def key(self) -> str:
        """A name unique over all families, such as ``"material/home-outline"``."""
        return f"{self.font if self.family == 'awesome' else self.family}/{self.name}"


def fonts_folder() -> Path:
    """Return the folder of qtawesome's fonts. Raises UserError if that package is not installed."""
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "The demo draws its pictures from the fonts of the package qtawesome, which is not installed; "
            'run `pip install "fastcoop[demo]"`.'
        )
    return Path(spec.submodule_search_locations[0]) / "fonts"


def find_glyphs(families: Sequence[str] = tuple(FONTS)) -> list[Glyph]:
    """Return all glyphs of the families in a fixed order, one per code point of a font."""
    glyphs = []
    for family, font in ((one, font) for one in families for font in FONTS[one]):
        stem, version = font.rsplit("-", 1)
        charmap = fonts_folder() / f"{stem}-charmap-{version}.json"
        if not charmap.is_file():
            raise UserError(
                f"The installed version of qtawesome has no {charmap.name}; install version 1.4.2."
            )
        names: dict[int, str] = {}
        codes = json.loads(charmap.read_text(encoding="utf-8"))
        for name in sorted(codes, key=lambda name: (len(name), name)):
            names.setdefault(int(codes[name], 16), name)
        glyphs += [Glyph(family, font, name, codepoint) for codepoint, name in names.items()]
    return glyphs


def draw(glyphs: Sequence[Glyph]) -> Drawing:
    """Draw glyphs white on black, centered: (n, 64, 64) uint8."""
    names = {glyph.font for glyph in glyphs}
    fonts = {name: ImageFont.truetype(str(fonts_folder() / f"{name}.ttf"), FONT_SIZE) for name in names}
    drawings = np.zeros((len(glyphs), SIZE, SIZE), np.uint8)
    for drawing, glyph in zip(drawings, glyphs, strict=True):
        text, font = chr(glyph.codepoint), fonts[glyph.font]
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left, bottom - top
        if not width or not height:
            continue
        canvas = Image.new("L", (int(max(width, SIZE)), int(max(height, SIZE))))
        corner = ((canvas.width - width) / 2 - left, (canvas.height - height) / 2 - top)
        ImageDraw.Draw(canvas).text(corner, text, fill=255, font=font)
        if canvas.size != (SIZE, SIZE):
            canvas = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
        drawing[:] = np.asarray(canvas)
    return drawings
