"""The engine computes in the precision it was given, also where its caller is under torch's autocast."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger("fastcoop")

Function = TypeVar("Function", bound=Callable[..., object])


def own_precision(function: Function) -> Function:
    """``function`` with autocast off: under it, single products would be rounded, and buffers no longer fit."""
    for device_type in ("cpu", "cuda"):
        function = torch.autocast(device_type, enabled=False)(function)
    return function


@functools.cache
def warn_of_slow_products(dtype: torch.dtype, device_type: str) -> bool:
    """Say, once in a process, where matrix products in ``dtype`` are a plain loop. Returns whether they are.

    Half precisions have kernels only on CPUs with instructions for them; without, a step takes many times as long as
    in float32.
    """
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device_type != "cpu" or dtype not in supported:
        return False
    is_supported = getattr(torch.ops.mkldnn, supported[dtype], lambda: True)  # private to torch
    if torch.backends.mkldnn.is_available() and is_supported():
        return False
    name = str(dtype).removeprefix("torch.")
    log.warning(
        "This CPU has no instructions for %s, and torch is many times slower in it than in float32 here.",
        name,
    )
    return True
