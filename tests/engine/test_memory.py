"""What a batch is estimated to take is what it takes."""

from __future__ import annotations

import pytest
import torch

from fastcoop.engine import train
from fastcoop.engine.buffers import Buffers
from fastcoop.engine.forest import plant
from fastcoop.engine.memory import RoomFor, run_bytes
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees
from fastcoop.prompts import PromptLayout

NAMES = tuple(
    f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("cat", "dog house", "owl")
)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_the_estimate_covers_what_a_pass_holds(backbone, position, class_specific):
    plan, constants = Trees(backbone)[NAMES, PromptLayout(16, position, class_specific)]
    runs = 8
    forest_pass = ForestPass(plant(Trees(backbone).tower, [(plan, constants, runs)]))
    forest_pass.forward([torch.zeros(runs, plan.slot_count, 32)])
    forest_pass.backward([torch.zeros(runs, len(NAMES), 24)])
    estimate = runs * run_bytes(forest_pass.tower, plan)
    assert 0.6 * estimate < forest_pass.nbytes < 1.2 * estimate


def test_training_says_so_where_the_estimate_was_off(backbone32, make_run, monkeypatch, caplog):
    runs = [make_run(epochs=2, seed=seed) for seed in range(4)]
    with caplog.at_level("DEBUG", "fastcoop"):
        train(backbone32, runs)
    assert "4 runs together hold" in caplog.text
    assert "more than estimated" not in caplog.text
    monkeypatch.setattr("fastcoop.engine.memory.run_bytes", lambda tower, plan: 10)
    monkeypatch.setattr("fastcoop.engine.memory.chunk_bytes", lambda tower: 10)
    train(backbone32, runs)
    assert "more than estimated; a smaller memory budget is safer" in caplog.text


def test_buffers_of_an_earlier_forest_are_freed(backbone):
    trees = Trees(backbone)
    buffers = Buffers(trees.tower.dtype, trees.tower.device)
    held = []
    for names in (NAMES, NAMES[:2]):
        plan, constants = trees[names, PromptLayout(4, "mid", names is NAMES)]
        forest_pass = ForestPass(plant(trees.tower, [(plan, constants, 2)] * len(names)), buffers)
        forest_pass.forward([torch.zeros(2, plan.slot_count, 32)] * len(names))
        forest_pass.backward([torch.zeros(2, len(names), 24)] * len(names))
        buffers.trim()
        held.append((forest_pass.nbytes, len(buffers.storages)))
    assert held[1] < held[0]
    assert held[1][1] < held[0][1]


def test_a_buffer_of_one_name_is_one_memory_also_after_it_grew():
    buffers = Buffers(torch.float32, torch.device("cpu"))
    small = buffers("scores", 2, 3)
    assert buffers("scores", 2, 3).data_ptr() == small.data_ptr() != buffers("other", 2, 3).data_ptr()
    large = buffers("scores", 4, 3)
    assert buffers("scores", 2, 3).data_ptr() == large.data_ptr() != small.data_ptr()
    assert buffers.nbytes == (12 + 6) * 4
    buffers.begin()
    buffers("scores", 2, 3)
    assert buffers.nbytes == 6 * 4


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
