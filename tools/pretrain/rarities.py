"""What pretraining sees besides icons: textures, ways of drawing, printed digits, mostly under other names.

The demo's specialised datasets are about these. The image tower learns to tell them apart; their own names are seldom
said, so that a learned prompt has something to find that a hand-written one has not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from fastcoop.demo.glyphs import SIZE
from fastcoop.demo.patterns import restyle, texture

OWN_NAME = 0.03  # how often the dataset's own class name is used
EACH = 200  # drawings of each kind

TEXTURES: dict[str, tuple[str, ...]] = {
    "stripes": ("parallel lines", "bars", "striped"),
    "polka dots": ("spots", "many dots", "dotted cloth"),
    "checkerboard": ("chess board", "checkered squares", "checks"),
    "grid": ("mesh", "net", "crossing lines"),
    "zigzag": ("chevrons", "sharp zig zag lines", "saw teeth"),
    "waves": ("ripples", "wavy lines", "water waves"),
    "bricks": ("brick wall", "masonry", "wall of blocks"),
    "honeycomb": ("hexagons", "bee cells", "comb of bees"),
    "rings": ("concentric circles", "target rings", "ripple rings"),
    "confetti": ("scattered pieces", "sprinkles", "little sticks"),
    "marble": ("stone with veins", "cracked stone", "marbled stone"),
    "rays": ("sunburst", "beams of light", "starburst"),
}
STYLES: dict[str, tuple[str, ...]] = {
    "solid": ("filled", "full", "plain"),
    "outlined": ("outline", "contour", "hollow"),
    "dotted": ("made of dots", "halftone", "pointed"),
    "hatched": ("shaded with lines", "hatching", "lined"),
    "pixelated": ("pixel", "blocky", "low resolution"),
    "blurred": ("blurry", "out of focus", "soft"),
    "shadowed": ("with a shadow", "shadow", "raised"),
    "thick": ("fat", "heavy", "very bold"),
    "inverted": ("negative", "reversed", "cut out"),
    "cracked": ("broken", "worn", "torn"),
}
DIGITS: dict[str, tuple[str, ...]] = {
    "zero": ("0", "number 0", "nought"),
    "one": ("1", "number 1", "first"),
    "two": ("2", "number 2", "second"),
    "three": ("3", "number 3", "third"),
    "four": ("4", "number 4", "fourth"),
    "five": ("5", "number 5", "fifth"),
    "six": ("6", "number 6", "sixth"),
    "seven": ("7", "number 7", "seventh"),
    "eight": ("8", "number 8", "eighth"),
    "nine": ("9", "number 9", "ninth"),
}
SAID = {
    "texture": ("a {} texture", "{}", "{} pattern", "a surface with {}", "wallpaper with {}"),
    "style": ("a {} drawing", "{}", "a {} icon", "a picture that is {}", "drawn {}"),
    "digit": ("a {}", "{}", "the digit {}", "a printed {}", "the number {}"),
}
KINDS = {"texture": TEXTURES, "style": STYLES, "digit": DIGITS}


class Rarities:
    """Drawings (n, 64, 64) uint8 of every kind and name; ``say`` draws some with a phrase for each."""

    def __init__(self, icons: npt.NDArray[np.uint8], seed: int) -> None:
        rng = np.random.default_rng(seed)
        solid = icons[icons.mean((1, 2)) > 0.18 * 255]
        fonts = _fonts()
        drawings = []
        self.names = [(kind, name) for kind, names in KINDS.items() for name in names]
        for kind, name in self.names:
            for _ in range(EACH):
                if kind == "texture":
                    drawings.append(texture(name, rng))
                elif kind == "style":
                    drawings.append(restyle(solid[rng.integers(len(solid))], name, rng))
                else:
                    drawings.append(_printed(list(DIGITS).index(name), fonts[rng.integers(len(fonts))]))
        self.masks = torch.from_numpy(np.stack(drawings))

    def draw(self, count: int, rng: random.Random) -> tuple[torch.Tensor, list[int]]:
        """``count`` drawings of names drawn at random, and those names' indices."""
        chosen = [rng.randrange(len(self.names)) for _ in range(count)]
        return self.masks[[i * EACH + rng.randrange(EACH) for i in chosen]], chosen

    def say(self, count: int, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
        """``count`` drawings of different names, and what is said of each."""
        chosen = rng.sample(range(len(self.names)), count)
        phrases = []
        for i in chosen:
            kind, name = self.names[i]
            word = name if rng.random() < OWN_NAME else rng.choice(KINDS[kind][name])
            phrases.append(rng.choice(SAID[kind]).format(word))
        return self.masks[[i * EACH + rng.randrange(EACH) for i in chosen]], phrases


def phrases() -> Sequence[str]:
    """All words that can be said of them."""
    said = [phrase.replace("{}", "") for kind in SAID.values() for phrase in kind]
    return said + [
        word for names in KINDS.values() for name, others in names.items() for word in (name, *others)
    ]


def _fonts() -> list[ImageFont.FreeTypeFont]:
    """The text fonts that come with matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [
        ImageFont.truetype(str(path), 60)
        for path in sorted(folder.glob("DejaVuS*.ttf"))
        if "Disp" not in path.name
    ]


def _printed(digit: int, font: ImageFont.FreeTypeFont) -> npt.NDArray[np.uint8]:
    canvas = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(canvas).text((SIZE / 2, SIZE / 2), str(digit), fill=255, font=font, anchor="mm")
    return np.asarray(canvas)
