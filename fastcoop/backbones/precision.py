"""Compute in the precision of the model, whatever settings of torch the caller has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

# Parts of ``torch.backends`` with a precision of float32 products and convolutions:
GPU_PRODUCTS = ("cuda.matmul", "cudnn.conv")
ALL_PRODUCTS = ("mkldnn.matmul", "mkldnn.conv", *GPU_PRODUCTS)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Reset autocast, the default dtype and device to torch's defaults, and compute products of float32 in float32,
    convolutions too: on a GPU torch's own default for them is TF32."""
    dtype = torch.get_default_dtype()
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    # Entered only where needed, since it slows down every call of torch.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        torch.set_default_dtype(torch.float32)
        with _float32_products("ieee", ALL_PRODUCTS), device, torch.autocast("cpu", enabled=False), cuda:
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def fresh_state() -> Iterator[None]:
    """Reset the settings of torch and NumPy to those of a new process, so that results equal those of workers:
    `torch_defaults`, gradients on, inference mode off, and NumPy's handling of floating-point errors."""
    reactions = np.errstate(divide="warn", over="warn", under="ignore", invalid="warn")
    with torch_defaults(), torch.inference_mode(False), torch.enable_grad(), reactions:
        yield


@contextmanager
def products_in_tf32(is_on: bool) -> Iterator[None]:
    """Compute products of float32 on a GPU in TF32, or in float32, and restore the settings."""
    with _float32_products("tf32" if is_on else "ieee", GPU_PRODUCTS):
        yield


@contextmanager
def _float32_products(precision: str, names: Sequence[str]) -> Iterator[None]:
    """Compute products of float32 in "ieee" or "tf32" in parts of ``torch.backends``, and restore the settings."""
    before = {backend: backend.fp32_precision for name in names if (backend := _backend(name))}
    old = None if before else (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    try:
        for backend in before:
            backend.fp32_precision = precision
        if old is not None:  # torch before 2.9
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        for backend, value in before.items():
            backend.fp32_precision = value
        if old is not None:
            torch.set_float32_matmul_precision(old[0])
            torch.backends.cudnn.allow_tf32 = old[1]


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
