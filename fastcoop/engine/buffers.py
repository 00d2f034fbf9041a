"""Memory made once and used in every step, so that a step's large tensors are not allocated (and page-faulted) anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Buffers:
    """Tensors of one dtype on one device by name: the same name again is the same memory, grown where it must."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._memory: dict[object, Tensor] = {}
        self._used: dict[object, int] = {}
        # A step asks for the same few views thousands of times, and making one takes longer than finding it.
        self._known: dict[tuple[object, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: object, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        known = self._known.get((name, shape))
        if known is not None:
            return known
        size = math.prod(shape)
        have = self._memory.get(name)
        if have is None or have.numel() < size:
            have = self._memory[name] = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
            self._known = {key: view for key, view in self._known.items() if key[0] != name}
        self._used[name] = max(size * have.element_size(), self._used.get(name, 0))
        return self._known.setdefault((name, shape), have[:size].view(shape))

    @property
    def storages(self) -> set[int]:
        return {memory.untyped_storage().data_ptr() for memory in self._memory.values()}

    def begin(self) -> None:
        """A new forest comes: what it uses is counted from now on."""
        self._used.clear()
        self._known.clear()

    def trim(self) -> None:
        """Free what was not used since ``begin``: an earlier forest's."""
        self._memory = {name: memory for name, memory in self._memory.items() if name in self._used}

    @property
    def nbytes(self) -> int:
        """Bytes used since ``begin``."""
        return sum(self._used.values())
