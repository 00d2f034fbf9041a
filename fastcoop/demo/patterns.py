"""Drawings made by code: textures, and styles in which an icon is redrawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, grey_dilation

from fastcoop.demo.glyphs import SIZE, Drawing

Mask = npt.NDArray[np.float64]  # (64, 64), 0 to 1


def texture(name: str, rng: np.random.Generator) -> Drawing:
    """Draw a random member of a texture class: (64, 64) uint8."""
    return _to_uint8(TEXTURES[name](rng))


def restyle(drawing: Drawing, style: str, rng: np.random.Generator) -> Drawing:
    """Redraw an icon (64, 64) uint8 in a style."""
    return _to_uint8(STYLES[style](drawing / 255.0, rng))


def _to_uint8(mask: Mask) -> Drawing:
    drawing: Drawing = np.round(255 * np.clip(mask, 0, 1)).astype(np.uint8)
    return drawing


def _plane(rng: np.random.Generator, turn: float = 180.0) -> tuple[Mask, Mask]:
    """Return coordinates in pixels, rotated by up to ``turn`` degrees either way and shifted at random."""
    angle = np.deg2rad(rng.uniform(-turn, turn))
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2.0
    u = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, SIZE)
    v = -x * np.sin(angle) + y * np.cos(angle) + rng.uniform(0, SIZE)
    return u, v


def _soft(distance: Mask) -> Mask:
    """Return 1 where positive, 0 where negative, with a smooth edge one pixel wide."""
    return np.clip(distance + 0.5, 0, 1)


def _wave(u: Mask, period: float, share: float) -> Mask:
    """Return bars along u: 1 for ``share`` of each period."""
    return _soft(share * period / 2 - np.abs((u % period) - period / 2))


def _dots(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng)
    period = rng.uniform(9, 20)
    v = v + (u // period % 2) * period * rng.choice([0.0, 0.5])
    return _soft(period * rng.uniform(0.22, 0.4) - np.hypot(u % period - period / 2, v % period - period / 2))


def _checkerboard(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng, 30)
    period = rng.uniform(5, 13)
    return ((u // period + v // period) % 2).astype(np.float64)


def _grid(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng, 30)
    period, share = rng.uniform(8, 18), rng.uniform(0.12, 0.3)
    return np.maximum(_wave(u, period, share), _wave(v, period, share))


def _zigzag(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng)
    period, height = rng.uniform(10, 24), rng.uniform(4, 9)
    return _wave(v + height * 2 * np.abs(u / period % 1 - 0.5) * 2, rng.uniform(8, 15), rng.uniform(0.3, 0.6))


def _waves(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng)
    curve = rng.uniform(3, 6) * np.sin(2 * np.pi * u / rng.uniform(16, 32))
    return _wave(v + curve, rng.uniform(8, 15), rng.uniform(0.3, 0.6))


def _bricks(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng, 20)
    height, gap = rng.uniform(7, 13), rng.uniform(1.2, 2.6)
    width = height * rng.uniform(1.6, 2.4)
    u = u + (v // height % 2) * width / 2
    return np.minimum(_soft(v % height - gap), _soft(u % width - gap))


def _honeycomb(rng: np.random.Generator) -> Mask:
    u, v = _plane(rng, 30)
    size = rng.uniform(9, 18)
    centers = []
    for shift in (0.0, 0.5):
        x = (u / size + shift) % 1 - 0.5
        y = ((v / (size * 3**0.5) + shift) % 1 - 0.5) * 3**0.5
        centers.append(np.maximum(np.abs(x), np.abs(x) / 2 + np.abs(y) * 3**0.5 / 2))
    inside = np.minimum(*centers)
    return _soft((inside - (0.5 - rng.uniform(0.05, 0.12))) * size)


def _rings(rng: np.random.Generator) -> Mask:
    y, x = np.mgrid[:SIZE, :SIZE] - rng.uniform(16, 48, 2)[:, None, None]
    return _wave(np.hypot(x, y) + rng.uniform(0, 20), rng.uniform(7, 15), rng.uniform(0.3, 0.6))


def _rays(rng: np.random.Generator) -> Mask:
    y, x = np.mgrid[:SIZE, :SIZE] - rng.uniform(16, 48, 2)[:, None, None]
    spokes = rng.integers(6, 16)
    wave = np.sin(np.arctan2(y, x) * spokes + rng.uniform(0, 6)) - rng.uniform(-0.4, 0.4)
    return _soft(wave * np.hypot(x, y) / spokes)


def _confetti(rng: np.random.Generator) -> Mask:
    y, x = np.mgrid[:SIZE, :SIZE]
    mask = np.zeros((SIZE, SIZE))
    long, short = rng.uniform(3, 6), rng.uniform(1.2, 2.4)
    for cx, cy, angle in zip(
        *rng.uniform(0, SIZE, (2, rng.integers(25, 50))), rng.uniform(0, np.pi, 50), strict=False
    ):
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        mask = np.maximum(mask, np.minimum(_soft(long - np.abs(u)), _soft(short - np.abs(v))))
    return mask


def _smooth(rng: np.random.Generator, sigma: float) -> Mask:
    """Return smooth noise of unit variance."""
    noise = gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return np.asarray(noise / noise.std())


def _marble(rng: np.random.Generator) -> Mask:
    veins = np.abs(_smooth(rng, rng.uniform(3.5, 6)) + 0.25 * _smooth(rng, 1.5))
    return np.clip(1.1 - veins * rng.uniform(1.5, 3), 0, 1)


def _dotted(mask: Mask, rng: np.random.Generator) -> Mask:
    u, v = _plane(rng)
    period = rng.uniform(4.0, 5.5)
    dots = _soft(period * 0.38 - np.hypot(u % period - period / 2, v % period - period / 2))
    return mask * dots


def _pixelated(mask: Mask, rng: np.random.Generator) -> Mask:
    step = int(rng.choice([4, 8])) if rng.random() < 0.3 else 4
    coarse = mask.reshape(SIZE // step, step, SIZE // step, step).mean((1, 3)) > 0.4
    return np.kron(coarse, np.ones((step, step)))


def _shadowed(mask: Mask, rng: np.random.Generator) -> Mask:
    shift = int(rng.integers(4, 8))
    shadow = np.roll(mask, (shift, shift), (0, 1))
    shadow[:shift], shadow[:, :shift] = 0, 0
    return np.maximum(mask, 0.45 * shadow)


def _dilated(mask: Mask, width: int) -> Mask:
    return np.asarray(grey_dilation(mask, (width, width)))


TEXTURES: dict[str, Callable[[np.random.Generator], Mask]] = {
    "stripes": lambda rng: _wave(_plane(rng)[0], rng.uniform(7, 18), rng.uniform(0.3, 0.7)),
    "polka dots": _dots, "checkerboard": _checkerboard, "grid": _grid, "zigzag": _zigzag, "waves": _waves,
    "bricks": _bricks, "honeycomb": _honeycomb, "rings": _rings, "confetti": _confetti, "marble": _marble,
    "rays": _rays,
}  # fmt: skip
STYLES: dict[str, Callable[[Mask, np.random.Generator], Mask]] = {
    "solid": lambda mask, rng: mask,
    "outlined": lambda mask, rng: _dilated(mask, int(rng.integers(3, 5))) - mask,
    "dotted": _dotted,
    "hatched": lambda mask, rng: mask * _wave(_plane(rng)[0], rng.uniform(3.8, 5.5), 0.5),
    "pixelated": _pixelated,
    "blurred": lambda mask, rng: np.asarray(gaussian_filter(mask, rng.uniform(2.2, 3.5))),
    "shadowed": _shadowed,
    "thick": lambda mask, rng: _dilated(mask, int(rng.integers(4, 7))),
    "inverted": lambda mask, rng: 1 - mask,
    "cracked": lambda mask, rng: mask * (np.abs(_smooth(rng, rng.uniform(2.5, 4))) > rng.uniform(0.3, 0.45)),
}
