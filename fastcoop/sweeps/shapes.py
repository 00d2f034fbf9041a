"""How training runs look to the engine: rows, operations and bytes by tree, and which train when in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastcoop.methods.base import Training

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone


@dataclass(frozen=True, eq=False)
class Shape:
    """What a run of one tree takes: nodes, live rows and operations of a step, and bytes beside others."""

    key: Any
    nodes: int
    rows: int
    flops: float
    bytes: int

    @property
    def per_row(self) -> float:
        return self.flops / self.rows


class Shapes:
    """The shapes of a backbone's trees, each worked out once."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.known: dict[Any, Shape] = {}
        self.room: tuple[int, int] = (0, 0)

    def of(self, training: Training) -> Shape:
        from fastcoop.engine.fit import RunShape, plan_training, tree_key

        key = tree_key(training.class_names, training.layout)
        if key not in self.known:
            plan = plan_training(self.backbone, [RunShape(*key, training.steps)])
            self.room, cost = (plan.scratch_bytes, plan.max_rows), plan.runs[0]
            tree = cost.tree
            self.known[key] = Shape(
                key, tree.nodes, tree.rows, tree.flops, tree.activation_bytes + cost.state_bytes
            )
        return self.known[key]


def course(
    runs: Sequence[tuple[Shape, int]], budget: int, room: tuple[int, int | None]
) -> Iterator[tuple[int, dict[Shape, int]]]:
    """How a batch trains: (steps, rows by shape) for each stretch in which the same runs are in training. Those that
    end leave, and waiting ones join while there is room, as in the engine."""
    scratch, most = room
    waiting = list(reversed(runs))
    active: list[list[Any]] = []  # [shape, steps left]
    while waiting or active:
        size = scratch + sum(shape.bytes for shape, _ in active)
        rows = sum(shape.rows for shape, _ in active)
        while waiting:
            shape, steps = waiting[-1]
            full = size + shape.bytes > budget or (most is not None and rows + shape.rows > most)
            if active and full:
                break
            active.append([shape, steps])
            size, rows = size + shape.bytes, rows + shape.rows
            waiting.pop()
        stretch = min(left for _, left in active)
        by_shape: dict[Shape, int] = {}
        for shape, _ in active:
            by_shape[shape] = by_shape.get(shape, 0) + shape.rows
        yield stretch, by_shape
        active = [[shape, left - stretch] for shape, left in active if left > stretch]
