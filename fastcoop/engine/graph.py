"""A step recorded as a CUDA graph: one launch where there were hundreds. Elsewhere, the step itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

WARM_UP = 3  # steps done plainly first: libraries make their workspaces, buffers reach their size
WORTH_IT = 16  # recording costs about as much as a step or two

log = logging.getLogger("fastcoop")


class Replayed:
    """A step that is called ``calls`` times, replayed from a recording after WARM_UP calls where ``device`` is a GPU.

    The step must do the same device work at every call: no shape, branch or number may come from the host. It is
    given with each call and not kept, so that its owner, who keeps this, is freed as soon as nobody needs it: a
    cycle would hold a whole forest's memory until the garbage collector comes by.
    """

    def __init__(self, calls: int, device: torch.device):
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain_calls = WARM_UP if device.type == "cuda" and calls >= WORTH_IT else -1  # -1: always

    def __call__(self, step: Callable[[], None]) -> None:
        if self._plain_calls == 0 and self._graph is None:
            self._record(step)  # recording runs nothing
        if self._graph is not None:
            self._graph.replay()
            return
        self._plain_calls -= 1
        step()

    def _record(self, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # On the step's own GPU: what runs on another than the recorded stream's is done, but not recorded.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=torch.cuda.Stream(self._device)),
            ):
                step()
            self._graph = graph
        except RuntimeError as error:
            log.warning("The step could not be recorded (%s); going on without, more slowly.", error)
            self._plain_calls = -1
