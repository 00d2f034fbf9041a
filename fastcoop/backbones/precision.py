"""Settings of torch while fastcoop computes: the precision of the model, whatever the caller has set, and threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch

# Parts of ``torch.backends`` with a precision of float32 products and convolutions:
GPU_PRODUCTS = ("cuda.matmul", "cudnn.conv")
ALL_PRODUCTS = ("mkldnn.matmul", "mkldnn.conv", *GPU_PRODUCTS)

Precision = torch.dtype | Literal["tf32"]  # of a tower's weights and activations
Function = TypeVar("Function", bound=Callable[..., object])
log = logging.getLogger("fastcoop")


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


def disable_autocast(function: Function) -> Function:
    """Run ``function`` without the caller's autocast, which would round single products."""
    for device_type in ("cpu", "cuda"):
        function = torch.autocast(device_type, enabled=False)(function)
    return function


def dtype_of(precision: Precision | None) -> torch.dtype | None:
    """Return the dtype of weights and activations in a precision: TF32 is a way to multiply float32."""
    return torch.float32 if precision == "tf32" else precision


@cache
def warn_if_dtype_is_slow(dtype: torch.dtype, device_type: str) -> bool:
    """Return whether matrix products in ``dtype`` lack fast kernels here; log a warning once per process if so."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device_type != "cpu" or dtype not in supported:
        return False
    is_supported = getattr(torch.ops.mkldnn, supported[dtype], lambda: True)  # private to torch
    if torch.backends.mkldnn.is_available() and is_supported():
        return False
    message = "This CPU has no instructions for %s, so torch is many times slower in it than in float32."
    log.warning(message, str(dtype).removeprefix("torch."))
    return True


@contextmanager
def limit_threads(number: int | None) -> Iterator[None]:
    """Use at most ``number`` threads: attention's heads, since its smallest batched product has one matrix per head."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, number or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
