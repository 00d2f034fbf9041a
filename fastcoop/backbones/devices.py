"""The device that a name stands for."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fastcoop")


def resolve_device(device: str | torch.device) -> str:
    """Return the device that ``device`` names. "auto" is "cuda" where a GPU answers, and "cpu" elsewhere.

    Raises:
        UserError: This machine does not have the device.
    """
    if str(device) == "cpu" or (device == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    if device == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        try:
            torch.ones(1, device="cuda").cpu()
        except RuntimeError as error:
            log.warning("The GPU does not answer, so the CPU is used: %s", str(error).partition("\n")[0])
            return "cpu"
        return "cuda"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f'The device "{device}" cannot be used on this machine; use {usable}.') from None
    return str(device)


def _may_have_gpu() -> bool:
    """Return False where the system has no driver of a GPU, so that torch is not imported, which takes seconds."""
    if "torch" in sys.modules or sys.platform != "linux":
        return True
    if any(Path(amd).exists() for amd in ("/dev/kfd", "/dev/dxg")):  # the latter in Windows' Linux
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
