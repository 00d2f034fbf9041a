"""The tiles of a forest: which rows one program of the attention kernels works on, and which keys they read.

A run's rows are its live nodes in depth-first order, and a row reads itself and its ancestors. Node k is an ancestor
of q if and only if k's interval of rows contains q. Cut the rows into tiles. If an ancestor of any row of a tile lies
before the tile, its interval reaches into the tile, so it contains the tile's *first* row, too. Therefore

    the keys of a tile are its own rows and one chain: the ancestors of its first row.

Constant nodes have no row. They are in the chain of every tile that has a row below them.

Example: the classes "cat" and "dog" behind one vector, in tiles of two rows. The start token is constant 0::

    start -- v -+- cat -- end        row       0   1    2    3    4
    (const.)    +- dog -- end        node      v   cat  end  dog  end
                                     row_end   5   3    3    5    5

    tile   rows   chain: key, and the rows that read it
    0      0, 1   start 0-4
    1      2, 3   start 0-4,  v 0-4,  cat 1-2         (the chain of row 2; row 3 is outside of cat's interval)
    2      4      start 0-4,  v 0-4,  dog 3-4

The gradients that a tile has for the keys of its chain go to a slot for each entry of the chain. Here row 0 (v) has
two slots, rows 1 and 3 one each; adding them up in the order of the tiles gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcoop.prompts.tree import Tree


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows that are sums of other rows: row ``rows[i]`` is the sum of those in ``order[first[i] : first[i + 1]]``.

    All int32.
    """

    rows: Tensor  # (sums,)
    first: Tensor  # (sums + 1,)
    order: Tensor  # (addends,)

    @classmethod
    def of(cls, targets: np.ndarray, device: torch.device | str) -> Segments:
        """Return the segments that add each row i to row ``targets[i]``, in order of i; a negative target is none."""
        order = np.argsort(targets, kind="stable")
        order = order[np.searchsorted(targets[order], 0) :]
        rows, counts = np.unique(targets[order], return_counts=True)
        return cls(*_int32(device, rows, np.concatenate([[0], np.cumsum(counts)]), order))


@dataclass(frozen=True, eq=False)
class Places:
    """Where the gradients of some rows are written."""

    of_row: Tensor  # int32 (rows,), -1 for rows whose gradients nothing reads
    slots: Segments  # from entries of the chains to these places: the sums of the keys' and values' gradients


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles of a forest. All tensors are int32."""

    every: Places  # of all rows, in order
    learned: Places  # of rows with a context vector alone, in order
    tiles: Tensor  # (tiles, 4): first row, number of rows, first entry of the chain, number of entries
    row_end: Tensor  # (rows,) the row behind the last one that reads this row
    chain: Tensor  # (entries,) the row of each chain's keys; constant c is -1 - c
    chain_start: Tensor  # (entries,) the first row that reads the key
    chain_end: Tensor  # (entries,) the row behind the last one


def plan_tiles(trees: Sequence[tuple[Tree, int]], device: torch.device | str, tile: int) -> TilePlan:
    """Cut the rows of a forest into tiles.

    Args:
        trees: Each tree of the forest and its number of runs; rows are in this order, run by run. The constants of
            all trees are numbered in this order, too: by node, once for all runs of a tree.
        device: Of the result.
        tile: Rows of a tile.
    """
    tiles, row_end, keys, starts, ends, learned = [], [], [], [], [], []
    row = entry = constant = 0  # the next run's first ones
    for tree, runs in trees:
        own_tiles, own_end, key, start, end = _tree_tiles(tree, tile)
        for _ in range(runs):
            tiles.append(own_tiles + np.array([row, 0, entry, 0]))
            row_end.append(own_end + row)
            keys.append(key + np.where(key >= 0, row, -constant))
            starts.append(start + row)
            ends.append(end + row)
            learned.append(tree.learned[tree.live])
            row, entry = row + len(own_end), entry + len(key)
        constant += int((~tree.live).sum())
    arrays = [np.concatenate(parts) for parts in (tiles, row_end, keys, starts, ends)]
    is_learned = np.concatenate(learned)
    every = _places(np.arange(row), arrays[2], device)
    places_learned = _places(np.where(is_learned, np.cumsum(is_learned) - 1, -1), arrays[2], device)
    return TilePlan(every, places_learned, *_int32(device, *arrays))


def _places(of_row: np.ndarray, chain: np.ndarray, device: torch.device | str) -> Places:
    slots = Segments.of(np.where(chain >= 0, of_row[np.maximum(chain, 0)], -1), device)
    return Places(_int32(device, of_row)[0], slots)


def _tree_tiles(tree: Tree, tile: int) -> tuple[np.ndarray, ...]:
    """Return ``tiles``, ``row_end``, ``chain``, ``chain_start`` and ``chain_end`` of one run of ``tree``."""
    live, constants = np.flatnonzero(tree.live), np.flatnonzero(~tree.live)
    rows_before = np.concatenate([[0], np.cumsum(tree.live)])  # number of rows before each node
    constants_before = np.arange(tree.nodes) - rows_before[:-1]
    key = np.where(tree.live, rows_before[:-1], -1 - constants_before)
    end = rows_before[tree.subtree_end]
    tiles: list[tuple[int, ...]] = []
    chain: list[int] = []  # nodes
    for first in range(0, len(live), tile):
        nodes = live[first : first + tile]
        # Constants between the rows, such as the names of the tile's other classes where names come first.
        between = constants[(constants > nodes[0]) & (constants < nodes[-1])]
        above = [*tree.path(int(nodes[0]))[:-1], *between]
        tiles.append((first, len(nodes), len(chain), len(above)))
        chain.extend(above)
    return np.array(tiles), end[live], key[chain], rows_before[chain], end[chain]


def _int32(device: torch.device | str, *arrays: np.ndarray) -> list[Tensor]:
    return [torch.as_tensor(np.ascontiguousarray(a, np.int32), device=device) for a in arrays]
