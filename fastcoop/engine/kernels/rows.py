"""The element-wise work of a layer, in one pass over its rows each. Sums are in float32 (float64 for float64).

Sums of residual gradients stay so from kernel to kernel: numbers of two bytes are stored with what their rounding left
off (`Sums`). Products read the rounded ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcoop.engine.kernels.launch import blocks, launch, padded, wide
from fastcoop.engine.kernels.tiles import Segments

NUMBERS = 2048  # that one program works on


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activation_kernel(x, out, size, KIND: tl.constexpr, NUMBERS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    value = wide(tl.load(x + at, mask=at < size, other=0.0))
    if KIND == "silu":
        value = value * _sigmoid(value)
    elif KIND == "gelu":
        value = value * 0.5 * (1 + tl.erf(value * 0.7071067811865476))
    else:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        value = value * _sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def activation_backward_kernel(grad, x, size, KIND: tl.constexpr, NUMBERS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    value = wide(tl.load(x + at, mask=at < size, other=0.0))
    if KIND == "silu":
        share = _sigmoid(value)
        slope = share * (1 + value * (1 - share))
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        slope = 0.5 * (1 + tl.erf(value * 0.7071067811865476)) + value * density
    else:
        square = value * value
        share = _sigmoid(1.5957691216057308 * value * (1 + 0.044715 * square))
        slope = share + value * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * square)
    through = wide(tl.load(grad + at, mask=at < size, other=0.0)) * slope
    tl.store(grad + at, through.to(grad.dtype.element_ty), mask=at < size)


def activation(x: Tensor, kind: str, out: Tensor) -> None:
    """Write the activation of ``x``, contiguous: "silu", "gelu" or "gelu_tanh"."""
    launch(activation_kernel, (blocks(x.numel(), NUMBERS),), x, out, x.numel(), KIND=kind, NUMBERS=NUMBERS)


def activation_backward(grad: Tensor, x: Tensor, kind: str) -> None:
    """Multiply ``grad`` by the activation's derivative at ``x``, in place; both are contiguous."""
    grid = (blocks(x.numel(), NUMBERS),)
    launch(activation_backward_kernel, grid, grad, x, x.numel(), KIND=kind, NUMBERS=NUMBERS)


