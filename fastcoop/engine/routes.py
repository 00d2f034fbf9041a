"""The way of a tree's rows into the parts of attention and back, slice by slice.

A row's query, key and value are 3 H slices of d numbers, one of each per head. Dense products have them row by row,
attention wants them head by head. Numbered one by one, gathering a part's positions and turning its axes round is a
single ``index_select``, where it would be two passes over memory, the second of them slow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.plan import TreePlan


class Routes:
    """Numbers of slices for ``runs`` (R) runs of ``plan`` at once; ``ends``: only end tokens ask, as in the last layer.

    Parts lie one after another, each as its queries, keys and values (R, H, bundles, positions). All int64:
    ``read`` (slices,): the rows' slice at each of the parts' slices. ``write`` (R * rows * 3 * H,): the parts' slice of
    each of the rows' slices; any, where a query is not asked. ``ask`` (queries,) and ``answer`` (R * askers * H,): the
    same for what is attended. ``silent``: queries whose answer nobody reads. ``copies`` (R * copies * 2 * H,): the
    parts' slices of the plan's copied keys and values. ``masks``: each part's, of the queries asked.
    """

    def __init__(self, plan: TreePlan, heads: int, runs: int, ends: bool):
        device, R, H = plan.copied_rows.device, runs, heads
        askers = plan.leaf_place if ends else plan.place
        qkv = np.full((R, plan.padded, 3, H), -1)  # the parts' slices of each position
        attended = np.full((R, plan.padded, H), -1)
        self.masks: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self.slices = self.queries = 0
        for part in plan.parts:
            P, T = part.bundles, part.length
            positions = part.positions.start + np.arange(P * T).reshape(P, T)
            asked = np.take_along_axis(positions, part.ends, 1) if ends else positions
            for which, at in enumerate((asked, positions, positions)):
                block = np.arange(R * H * at.size).reshape(R, H, *at.shape).transpose(0, 2, 3, 1)
                qkv[:, at, which] = self.slices + block
                self.slices += block.size
                if which == 0:
                    attended[:, at] = self.queries + block
                    self.queries += block.size
            self._shapes.append((P, asked.shape[1], T))
            at_ends = torch.as_tensor(part.ends, device=device)[..., None]
            self.masks.append(part.mask.take_along_dim(at_ends, 1) if ends else part.mask)

        run = np.arange(R)[:, None]
        by_row = ((run * plan.rows + plan.gather)[..., None] * 3 * H + np.arange(3 * H)).reshape(qkv.shape)
        asker = np.zeros(plan.padded, np.int64)
        asker[askers] = np.arange(len(askers))
        by_asker = (run * len(askers) + asker)[..., None] * H + np.arange(H)

        def tensor(numbers: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(numbers.ravel()), device=device)

        self._runs, self._heads = R, H
        self.read = tensor(_inverse(qkv, by_row, self.slices))
        self.write = tensor(np.maximum(qkv[:, plan.place], 0))
        self.ask = tensor(_inverse(attended, by_asker, self.queries))
        self.answer = tensor(attended[:, askers])
        self.silent = tensor(np.setdiff1d(np.arange(self.queries), attended[:, askers]))
        self.copies = tensor(qkv[:, plan.copies, 1:])

    def qkv(self, slices: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The parts' queries, keys and values (R, H, bundles, positions, d), views of ``slices`` (slices, d)."""
        blocks = iter(self._split(slices, [n for P, E, T in self._shapes for n in ((P, E), (P, T), (P, T))]))
        return list(zip(blocks, blocks, blocks, strict=True))

    def attended(self, queries: Tensor) -> list[Tensor]:
        """What the parts' queries get (R, H, bundles, queries, d), views of ``queries`` (queries, d)."""
        return self._split(queries, [(P, E) for P, E, _ in self._shapes])

    def _split(self, slices: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
        sizes = [self._runs * self._heads * P * T for P, T in shapes]
        return [
            block.view(self._runs, self._heads, *shape, slices.shape[1])
            for block, shape in zip(slices.split(sizes), shapes, strict=True)
        ]


def _inverse(numbers: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The value at each number below ``size``, every one of which is there; -1 is none."""
    known = numbers >= 0
    inverse = np.empty(size, np.int64)
    inverse[numbers[known]] = values[known]
    return inverse
