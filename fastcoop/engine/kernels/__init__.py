"""Triton kernels: a training step on a GPU in about 220 launches, for any number of trees.

The matrix products stay with cuBLAS. Around them,
- `attention` attends over the whole forest (all trees, runs and heads) in one launch, planned by `tiles`;
- `rows` has the element-wise work of a layer: activation, residual and layer norm, forward and backward;
- `step` has the loss of all runs in one launch, and the optimizer in two.

Triton comes with torch's Linux wheels. Only modules of this folder import it, and only where `are_usable` returned
True. Elsewhere, on a CPU and in float64, the other modules of the engine do the same work, but for attention on a CPU
in float32, which is in `cpu`, compiled from C.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

OLDEST = (8, 0)  # compute capability: older GPUs do not multiply bfloat16

log = logging.getLogger("fastcoop")


def are_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a tower on ``device`` in ``dtype`` runs through the kernels."""
    return device.type == "cuda" and dtype != torch.float64 and _run_on(device)


@functools.cache
def _run_on(device: torch.device) -> bool:
    """Return whether kernels run on a GPU; log why not where Triton is installed but fails."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:  # a launch also needs a C compiler and Python's headers, which Triton calls as it starts
        from fastcoop.engine.kernels.rows import activation

        numbers = torch.ones(16, device=device)
        activation(numbers, "silu", numbers)
        torch.cuda.synchronize(device)
    except Exception as error:
        log.warning(
            "Triton's kernels do not run here (%s). Training goes on without them, more slowly.", error
        )
        return False
    return True
