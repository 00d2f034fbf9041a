"""Timing: contenders in turn, again and again, and the matrix products they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastcoop.engine.graph import WARM_UP
from fastcoop.engine.trees import Trees

SPEND = 10.0  # seconds that a contender may take beyond its warm-up and two measurements


def measure(
    contenders: Mapping[Any, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[Any, list[float]]:
    """Seconds of each contender, called in turn after warming up; slow ones sit out the last rounds."""
    times: dict[Any, list[float]] = {key: [] for key in contenders}
    rounds = dict.fromkeys(contenders, repeats)
    for turn in range(1 - warm_ups(device), repeats + 1):
        for key, contender in contenders.items():
            if turn > rounds[key]:
                continue
            wait(device)
            start = time.perf_counter()
            contender()
            wait(device)
            seconds = time.perf_counter() - start
            if turn <= 0:  # the warm-up tells how long it takes
                rounds[key] = min(repeats, 2 + int(SPEND / seconds))
            else:
                times[key].append(seconds)
    return times


def share_of(flops: float, seconds: list[float], product_flops: float, product_seconds: list[float]) -> float:
    """Median over the rounds of a step's rate as a share of the rate of the products beside it."""
    pairs = zip(seconds, product_seconds, strict=True)
    return statistics.median((flops / step) / (product_flops / product) for step, product in pairs)


def warm_ups(device: torch.device) -> int:
    """Calls before the first one that is measured: on a GPU, until a step has been recorded."""
    return WARM_UP + 1 if device.type == "cuda" else 1


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


MATMUL_ROWS = {"cpu": 2048, "cuda": 65536}  # enough for full speed


def matmul(trees: Trees) -> Callable[[], None]:
    """The tower's four products forward and backward on MATMUL_ROWS rows, results into memory kept ready."""
    block, rows = trees.tower.blocks[0], MATMUL_ROWS[trees.tower.device.type]
    products = []
    for weight in (block.qkv, block.out, block.fc, block.proj):
        for w in (weight, weight.t()):
            x = torch.randn(rows, w.shape[0], dtype=w.dtype, device=w.device)
            products.append((x, w, torch.empty(rows, w.shape[1], dtype=w.dtype, device=w.device)))

    def multiply() -> None:
        for x, w, out in products:
            torch.mm(x, w, out=out)

    return multiply


def matmul_flops(trees: Trees) -> float:
    block, rows = trees.tower.blocks[0], MATMUL_ROWS[trees.tower.device.type]
    return 2 * 2 * rows * sum(w.numel() for w in (block.qkv, block.out, block.fc, block.proj))
