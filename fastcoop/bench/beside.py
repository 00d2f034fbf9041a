"""A step and the matrix products it is held against, layer by layer in turn."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from fastcoop.bench.timing import wait
from fastcoop.engine.batch import Batch
from fastcoop.engine.buffers import Buffers
from fastcoop.engine.forest import Forest
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.weights import FoldedBlock


class BesideProducts:
    """Steps of a batch with ``count`` calls of ``multiply`` between its layers.

    A shared machine's speed changes within a second, by a tenth and more: so near to each other, both are hit
    alike. A GPU's step is recorded, in one piece: there the products go before it. ``steps`` and ``products`` are
    the seconds of either, one per call.
    """

    def __init__(self, batch: Batch, multiply: Callable[[], None], count: int):
        self.batch, self.multiply, self.count = batch, multiply, count
        self.device = batch.forest.tower.device
        self.within = self.device.type == "cpu"
        if self.within:
            batch.forest_pass = _InTurn(batch.forest, batch.forest_pass.buffer, self._multiply)
        self.steps: list[float] = []
        self.products: list[float] = []

    def __call__(self) -> None:
        self.done, self.multiplied = 0, 0.0
        if not self.within:
            self._multiply(1.0)
        before = self.multiplied
        start = time.perf_counter()
        self.batch.step()
        wait(self.device)
        self.steps.append(time.perf_counter() - start - (self.multiplied - before))
        self.products.append(self.multiplied)

    def _multiply(self, part: float) -> None:
        """Multiply until as great a part of the products is done as of the step."""
        start = time.perf_counter()
        while self.done < round(part * self.count):
            self.multiply()
            self.done += 1
        wait(self.device)
        self.multiplied += time.perf_counter() - start


class _InTurn(ForestPass):
    """A forest pass that says after every layer which part of it is done."""

    def __init__(self, forest: Forest, buffers: Buffers, report: Callable[[float], None]):
        super().__init__(forest, buffers)
        self.report, self.layers = report, len(forest.tower.blocks)

    def _block(self, layer: int, block: FoldedBlock, x: Tensor) -> Tensor:
        result = super()._block(layer, block, x)
        self.report((layer + 1) / (2 * self.layers))
        return result

    def _block_backward(self, layer: int, block: FoldedBlock, grad: Tensor) -> Tensor:
        result = super()._block_backward(layer, block, grad)
        self.report(1 - layer / (2 * self.layers))
        return result
