"""Compute in the precision of the model, whatever settings of torch the caller has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

# torch's own defaults: products of float32 in float32, and convolutions on a CUDA device in TF32.
PRECISIONS = {"mkldnn.matmul": "ieee", "mkldnn.conv": "ieee", "cuda.matmul": "ieee", "cudnn.conv": "tf32"}


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Reset autocast, the default dtype and device, and the precision of float32 products to torch's defaults."""
    dtype = torch.get_default_dtype()
    before = {name: backend.fp32_precision for name in PRECISIONS if (backend := _backend(name))}
    matmul = None if before else torch.get_float32_matmul_precision()  # torch before 2.9
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    # Entered only where needed, since it slows down every call of torch.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        torch.set_default_dtype(torch.float32)
        for name in before:
            _backend(name).fp32_precision = PRECISIONS[name]
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        with device, torch.autocast("cpu", enabled=False), cuda:
            yield
    finally:
        torch.set_default_dtype(dtype)
        for name, precision in before.items():
            _backend(name).fp32_precision = precision
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)


@contextmanager
def fresh_state() -> Iterator[None]:
    """Reset the settings of torch and NumPy to those of a new process, so that results equal those of workers.

    These are `torch_defaults`, gradients on, inference mode off, and NumPy's handling of floating-point errors.
    """
    reactions = np.errstate(divide="warn", over="warn", under="ignore", invalid="warn")
    with torch_defaults(), torch.inference_mode(False), torch.enable_grad(), reactions:
        yield


@contextmanager
def products_in_tf32(is_on: bool) -> Iterator[None]:
    """Compute products of float32 on a GPU in TF32, or in float32, and restore the setting."""
    matmul: Any = _backend("cuda.matmul")
    setting = "fp32_precision"
    value: str | bool = "tf32" if is_on else "ieee"
    if matmul is None:  # torch before 2.9
        matmul, setting, value = torch.backends.cuda.matmul, "allow_tf32", is_on
    before = getattr(matmul, setting)
    setattr(matmul, setting, value)
    try:
        yield
    finally:
        setattr(matmul, setting, before)


def uses_tf32() -> bool:
    """Return whether products of float32 on a GPU are in TF32 now."""
    matmul = _backend("cuda.matmul")
    return bool(torch.backends.cuda.matmul.allow_tf32 if matmul is None else matmul.fp32_precision == "tf32")


def _backend(name: str) -> Any:
    """Return the part of ``torch.backends`` with a precision; None in older versions of torch."""
    backend: Any = torch.backends
    for part in name.split("."):
        backend = getattr(backend, part, None)
    return backend if hasattr(backend, "fp32_precision") else None
