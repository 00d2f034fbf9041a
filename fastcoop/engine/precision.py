"""The engine computes in the precision it was given, also where its caller is under torch's autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def own_precision(function: Function) -> Function:
    """``function`` with autocast off: under it, single products would be rounded, and buffers no longer fit."""
    for device_type in ("cpu", "cuda"):
        function = torch.autocast(device_type, enabled=False)(function)
    return function