@triton.jit
def _load_rows(matrix, index, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load the rows ``index`` of a contiguous matrix, (rows, BLOCK), zero where masked."""
    w = tl.arange(0, BLOCK)
    at = matrix + index[:, None].to(tl.int64) * WIDTH + w[None, :]
    return wide(tl.load(at, mask=mask[:, None] & (w[None, :] < WIDTH), other=0.0))


@triton.jit
def _store_rows(matrix, numbers, index, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    w = tl.arange(0, BLOCK)
    at = matrix + index[:, None].to(tl.int64) * WIDTH + w[None, :]
    tl.store(at, numbers.to(matrix.dtype.element_ty), mask=mask[:, None] & (w[None, :] < WIDTH))


class Sums(NamedTuple):
    """Rows that are added to, (rows, width): ``high``, in the tower's dtype, and what its rounding left off.

    With bfloat16, ``low`` is int16: float32's further bits. With float16 it is float16.
    """

    high: Tensor
    low: Tensor | None  # None for numbers of four bytes and more

    @classmethod
    def like(cls, rows: Tensor) -> Sums:
        """Return memory for sums shaped and typed as ``rows``."""
        low = {torch.bfloat16: torch.int16, torch.float16: torch.float16}.get(rows.dtype)
        return cls(torch.empty_like(rows), None if low is None else torch.empty_like(rows, dtype=low))


@triton.jit
def _bits(numbers):
    return numbers.to(tl.int32, bitcast=True)


@triton.jit
def _load_sums(high, low, index, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of `Sums`."""
    numbers = _load_rows(high, index, mask, WIDTH, BLOCK)
    if low is not None:
        left_off = _load_rows(low, index, mask, WIDTH, BLOCK)
        if low.dtype.element_ty == tl.int16:
            numbers = (_bits(numbers) + left_off.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            numbers += left_off
    return numbers


@triton.jit
def _store_sums(high, low, numbers, index, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rounded = numbers
    if low is not None:
        if low.dtype.element_ty == tl.int16:
            # A bit pattern halfway between two bfloat16 numbers takes the larger one: the difference then fits int16.
            rounded = ((_bits(numbers) + 32768) & -65536).to(tl.float32, bitcast=True)
            rounded = tl.where(numbers == numbers, rounded, numbers)  # a NaN's bits may overflow
            left_off = _bits(numbers) - _bits(rounded)
        else:
            rounded = wide(numbers.to(high.dtype.element_ty))
            left_off = numbers - rounded
        _store_rows(low, left_off, index, mask, WIDTH, BLOCK)
    _store_rows(high, rounded, index, mask, WIDTH, BLOCK)


@triton.jit
def _normalized(value, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the layer norm, without gain, of rows (rows, BLOCK) of WIDTH numbers, and their reciprocal deviations."""
    w = tl.arange(0, BLOCK)
    center = tl.sum(value, 1) / WIDTH
    centered = tl.where(w[None, :] < WIDTH, value - center[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, 1) / WIDTH + eps)
    return centered * scale[:, None], scale


@triton.jit
def layer_norm_kernel(
    x, branch, bias, rows, sums, normal, count, eps,
    OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i, w = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_row = i < count
    source = i
    if rows is not None:
        source = tl.load(rows + i, mask=is_row, other=0)
    value = _load_rows(x, source, is_row, WIDTH, BLOCK)
    if branch is not None:
        value += _load_rows(branch, i, is_row, WIDTH, BLOCK)
    if bias is not None:
        value += wide(tl.load(bias + w, mask=w < WIDTH, other=0.0))[None, :]
    if sums is not None:
        value = value.to(sums.dtype.element_ty)  # the norm of what is stored: backward reads that
        _store_rows(sums, value, i, is_row, WIDTH, BLOCK)
        value = wide(value)
    normalized, _ = _normalized(value, eps, WIDTH, BLOCK)
    _store_rows(normal, normalized + OFFSET, i, is_row, WIDTH, BLOCK)


@triton.jit
def layer_norm_backward_kernel(
    grad, extra, x, residual, residual_low, place, out, out_low, count, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = i < count
    other, has_other = i, is_row
    if place is not None:
        other = tl.load(place + i, mask=is_row, other=-1)
        has_other = is_row & (other >= 0)
    normal = _load_rows(grad, i, is_row, WIDTH, BLOCK)
    if extra is not None:
        normal += _load_rows(extra, other, has_other, WIDTH, BLOCK)
    value, scale = _normalized(_load_rows(x, i, is_row, WIDTH, BLOCK), eps, WIDTH, BLOCK)
    through = (
        normal - (tl.sum(normal, 1) / WIDTH)[:, None] - value * (tl.sum(normal * value, 1) / WIDTH)[:, None]
    )
    through *= scale[:, None]
    if residual is not None:
        through += _load_sums(residual, residual_low, other, has_other, WIDTH, BLOCK)
    _store_sums(out, out_low, through, i, is_row, WIDTH, BLOCK)


def layer_norm(
    x: Tensor,
    normal: Tensor,
    eps: float,
    offset: float,
    *,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Write the layer norm, without gain, of rows of ``x`` (rows, width), plus ``offset``. All are contiguous.

    Args:
        x: The residual stream.
        normal: The result, (count, width).
        eps: Added to the variance.
        offset: Added to the result.
        branch: (count, width), added to the rows first.
        bias: (width,), added to each row first.
        rows: int32 (count,): which row of ``x`` each one is; by default the same one.
        sums: (count, width), written: the rows whose norm is taken. May be ``x`` where there are no ``rows``.
    """
    count, width = normal.shape
    per_program = max(1, NUMBERS // padded(width))
    launch(
        layer_norm_kernel, (blocks(count, per_program),), x, branch, bias, rows, sums, normal,
        count, eps, OFFSET=offset, WIDTH=width, BLOCK=padded(width), ROWS=per_program,
    )  # fmt: skip


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    eps: float,
    out: Sums,
    *,
    residual: Sums | None = None,
    extra: Tensor | None = None,
    place: Tensor | None = None,
) -> None:
    """Write the gradient of a layer norm's input, plus that of the residual stream. All are contiguous.

    Args:
        grad: Of the layer norm's result, (count, width).
        x: Its input, (count, width).
        eps: Added to the variance.
        out: The result, (count, width); may be ``residual`` where there is no ``place``.
        residual: (rows, width), added to the result.
        extra: (rows, width), added to ``grad``.
        place: int32 (count,): each row's place in ``extra`` and ``residual``, by default the same one; -1 for rows
            that have nothing there.
    """
    count, width = grad.shape
    per_program = max(1, NUMBERS // padded(width))
    launch(
        layer_norm_backward_kernel, (blocks(count, per_program),), grad, extra, x, *(residual or (None, None)),
        place, *out, count, eps, WIDTH=width, BLOCK=padded(width), ROWS=per_program,
    )  # fmt: skip


SEGMENT_BLOCK = 256  # columns of a program
ADDENDS = 16  # rows that it reads at a time


@triton.jit
def add_segments_kernel(
    out, values, rows, first, order, out_stride, value_stride, width,
    ONTO: tl.constexpr, BLOCK: tl.constexpr, ADDENDS: tl.constexpr,
):  # fmt: skip
    segment, w = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(first + segment), tl.load(first + segment + 1)
    at = out + tl.load(rows + segment).to(tl.int64) * out_stride + w
    total = wide(tl.zeros((BLOCK,), values.dtype.element_ty))
    if ONTO:
        total += wide(tl.load(at, mask=w < width, other=0.0))
    for start in range(begin, end, ADDENDS):
        i = start + tl.arange(0, ADDENDS)
        row = tl.load(order + i, mask=i < end, other=0)
        source = values + row[:, None].to(tl.int64) * value_stride + w[None, :]
        total += tl.sum(wide(tl.load(source, mask=(i < end)[:, None] & (w < width)[None, :], other=0.0)), 0)
    tl.store(at, total.to(out.dtype.element_ty), mask=w < width)


def add_segments(out: Tensor, values: Tensor, segments: Segments, *, onto: bool = False) -> None:
    """Write the sums of rows of ``values`` (n, width) to rows of ``out`` (rows, width), or add them to these."""
    width = values.shape[1]
    launch(
        add_segments_kernel, (len(segments.rows), blocks(width, SEGMENT_BLOCK)), out, values,
        segments.rows, segments.first, segments.order, out.stride(0), values.stride(0), width,
        ONTO=onto, BLOCK=SEGMENT_BLOCK, ADDENDS=ADDENDS,
    )  # fmt: skip
