"""The one place where kernels are launched, and what all of them share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcoop.backbones.precision import uses_tf32


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Launch ``kernel`` on the GPU of its first argument; an empty grid launches nothing."""
    if 0 not in grid:
        _run(kernel, grid, arguments, {"num_warps": num_warps, **constants})


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    # Triton launches on the current GPU, which need not be the tensors'. -1: no GPU (Triton's interpreter).
    device = arguments[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*arguments, **options)


def blocks(total: int, size: int) -> int:
    """Return how many blocks of ``size`` cover ``total``."""
    return -(-total // size)


def padded(size: int, least: int = 16) -> int:
    """Return the power of two that holds ``size``: Triton's blocks are powers of two, of at least 16 in a product."""
    return max(least, 1 << (size - 1).bit_length())


def product_precision(tensor: Tensor) -> str:
    """Return how `tl.dot` multiplies: float32 in TF32 where torch does so, else as three TF32 products."""
    if tensor.dtype != torch.float32:
        return "ieee"
    return "tf32" if uses_tf32() else "tf32x3"


@triton.jit
def wide(numbers):
    """Return ``numbers`` in float32, which every kernel computes in; float64 stays as it is."""
    if numbers.dtype == tl.float64:
        return numbers
    else:
        return numbers.to(tl.float32)
