"""Attention over trees on a CPU, in float32, by the C code of `cpu.c`.

The machine's C compiler compiles it at its first use, for its own processor, into the user's cache folder (Triton does
the same on a GPU). Without a compiler, `attention.PathAttention` does the work, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcoop.engine.attention import PathAttention, constant_rows
from fastcoop.engine.forest import Forest, Group, Workspace
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.files import atomic_write

LANES = 16  # this and the next two as in cpu.c
MOST_VECTORS = 8
MOST_KEYS = 1024
FLAGS = "-O3 -shared -fPIC"
# Tried in turn: Apple's compiler has no OpenMP. With it, torch's own threads are used, since its library is loaded.
MORE_FLAGS = ("-march=native -fopenmp", "-march=native", "")

log = logging.getLogger("fastcoop")


@cache
def load_kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they cannot be compiled, and a line in the log."""
    source = Path(__file__).with_name("cpu.c")
    command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS.split(), str(source)]
    known = "\n".join([*command, platform.platform(), _processor(), source.read_text("utf-8")])
    name = f"cpu-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcoop"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                with atomic_write(folder / name) as path:
                    _compile(command, path)
            return ctypes.CDLL(str(folder / name))
        except OSError:  # the folder cannot be written
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
                _compile(command, Path(temporary) / name)
                return ctypes.CDLL(str(Path(temporary) / name))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("Training on the CPU is slower without its kernels, which need a C compiler (%s).", error)
        return None


def _compile(command: list[str], path: Path) -> None:
    for flags in MORE_FLAGS:
        done = subprocess.run([*command, *flags.split(), "-o", str(path)], capture_output=True, timeout=60)
        if done.returncode == 0:
            return
    done.check_returncode()


def _processor() -> str:
    """Return what distinguishes this processor's instructions from those of another that has the same home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class _Tree(ctypes.Structure):
    """`Tree` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "queries", "outputs")),
        *((name, ctypes.c_void_p) for name in ("row", "output", "first", "key")),
    )


class Reads:
    """Which rows and constants each query of a tree reads; in the last layer, of leaves alone.

    Attributes:
        tree: For cpu.c.
        entries: Keys of all queries of a run.
    """

    def __init__(self, layout: TreeLayout, leaves_only: bool):
        tree = layout.tree
        number = np.where(tree.live, np.cumsum(tree.live) - 1, -np.cumsum(~tree.live))
        # Nodes are in depth-first order: a node's ancestor at some depth is the last node of that depth before it.
        depths = np.arange(tree.depth.max() + 1)
        of_depths = np.where(tree.depth[:, None] == depths, np.arange(tree.nodes)[:, None], 0)
        ancestors = np.maximum.accumulate(of_depths)
        queries = np.unique(tree.leaf) if leaves_only else np.flatnonzero(tree.live)
        is_key = depths <= tree.depth[queries, None]
        first = np.concatenate([[0], np.cumsum(is_key.sum(1))])
        keys = number[ancestors[queries][is_key]]
        parts = number[queries], np.arange(len(queries)), first, keys
        # Kept here, since the structure has their addresses alone.
        self._arrays = [part.astype(np.int32) for part in parts]
        addresses = (array.ctypes.data for array in self._arrays)
        self.tree = _Tree(layout.rows, len(queries), len(queries), *addresses)
        self.entries = len(keys)


def attention_of(forest: Forest) -> PathAttention | TreeAttention:
    """Return the attention of a forest: by the kernels where they are usable."""
    return TreeAttention(forest) if TreeAttention.is_usable(forest) else PathAttention(forest)


class TreeAttention:
    """Attention of all layers of one forest: what `PathAttention` computes, on rows where they are."""

    def __init__(self, forest: Forest):
        self.forest, self.width, self.heads = forest, forest.tower.width, forest.tower.heads
        self.last = len(forest.tower.blocks) - 1
        layouts = {g.tree_layout: None for g in forest.groups}
        self._reads = {(layout, last): Reads(layout, last) for layout in layouts for last in (False, True)}
        self._constants = {layout: constant_rows(layout) for layout in layouts}
        self._kernels: Any = load_kernels()

    def __reduce__(self) -> tuple[Any, ...]:  # addresses cannot be copied
        return attention_of, (self.forest,)

    @staticmethod
    def is_usable(forest: Forest) -> bool:
        """Return whether the kernels are there, and take a forest's numbers."""
        tower = forest.tower
        d, longest = tower.width // tower.heads, max(g.tree_layout.tree.depth.max() for g in forest.groups)
        fits = d % LANES == 0 and d <= MOST_VECTORS * LANES and longest < MOST_KEYS
        is_own = tower.device.type == "cpu" and tower.dtype == torch.float32
        return bool(fits and is_own and load_kernels() is not None)

    def qkv(self, layer: int, workspace: Workspace) -> Tensor:
        """Return the memory (rows, 3 width) into which the tower writes a layer's queries, keys and values."""
        return workspace.layers[layer].qkv(self.forest.rows, 3 * self.width)

    def forward(self, layer: int, workspace: Workspace) -> Tensor:
        """Return the outputs (rows, width) for what is in ``qkv``; in the last layer (leaves, width)."""
        forest, is_last = self.forest, layer == self.last
        result = workspace.attended(forest.leaves if is_last else forest.rows, self.width)
        for group in forest.groups:
            places = group.leaves if is_last else group.rows
            self._kernels.attend(*self._arguments(layer, group, workspace), _address(result[places]))
        result[forest.used_leaves if is_last else forest.used_rows :].zero_()
        return result

    def backward(self, layer: int, grad: Tensor, workspace: Workspace) -> Tensor:
        """Return the gradient of ``qkv`` (rows, 3 width) from that of the outputs."""
        forest, is_last = self.forest, layer == self.last
        result = workspace.grad_qkv(forest.rows, 3 * self.width)
        for group in forest.groups:
            of_output = grad[group.leaves if is_last else group.rows]
            arguments = self._arguments(layer, group, workspace)
            self._kernels.attend_backward(*arguments, _address(of_output), _address(result[group.rows]))
        result[forest.used_rows :].zero_()
        return result

    def _arguments(self, layer: int, group: Group, workspace: Workspace) -> tuple[object, ...]:
        """Return the arguments that both kernels have: what they read, and the memory of the probabilities."""
        layout, memory = group.tree_layout, workspace.layers[layer]
        reads = self._reads[layout, layer == self.last]
        probabilities = memory.probabilities[group if workspace.keep else None]
        return (
            torch.get_num_threads(), ctypes.byref(reads.tree), ctypes.c_long(group.runs), self.heads,
            self.width // self.heads, _address(self.qkv(layer, workspace)[group.rows]),
            _address(self._constants[layout][layer]), _address(probabilities(group.runs * self.heads * reads.entries)),
        )  # fmt: skip


def _address(tensor: Tensor) -> ctypes.c_void_p:
    """Return where the numbers of a contiguous tensor are."""
    return ctypes.c_void_p(tensor.data_ptr())
