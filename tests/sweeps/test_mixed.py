"""Runs of several methods in one batch: the numbers of each alone, fewer batches, and one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

import fastcoop.engine
from fastcoop.engine import PullToPrompt
from fastcoop.methods import METHODS, Method
from fastcoop.methods.coop import CoOpMethod, CoOpSettings
from fastcoop.methods.regularized import KgCoOpMethod
from fastcoop.methods.text import class_texts
from fastcoop.results import load_contexts, load_results
from fastcoop.results.store import open_store
from fastcoop.sweeps import Summary

Sweep = Callable[..., Summary]

SHORT = {"epochs": {1: 2, 2: 4}, "batch_size": 4, "learning_rate": 0.1}
MIXED: dict[str, dict[str, Any]] = {
    "coop": SHORT | {"context_length": 4, "class_position": ["end", "mid"]},
    "kgcoop": SHORT,
    "prograd": SHORT | {"context_length": 4, "select": "best_val", "val_every": 1},
}


@pytest.fixture
def grid(grid: dict[str, Any]) -> dict[str, Any]:
    return grid | {"methods": MIXED}


def frame(folder: Path) -> pd.DataFrame:
    columns = ["key", "label", "accuracy", "losses", "status", "epochs"]
    return load_results(folder)[columns].sort_values("key", ignore_index=True)


def assert_same(one: Path, *others: Path) -> None:
    found = pd.concat([frame(other) for other in others]).sort_values("key", ignore_index=True)
    pd.testing.assert_frame_equal(frame(one), found, check_exact=True)
    known = {key: load_contexts(other, key) for other in others for key in frame(other).key}
    for key in frame(one).key:
        assert np.array_equal(load_contexts(one, key), known[key])


def test_a_mixed_grid_has_the_numbers_of_one_grid_per_method_and_fewer_batches(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[int] = []
    train = fastcoop.engine.train

    def counted(backbone: Any, runs: Any, **options: Any) -> Any:
        trainings.append(len(runs))
        return train(backbone, runs, **options)

    monkeypatch.setattr(fastcoop.engine, "train", counted)
    for name in MIXED:
        run(grid, results=tmp_path / name, only=[name])
    assert trainings == [8, 4, 4]
    trainings.clear()
    forecast = run(grid, results=tmp_path / "mixed", dry_run=True).forecast
    assert forecast is not None
    assert {part.method: (part.batches, part.runs) for part in forecast.parts} == {
        "coop + kgcoop": (1, 12), "prograd": (1, 4),
    }  # fmt: skip
    trainings.clear()
    assert run(grid, results=tmp_path / "mixed").finished == 16
    assert sorted(trainings) == [4, 12], (
        "two gradients of ProGrad would both go through the rows of the others"
    )
    assert_same(tmp_path / "mixed", *(tmp_path / name for name in MIXED))


@pytest.mark.parametrize("stop_after_steps", [1, 3])
def test_a_mixed_batch_resumes_with_the_same_bits(
    run: Sweep,
    run_interrupted: Callable[..., None],
    grid: dict[str, Any],
    tmp_path: Path,
    stop_after_steps: int,
) -> None:
    run(grid, results=tmp_path / "whole", only=["coop", "kgcoop"])
    run_interrupted(stop_after_steps, grid, results=tmp_path / "cut", only=["coop", "kgcoop"])
    with open_store(tmp_path / "cut") as store:
        assert [(batch.method, len(batch.keys)) for batch in store.batches()] == [("coop + kgcoop", 12)]
    done = len(load_results(tmp_path / "cut")) if stop_after_steps == 3 else 0
    assert done == (6 if stop_after_steps == 3 else 0), "runs of one shot have ended"
    summary = run(grid, results=tmp_path / "cut", only=["coop", "kgcoop"])
    assert summary.finished + summary.done_before == 12
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_the_run_at_fault_in_a_mixed_batch_fails_alone_and_is_named(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run(grid, results=tmp_path / "whole", only=["coop", "kgcoop"])
    objective = KgCoOpMethod.objective

    def broken(self: Any, backbone: Any, one: Any) -> Any:
        if (one.seed, one.shots) == (2, 1):
            raise ValueError("nothing good")
        return objective(self, backbone, one)

    with monkeypatch.context() as patch:
        patch.setattr(KgCoOpMethod, "objective", broken)
        summary = run(grid, results=tmp_path / "cut", only=["coop", "kgcoop"])
    assert (summary.finished, len(summary.failed)) == (11, 1)
    said = capsys.readouterr().err
    assert "A batch of 12 coop + kgcoop runs failed, tried in halves: ValueError" in said
    assert "1 kgcoop run failed: ValueError" in said
    run(grid, results=tmp_path / "cut", only=["coop", "kgcoop"], retry_failed=True)
    assert_same(tmp_path / "cut", tmp_path / "whole")


class OwnCoOp(CoOpMethod):
    """A user's CoOp, which gives its runs a way of its own."""

    name = "own_coop"
    doubled = 2.0

    def objective(self, backbone: Any, run: Any) -> Any:
        return PullToPrompt(torch.from_numpy(class_texts(backbone, run.data)), self.doubled)


class OwnRun(OwnCoOp):
    name = "own_run"
    did: ClassVar[list[str]] = []

    def run(self, backbone: Any, runs: Any, done: Any, context: Any) -> None:
        assert {run.method for run in runs} <= {self.name}
        self.did.extend(run.key for run in runs)
        super().run(backbone, runs, done, context)


class OwnTraining(Method[CoOpSettings]):
    """As before there were trainers: sizes for the engine, and its own `run`."""

    name = "own_training"
    Settings = CoOpSettings
    layout, run_shape = CoOpMethod.layout, CoOpMethod.run_shape

    def run(self, backbone: Any, runs: Any, done: Any, context: Any) -> None:
        assert {run.method for run in runs} <= {self.name}
        trained = CoOpMethod()
        trained.run(backbone, [replace(run, method="coop") for run in runs], done, context)


def test_methods_of_users_share_batches_unless_they_run_their_own_way(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [OwnCoOp(), OwnRun(), OwnTraining()]
    for method in own:
        monkeypatch.setitem(METHODS, method.name, method)
    names = ["coop", *(method.name for method in own)]
    grid |= {"methods": dict.fromkeys(names, SHORT | {"context_length": 4}) | {"kgcoop": SHORT}}
    summary = run(grid, results=tmp_path / "all", dry_run=True)
    assert summary.forecast is not None
    assert {part.method for part in summary.forecast.parts} == {
        "coop + kgcoop + own_coop",
        "own_run",
        "own_training",
    }
    OwnRun.did.clear()  # a dry run times some
    assert not run(grid, results=tmp_path / "all").failed
    table = load_results(tmp_path / "all")
    assert sorted(OwnRun.did) == sorted(table.key[table.method == "own_run"])
    same = {name: [*of.sort_values(["seed", "shots"]).losses] for name, of in table.groupby("method")}
    assert same["own_coop"] == same["own_run"] != same["coop"]
    assert same["own_training"] == same["coop"]
