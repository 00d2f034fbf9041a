"""Compute in the precision of the model, whatever the caller has told torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

# torch's own defaults: products of float32 in float32, and convolutions on a CUDA device in TF32.
PRECISIONS = {"mkldnn.matmul": "ieee", "mkldnn.conv": "ieee", "cuda.matmul": "ieee", "cudnn.conv": "tf32"}


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Undo, until the block ends, what a caller may have set: autocast, the default dtype and device, and lower
    precisions for products of float32."""
    dtype = torch.get_default_dtype()
    before = {name: backend.fp32_precision for name in PRECISIONS if (backend := _backend(name))}
    matmul = None if before else torch.get_float32_matmul_precision()  # torch before 2.9
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    try:
        torch.set_default_dtype(torch.float32)
        for name in before:
            _backend(name).fp32_precision = PRECISIONS[name]
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), cuda:
            yield
    finally:
        torch.set_default_dtype(dtype)
        for name, precision in before.items():
            _backend(name).fp32_precision = precision
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)


def _backend(name: str) -> Any:
    """The part of ``torch.backends`` that states a precision; None where torch is too old to have it."""
    backend: Any = torch.backends
    for part in name.split("."):
        backend = getattr(backend, part, None)
    return backend if hasattr(backend, "fp32_precision") else None
