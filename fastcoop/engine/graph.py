"""A step recorded as a CUDA graph: one launch where there were hundreds. Elsewhere, the step itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

WARM_UP = 3  # steps done plainly first: libraries make their workspaces, buffers reach their size
WORTH_IT = 16  # recording costs about as much as a step or two

log = logging.getLogger("fastcoop")


class Replayed:
    """``step``, replayed from a recording after WARM_UP calls where the device is a GPU.

    ``step`` must do the same device work at every call: no shape, branch or number may come from the host.
    """

    def __init__(self, step: Callable[[], None], calls: int, device: torch.device):
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain_calls = WARM_UP if device.type == "cuda" and calls >= WORTH_IT else -1  # -1: always

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        if self._plain_calls == 0:
            self._record()
            self()
            return
        self._plain_calls -= 1
        self._step()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
            self._graph = graph
        except RuntimeError as error:
            log.debug("The step could not be recorded (%s); going on without.", error)
            self._plain_calls = -1
