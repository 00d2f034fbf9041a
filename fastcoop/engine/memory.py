"""How many runs fit together: estimated before the first step, checked after it, halved when memory runs out."""

from __future__ import annotations

import logging

import psutil
import torch

from fastcoop.engine.buffers import Buffers
from fastcoop.engine.plan import TreePlan
from fastcoop.engine.rows import CPU_CHUNK, row_rule
from fastcoop.engine.weights import FoldedTower

STRAY = 0.25  # a batch that holds this share more than was estimated is spoken of
FREE_SHARE = 0.6  # of the free memory, when no budget is given
CPU_ROWS = 4096  # on a CPU the dense products are at full speed by then; more rows only take memory
GPU_ROWS = 131072  # chosen, not measured: twice the nodes that should fill a large GPU

log = logging.getLogger("fastcoop")


def run_bytes(tower: FoldedTower, plan: TreePlan) -> int:
    """Bytes one run of this tree adds to a batch: what the layers keep for backward, and the rows' scratch memory.

    On a GPU all rows are one chunk, so a chunk's scratch memory grows with them.
    """
    width, heads, rows, padded = tower.width, tower.heads, plan.rows, plan.padded
    shared, scores = len(plan.shared_constants), 0
    for part in plan.parts:
        scores += part.bundles * part.length * (shared + part.before + part.length)
        shared += part.length if part is plan.trunk else 0
    kept = rows * (2 * width + tower.hidden + 4) + padded * 3 * width + heads * scores
    scratch = rows * 8 * width + heads * 3 * scores + len(plan.class_leaf) * 4 * tower.dim
    if tower.device.type != "cpu":
        scratch += rows * _chunk_numbers(tower)
    return (len(tower.blocks) * kept + scratch) * torch.finfo(tower.dtype).bits // 8


def chunk_bytes(tower: FoldedTower) -> int:
    """Bytes whatever the number of runs: the scratch memory of a CPU's chunk, and spare rows."""
    rule = row_rule(tower)
    spare = (rule.least + rule.step) * len(tower.blocks) * (2 * tower.width + tower.hidden + 4)
    return (CPU_CHUNK * _chunk_numbers(tower) + spare) * torch.finfo(tower.dtype).bits // 8


def _chunk_numbers(tower: FoldedTower) -> int:
    """Numbers of scratch memory per row of a chunk."""
    return 2 * tower.hidden + 16 * tower.width


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes; on a GPU with what torch keeps of it for its own next tensors."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)


class RoomFor:
    """The room a batch of runs has, filled run by run."""

    def __init__(self, tower: FoldedTower, budget: int | None = None):
        self.tower = tower
        self.budget = int(FREE_SHARE * free_bytes(tower.device)) if budget is None else budget
        self.rows_limit = CPU_ROWS if tower.device.type == "cpu" else GPU_ROWS
        self.buffers = Buffers(tower.dtype, tower.device)
        self.clear()

    def clear(self) -> None:
        """Start an empty batch."""
        self.bytes, self.rows, self.runs = chunk_bytes(self.tower), 0, 0

    def take(self, plan: TreePlan) -> bool:
        """Add a run if it fits; the first always does, for nothing smaller can be tried."""
        size = self.bytes + run_bytes(self.tower, plan)
        rows = self.rows + plan.rows
        full = size > self.budget or rows > self.rows_limit
        if self.runs and full:
            return False
        self.bytes, self.rows, self.runs = size, rows, self.runs + 1
        return True

    def check(self, used: int) -> None:
        """Compare what the batch was estimated to hold with what it holds after its first step, in bytes."""
        log.debug(
            "%d runs together hold %.2f GB; %.2f GB were estimated.", self.runs, used / 1e9, self.bytes / 1e9
        )
        if used > (1 + STRAY) * self.bytes:
            log.warning(
                "%d runs together hold %.2f GB, %.0f%% more than estimated; a smaller memory budget is safer.",
                self.runs,
                used / 1e9,
                100 * (used / self.bytes - 1),
            )

    def halve(self) -> bool:
        """After running out of memory: allow half of what was tried. False where that was a single run."""
        if self.runs < 2:
            return False
        self.budget = self.bytes // 2
        self.buffers = Buffers(self.tower.dtype, self.tower.device)
        if self.tower.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the CPU's allocator."""
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(s in str(error) for s in said)
