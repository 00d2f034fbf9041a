"""Triton kernels: a training step on a GPU in about 230 launches, whatever the number of trees.

The matrix products stay with cuBLAS. Around them,
- `attention` attends over the whole forest (all trees, runs and heads) in one launch, planned by `tiles`;
- `rows` has the element-wise work of a layer: activation, residual and layer norm, forward and backward;
- `step` has the loss of all runs in one launch, and the optimizer in two.

Triton comes with torch's Linux wheels. Only modules of this folder import it, and only where `are_usable` returned
True. Elsewhere, on a CPU and in float64, the other modules of the engine do the same work.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def are_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a tower on ``device`` in ``dtype`` runs through the kernels."""
    return device.type == "cuda" and dtype != torch.float64 and has_triton()
