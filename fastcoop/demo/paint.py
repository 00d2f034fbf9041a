"""Paint grayscale drawings as small color pictures, for the demo's datasets and for pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49), "orange": (240, 135, 30), "yellow": (250, 215, 70), "green": (50, 160, 75),
    "teal": (20, 140, 145), "blue": (45, 110, 225), "navy": (25, 35, 95), "purple": (125, 60, 175),
    "pink": (245, 150, 190), "brown": (115, 75, 45), "black": (20, 20, 24), "gray": (140, 145, 150),
    "beige": (238, 222, 195), "white": (250, 250, 250),
}  # fmt: skip
PALETTE = torch.tensor(list(COLORS.values())) / 255.0
MIN_CONTRAST = 0.3  # difference in luminance between a drawing and its background
LUMINANCE = PALETTE @ torch.tensor([0.299, 0.587, 0.114])
CONTRAST = LUMINANCE[:, None] - LUMINANCE[None, :]
PAIRS = (CONTRAST.abs() > MIN_CONTRAST).nonzero()  # (n, 2): colors of drawing and background


@dataclass(frozen=True)
class Variation:
    """Ranges of the random changes: rotation in degrees either way, scale, shift as a share of a side, noise."""

    rotation: float = 15.0
    scale: tuple[float, float] = (0.7, 1.1)
    shift: float = 0.08
    noise: float = 0.06


def paint(
    drawings: torch.Tensor,
    size: int,
    generator: torch.Generator,
    variation: Variation,
    pairs: torch.Tensor = PAIRS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint each drawing in two contrasting colors, rotated, scaled and shifted, on a shaded and noisy background.

    Args:
        drawings: uint8 (n, h, w).
        size: Side of the pictures in pixels.
        generator: The only source of random numbers.
        variation: Ranges of the random changes.
        pairs: int64 (pairs, 2), indices into ``COLORS`` of drawing and background to choose from.

    Returns:
        Pictures float32 (n, 3, size, size) in 0..1, and the chosen color pairs int64 (n, 2).
    """
    n = len(drawings)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle = uniform(-variation.rotation, variation.rotation) * (math.pi / 180)
    zoom = 1 / uniform(*variation.scale)
    shift = uniform(-2 * variation.shift, 2 * variation.shift, 2)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(n, 2, 3)
    grid = F.affine_grid(rows, [n, 1, 2 * size, 2 * size], align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(drawings[:, None].float() / 255, grid, align_corners=False), 2)

    colors = pairs[torch.randint(len(pairs), (n,), generator=generator)]
    front, back = ((PALETTE[colors[:, i]] + uniform(-0.08, 0.08, 3))[:, :, None, None] for i in range(2))
    ramp = torch.linspace(-0.5, 0.5, size)
    slope = uniform(-0.15, 0.15, 2)[:, :, None, None]
    shade = slope[:, :1] * ramp[:, None] + slope[:, 1:] * ramp[None, :]
    noise = torch.randn(n, 3, size, size, generator=generator) * uniform(0, variation.noise, 1, 1, 1)
    return (back + shade + drawn * (front - back) + noise).clamp(0, 1), colors
