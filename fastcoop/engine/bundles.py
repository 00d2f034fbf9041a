"""Which paths stand together in attention: a matter of speed, never of the result.

A position of a path reads the nodes above it. Attended path by path, nodes that several names share (a car's make)
are carried into every one of their paths; bundled, they are carried once, and in return each position is compared
with all of its bundle, strangers too, whose scores are masked away.

Costs are in comparisons of a query with a key: about 0.4 microseconds on the CPU core that the other two were
estimated on, with 8 heads of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import NamedTuple

from fastcoop.prompts.tree import Tree

POSITION = 20  # carrying a position into attention and back
PART = 1000  # calling a part's operations
PART_POSITIONS = 4096  # a part is cut at this many positions, so that its scores stay in cache


class Bundle(NamedTuple):
    """Nodes of some paths, each once, in depth-first order: constants of the frozen tower, and live ones."""

    constants: list[int]
    live: list[int]


def bundle_paths(tree: Tree, paths: Sequence[Sequence[int]], shared: int) -> list[Bundle]:
    """Bundle neighbours among ``paths`` where that saves more carrying than it costs comparisons.

    ``paths``: per leaf in depth-first order, its nodes below the ``shared`` ones that every position reads as well.
    """
    bundles: list[Bundle] = []
    for path in paths:
        constants, live = ([node for node in path if tree.live[node] == alive] for alive in (False, True))
        if bundles:
            last = bundles[-1]
            new = sorted(set(live).difference(last.live))
            together = _cost(1, len(last.live) + len(new), shared)
            apart = _cost(1, len(last.live), shared) + _cost(1, len(live), shared)
            if together <= apart:
                last.live.extend(new)
                last.constants.extend(sorted(set(constants).difference(last.constants)))
                continue
        bundles.append(Bundle(constants, live))
    return bundles


def into_parts(bundles: Sequence[Bundle], shared: int) -> list[list[Bundle]]:
    """Group bundles of about equal size, the largest first, where padding the smaller ones costs least."""

    def size(bundle: Bundle) -> int:
        return len(bundle.live)

    sizes = [list(equal) for _, equal in groupby(sorted(bundles, key=size, reverse=True), key=size)]
    best: list[tuple[int, list[list[Bundle]]]] = [(0, [])]  # of the largest size, the two largest, ...
    for end in range(1, len(sizes) + 1):
        ways = []
        for start in range(end):
            cost, parts = best[start]
            last = list(chain(*sizes[start:end]))
            ways.append((cost + PART + _cost(len(last), size(last[0]), shared), [*parts, last]))
        best.append(min(ways, key=lambda way: way[0]))
    parts = best[-1][1]
    steps = [max(1, PART_POSITIONS // size(part[0])) for part in parts]
    return [
        part[i : i + step] for part, step in zip(parts, steps, strict=True) for i in range(0, len(part), step)
    ]


def _cost(bundles: int, length: int, shared: int) -> int:
    return bundles * length * (POSITION + shared + length)
