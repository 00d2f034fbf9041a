"""Attention over a whole forest: one launch forward, two backward, for all trees, runs and heads.

A program works on one tile (see `tiles`) and one head. It reads queries, keys and values where the products wrote them
and writes where the next product reads: nothing is gathered, and no scores reach memory.

- Forward attends to the tile's own rows, then to its chain in blocks, with an online softmax.
- Backward recomputes the scores. It first finds each query's softmax sum and the sum of p dp, then the gradients:
  those of the tile's rows are written in place, those of the chain's keys to slots. The chain's first block is kept
  for both; few chains are longer.
- `rows.add_segments` adds the slots to the rows, in order, without atomics: the same bits every time.

Scores, softmax and sums are in float32 (float64 for float64 inputs), whatever the inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastcoop.engine.kernels.launch import launch, padded, product_precision
from fastcoop.engine.kernels.rows import add_segments
from fastcoop.engine.kernels.tiles import Places, TilePlan

# Rows of a tile, for numbers of two bytes and of more: what fits the registers and the shared memory of most GPUs.
TILE, WIDE_TILE = 64, 32


@triton.jit
def _load_head(matrix, index, stride, head, mask, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """Load one head's numbers of the rows ``index``: (rows, D_BLOCK), zero where masked."""
    d = tl.arange(0, D_BLOCK)
    at = matrix + index[:, None].to(tl.int64) * stride + head * D + d[None, :]
    return tl.load(at, mask=mask[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _store_head(matrix, numbers, index, stride, head, mask, D: tl.constexpr, D_BLOCK: tl.constexpr):
    d = tl.arange(0, D_BLOCK)
    at = matrix + index[:, None].to(tl.int64) * stride + head * D + d[None, :]
    tl.store(at, numbers.to(matrix.dtype.element_ty), mask=mask[:, None] & (d[None, :] < D))


@triton.jit
def _scores(q, k, reads, PRECISION: tl.constexpr):
    return tl.where(reads, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))


@triton.jit
def _read_tile(
    q, k, v, tiles, row_end, query_of_row, q_stride, kv_stride, tile, head,
    D: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read a tile: its rows, queries, keys, values and scores, and where its chain begins and ends."""
    first, rows, begin = (
        tl.load(tiles + 4 * tile),
        tl.load(tiles + 4 * tile + 1),
        tl.load(tiles + 4 * tile + 2),
    )
    row = first + tl.arange(0, TILE)
    is_row = row < first + rows
    query = tl.load(query_of_row + row, mask=is_row, other=-1)
    end = tl.load(row_end + row, mask=is_row, other=0)
    queries = _load_head(q, query, q_stride, head, query >= 0, D, D_BLOCK)
    keys = _load_head(k, row, kv_stride, head, is_row, D, D_BLOCK)
    values = _load_head(v, row, kv_stride, head, is_row, D, D_BLOCK)
    scores = _scores(queries, keys, (row[None, :] <= row[:, None]) & (row[:, None] < end[None, :]), PRECISION)
    return row, is_row, query, queries, keys, values, scores, begin, begin + tl.load(tiles + 4 * tile + 3)


@triton.jit
def _read_chain(
    k, v, constant_k, constant_v, chain, chain_start, chain_end, begin, stop, row, queries, kv_stride, constant_stride,
    head, D: tl.constexpr, D_BLOCK: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read CHAIN entries: their keys, values and scores with the queries of ``row``, and the keys' rows or -1."""
    entry = begin + tl.arange(0, CHAIN)
    is_entry = entry < stop
    key = tl.load(chain + entry, mask=is_entry, other=-1)
    first = tl.load(chain_start + entry, mask=is_entry, other=0)
    end = tl.load(chain_end + entry, mask=is_entry, other=0)
    is_constant = is_entry & (key < 0)
    # One of the two loads is masked, and adds zero.
    keys = _load_head(k, key, kv_stride, head, key >= 0, D, D_BLOCK)
    keys += _load_head(constant_k, -1 - key, constant_stride, head, is_constant, D, D_BLOCK)
    values = _load_head(v, key, kv_stride, head, key >= 0, D, D_BLOCK)
    values += _load_head(constant_v, -1 - key, constant_stride, head, is_constant, D, D_BLOCK)
    reads = (first[None, :] <= row[:, None]) & (row[:, None] < end[None, :])
    return keys, values, _scores(queries, keys, reads, PRECISION), key


@triton.jit
def forward_kernel(
    q, k, v, constant_k, constant_v, out, tiles, row_end, chain, chain_start, chain_end, query_of_row,
    q_stride, kv_stride, constant_stride, out_stride,
    D: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    row, is_row, query, queries, _tile_keys, values, scores, first, stop = _read_tile(
        q, k, v, tiles, row_end, query_of_row, q_stride, kv_stride, tile, head, D, D_BLOCK, TILE, PRECISION
    )
    largest = tl.where(is_row, tl.max(scores, 1), 0.0)  # rows that only fill up the tile read nothing
    p = tl.exp(scores - largest[:, None])
    total = tl.sum(p, 1)
    sums = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    for begin in range(first, stop, CHAIN):
        _keys, more_values, more_scores, _row = _read_chain(
            k, v, constant_k, constant_v, chain, chain_start, chain_end, begin, stop, row, queries,
            kv_stride, constant_stride, head, D, D_BLOCK, CHAIN, PRECISION,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(more_scores, 1))
        factor = tl.exp(largest - larger)
        more_p = tl.exp(more_scores - larger[:, None])
        total = total * factor + tl.sum(more_p, 1)
        sums = sums * factor[:, None]
        sums += tl.dot(more_p.to(values.dtype), more_values, input_precision=PRECISION)
        largest = larger
    total = tl.where(is_row, total, 1.0)
    _store_head(out, sums / total[:, None], query, out_stride, head, query >= 0, D, D_BLOCK)


@triton.jit
def _add_keys(largest, total, weighted, scores, grad_p):
    """Add keys to each query's largest score, the sum of its exponentials, and their sum weighted by ``grad_p``."""
    larger = tl.maximum(largest, tl.max(scores, 1))
    factor = tl.exp(largest - larger)
    p = tl.exp(scores - larger[:, None])
    return larger, total * factor + tl.sum(p, 1), weighted * factor + tl.sum(p * grad_p, 1)


@triton.jit
def _gradients(queries, grads, keys, scores, grad_p, largest, inverse, mean, PRECISION: tl.constexpr):
    """Return what these keys give to the gradient of the queries, and the gradients of the keys and their values."""
    p = tl.exp(scores - largest[:, None]) * inverse[:, None]
    grad_scores = (p * (grad_p - mean[:, None])).to(keys.dtype)
    p = p.to(keys.dtype)
    grad_queries = tl.dot(grad_scores, keys, input_precision=PRECISION)
    grad_keys = tl.dot(tl.trans(grad_scores), queries, input_precision=PRECISION)
    return grad_queries, grad_keys, tl.dot(tl.trans(p), grads, input_precision=PRECISION)


@triton.jit
def backward_kernel(
    q, k, v, constant_k, constant_v, grad, grad_q, grad_k, grad_v, slot_k, slot_v,
    tiles, row_end, chain, chain_start, chain_end, query_of_row, place_of_row,
    q_stride, kv_stride, constant_stride, grad_stride, grad_qkv_stride, slot_stride,
    D: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, CHAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    row, is_row, query, queries, keys, values, scores, first, stop = _read_tile(
        q, k, v, tiles, row_end, query_of_row, q_stride, kv_stride, tile, head, D, D_BLOCK, TILE, PRECISION
    )
    is_query = query >= 0
    grads = _load_head(grad, query, grad_stride, head, is_query, D, D_BLOCK)
    grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    chain_keys, chain_values, chain_scores, chain_row = _read_chain(
        k, v, constant_k, constant_v, chain, chain_start, chain_end, first, stop, row, queries,
        kv_stride, constant_stride, head, D, D_BLOCK, CHAIN, PRECISION,
    )  # fmt: skip
    chain_grad_p = tl.dot(grads, tl.trans(chain_values), input_precision=PRECISION)

    largest = tl.where(is_row, tl.max(scores, 1), 0.0)  # rows that only fill up the tile read nothing
    none = tl.zeros_like(largest)
    largest, total, weighted = _add_keys(largest, none, none, scores, grad_p)
    largest, total, weighted = _add_keys(largest, total, weighted, chain_scores, chain_grad_p)
    for begin in range(first + CHAIN, stop, CHAIN):
        _keys, more_values, more_scores, _row = _read_chain(
            k, v, constant_k, constant_v, chain, chain_start, chain_end, begin, stop, row, queries,
            kv_stride, constant_stride, head, D, D_BLOCK, CHAIN, PRECISION,
        )  # fmt: skip
        more_grad_p = tl.dot(grads, tl.trans(more_values), input_precision=PRECISION)
        largest, total, weighted = _add_keys(largest, total, weighted, more_scores, more_grad_p)
    # A row without a query gives nothing.
    inverse = tl.where(is_query, 1.0 / tl.where(is_query, total, 1.0), 0.0)
    mean = weighted * inverse

    grad_queries, grad_keys, grad_values = _gradients(
        queries, grads, keys, scores, grad_p, largest, inverse, mean, PRECISION
    )
    place = tl.load(place_of_row + row, mask=is_row, other=-1)
    _store_head(grad_k, grad_keys, place, grad_qkv_stride, head, place >= 0, D, D_BLOCK)
    _store_head(grad_v, grad_values, place, grad_qkv_stride, head, place >= 0, D, D_BLOCK)
    for begin in range(first, stop, CHAIN):
        if begin > first:
            chain_keys, chain_values, chain_scores, chain_row = _read_chain(
                k, v, constant_k, constant_v, chain, chain_start, chain_end, begin, stop, row, queries,
                kv_stride, constant_stride, head, D, D_BLOCK, CHAIN, PRECISION,
            )  # fmt: skip
            chain_grad_p = tl.dot(grads, tl.trans(chain_values), input_precision=PRECISION)
        more_grad_queries, chain_grad_k, chain_grad_v = _gradients(
            queries, grads, chain_keys, chain_scores, chain_grad_p, largest, inverse, mean, PRECISION
        )
        grad_queries += more_grad_queries
        entry = begin + tl.arange(0, CHAIN)
        has_slot = tl.load(place_of_row + chain_row, mask=chain_row >= 0, other=-1) >= 0
        _store_head(slot_k, chain_grad_k, entry, slot_stride, head, has_slot, D, D_BLOCK)
        _store_head(slot_v, chain_grad_v, entry, slot_stride, head, has_slot, D, D_BLOCK)
    _store_head(grad_q, grad_queries, place, grad_qkv_stride, head, is_query & (place >= 0), D, D_BLOCK)


@dataclass(frozen=True, eq=False)
class TiledAttention:
    """Attention of a forest's layers.

    Queries (queries, width) arrive scaled. Keys and values are one matrix ``kv`` (rows, 2 width), as are those of the
    constants. Matrices may have any row stride. ``query_of_row`` int32 (rows,) is each row's place in q, out and their
    gradients; -1 for a row that has no query, as most in the last layer.
    """

    plan: TilePlan
    heads: int
    tile: int

    def forward(self, q: Tensor, kv: Tensor, constants: Tensor, out: Tensor, query_of_row: Tensor) -> None:
        """Write the attended values into ``out`` (queries, width)."""
        plan = self.plan
        launch(
            forward_kernel, (len(plan.tiles), self.heads), q, *_halves(kv), *_halves(constants), out,
            plan.tiles, plan.row_end, plan.chain, plan.chain_start, plan.chain_end, query_of_row,
            q.stride(0), kv.stride(0), constants.stride(0), out.stride(0), **self._constants(q),
        )  # fmt: skip

    def backward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        grad_qkv: Tensor,
        slots: Tensor,
        query_of_row: Tensor,
        places: Places,
    ) -> None:
        """Write the gradients of q, k and v.

        Args:
            inputs: q, kv and constants, as ``forward`` had them.
            grad: Of ``forward``'s result.
            grad_qkv: (places, 3 width), written; those of q where a row has a query.
            slots: Memory, (entries, 2 width), float32 (float64 for float64 inputs).
            query_of_row: As ``forward`` had it.
            places: Of rows whose gradients are read.
        """
        (q, kv, constants), plan = inputs, self.plan
        launch(
            backward_kernel, (len(plan.tiles), self.heads), q, *_halves(kv), *_halves(constants), grad,
            *grad_qkv.chunk(3, dim=1), *_halves(slots),
            plan.tiles, plan.row_end, plan.chain, plan.chain_start, plan.chain_end, query_of_row, places.of_row,
            q.stride(0), kv.stride(0), constants.stride(0), grad.stride(0), grad_qkv.stride(0), slots.stride(0),
            **self._constants(q),
        )  # fmt: skip
        add_segments(grad_qkv[:, q.shape[1] :], slots, places.slots, onto=True)

    def _constants(self, q: Tensor) -> dict[str, Any]:
        d = q.shape[1] // self.heads
        precision = product_precision(q)
        return {
            "D": d, "D_BLOCK": padded(d), "TILE": self.tile, "CHAIN": max(16, self.tile // 2), "PRECISION": precision
        }  # fmt: skip


def _halves(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of a matrix that has them side by side."""
    first, second = pair.chunk(2, dim=1)
    return first, second
