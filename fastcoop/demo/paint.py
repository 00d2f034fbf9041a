"""From drawings to small colour pictures: one painter for the demo's datasets and for pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 135, 30),
    "yellow": (250, 215, 70),
    "green": (50, 160, 75),
    "teal": (20, 140, 145),
    "blue": (45, 110, 225),
    "navy": (25, 35, 95),
    "purple": (125, 60, 175),
    "pink": (245, 150, 190),
    "brown": (115, 75, 45),
    "black": (20, 20, 24),
    "gray": (140, 145, 150),
    "beige": (238, 222, 195),
    "white": (250, 250, 250),
}
NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values())) / 255.0
CONTRAST = 0.3  # least difference in luminance between a drawing and its ground
LUMINANCE = PALETTE @ torch.tensor([0.299, 0.587, 0.114])
# (n, 2): colour of the drawing, colour of the ground
PAIRS = ((LUMINANCE[:, None] - LUMINANCE[None, :]).abs() > CONTRAST).nonzero()
LIGHT_ON_DARK = (LUMINANCE[:, None] - LUMINANCE[None, :] > CONTRAST).nonzero()


@dataclass(frozen=True)
class Manner:
    """How freely to paint: rotation (degrees either way), range of scale, shift (share of a side), noise."""

    rotation: float = 15.0
    scale: tuple[float, float] = (0.7, 1.1)
    shift: float = 0.08
    noise: float = 0.06

    def tamed(self, share: float) -> Manner:
        """The same with only ``share`` of its variety: 0 is upright, centred, full size and without noise."""
        low, high = (1 + share * (end - 1) for end in self.scale)
        return Manner(self.rotation * share, (low, high), self.shift * share, self.noise * share)


def paint(
    masks: torch.Tensor, size: int, generator: torch.Generator, manner: Manner, pairs: torch.Tensor = PAIRS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint drawings in two contrasting colours each, turned, scaled, shifted, on a shaded and grainy ground.

    masks: (n, h, w) uint8. Returns pictures (n, 3, size, size) float32 in 0..1, and (n, 2) indices into
    ``NAMES``, the colours of drawing and ground. Random numbers come from ``generator`` only.
    """
    n = len(masks)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle = uniform(-manner.rotation, manner.rotation) * (math.pi / 180)
    zoom = 1 / uniform(*manner.scale)
    shift = uniform(-2 * manner.shift, 2 * manner.shift, 2)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(n, 2, 3)
    grid = F.affine_grid(rows, [n, 1, 2 * size, 2 * size], align_corners=False)
    drawing = F.grid_sample(masks[:, None].float() / 255, grid, align_corners=False)
    drawing = F.avg_pool2d(drawing, 2)

    colours = pairs[torch.randint(len(pairs), (n,), generator=generator)]
    front, ground = ((PALETTE[colours[:, i]] + uniform(-0.08, 0.08, 3))[:, :, None, None] for i in range(2))
    ramp = torch.linspace(-0.5, 0.5, size)
    slope = uniform(-0.15, 0.15, 2)[:, :, None, None]
    shade = slope[:, :1] * ramp[:, None] + slope[:, 1:] * ramp[None, :]
    grain = torch.randn(n, 3, size, size, generator=generator) * uniform(0, manner.noise, 1, 1, 1)
    return (ground + shade + drawing * (front - ground) + grain).clamp(0, 1), colours
