"""What a batch is estimated to take is what it takes."""

from __future__ import annotations

import pytest

from fastcoop.engine.forest import plant
from fastcoop.engine.memory import RoomFor, run_bytes
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees
from fastcoop.prompts import PromptLayout

NAMES = tuple(
    f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("cat", "dog house", "owl")
)


@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_the_estimate_covers_what_the_buffers_hold(backbone, position):
    import torch

    plan, constants = Trees(backbone)[NAMES, PromptLayout(16, position)]
    runs = 8
    forest_pass = ForestPass(plant(Trees(backbone).tower, [(plan, constants, runs)]))
    forest_pass.forward([torch.zeros(runs, plan.slot_count, 32)])
    forest_pass.backward([torch.zeros(runs, len(NAMES), 24)])
    probabilities = sum(saved.probabilities.nbytes for saved, _, _ in forest_pass.saved.values())
    held = forest_pass.buffer.nbytes + probabilities
    estimate = runs * run_bytes(forest_pass.tower, plan)
    assert 0.6 * estimate < held < 1.2 * estimate


def test_room_holds_runs_up_to_its_budget_and_never_fewer_than_one(backbone):
    plan, _ = Trees(backbone)[NAMES, PromptLayout(4)]
    tower = Trees(backbone).tower
    tight = RoomFor(tower, budget=1)
    assert tight.take(plan)
    assert not tight.take(plan)
    assert not tight.halve()
    room = RoomFor(tower, budget=10**9)
    while room.take(plan):
        pass
    assert room.runs > 2
    tried = room.runs
    assert room.halve()
    room.clear()
    while room.take(plan):
        pass
    assert room.runs < tried
