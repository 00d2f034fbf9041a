"""What goes wrong stays where it went wrong: failing runs, dying workers, runs that collapse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Method, RunSpec
from fastcoop.methods.base import report_share
from fastcoop.methods.coop import CoOpMethod
from fastcoop.results import load_contexts, load_results
from fastcoop.results.records import Batch
from fastcoop.results.store import ResultsStore, open_store
from fastcoop.results.tables import find_collapsed
from fastcoop.sweeps import Summary, tasks
from fastcoop.sweeps.checkpoints import checkpoint_path, read_state
from fastcoop.sweeps.loading import LoadedGrid
from fastcoop.sweeps.loop import split_checkpoint
from fastcoop.sweeps.tasks import BatchFinished, OnEvent, Task
from fastcoop.sweeps.workers import SerialExecutor

Sweep = Callable[..., Summary]


@pytest.fixture
def bad_run(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes the class-specific "mid" runs of seed 2 at 1 shot raise; undo to mend them."""
    make = CoOpMethod.training

    def broken(method: CoOpMethod, backbone: Any, run: RunSpec) -> Any:
        settings = run.settings
        if (run.seed, run.shots, settings.class_position, settings.class_specific) == (2, 1, "mid", True):
            raise ValueError("nothing good")
        return make(method, backbone, run)

    patch = pytest.MonkeyPatch()
    patch.setattr(CoOpMethod, "training", broken)
    yield patch
    patch.undo()


def test_a_method_that_reports_all_of_its_work_ends_like_any_other(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left to report after the run's outcome is then 0, which is not the start of a batch."""
    monkeypatch.setattr(tasks, "PROGRESS_EVERY", 0.0)
    method = METHODS["text_bias"]
    learn = method.learn

    def reporting(*arguments: Any) -> Any:
        outcome = learn(*arguments)
        report_share(1.0)
        return outcome

    monkeypatch.setattr(method, "learn", reporting)
    summary = run(grid | {"methods": {"text_bias": {"epochs": 1}}}, results=tmp_path)
    assert summary.finished == summary.runs > 0


def test_a_failing_run_is_noted_alone_and_retried_on_request(
    bad_run: pytest.MonkeyPatch,
    run: Sweep,
    grid: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = run(grid, results=tmp_path, only=["coop", "zero_shot"])
    assert (summary.runs, summary.finished, len(summary.failed)) == (18, 17, 1)
    (error,) = summary.failed.values()
    assert error.startswith("ValueError: nothing good (at test_failures.py, line")
    assert "tried in halves" in capsys.readouterr().err
    bad_run.undo()
    # It is not tried again unasked, and still named.
    again = run(grid, results=tmp_path, only=["coop", "zero_shot"])
    assert (again.finished, again.failed) == (0, summary.failed)
    mended = run(grid, results=tmp_path, only=["coop", "zero_shot"], retry_failed=True)
    assert (mended.finished, mended.failed) == (1, {})
    assert len(load_results(tmp_path)) == 18
    with open_store(tmp_path) as store:
        assert store.failures() == {}
        assert store.batches() == []
    assert not (tmp_path / "checkpoints").exists()


def test_the_command_names_failed_runs_and_ends_with_1(
    bad_run: pytest.MonkeyPatch, world: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    import yaml

    from fastcoop.cli.app import app

    (tmp_path / "g.yaml").write_text(yaml.safe_dump(grid))
    folders = [
        "--data-root",
        str(world / "data"),
        "--cache",
        str(world / "cache"),
        "--results",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(
        app, ["sweep", str(tmp_path / "g.yaml"), *folders, "--only", "coop", "--jobs", "1"]
    )
    assert result.exit_code == 1
    assert "ValueError: nothing good" in result.output
    assert "--retry-failed" in result.output
    wrong = CliRunner().invoke(
        app, ["sweep", str(tmp_path / "g.yaml"), *folders, "--address", "tcp://nowhere:1"]
    )
    assert isinstance(wrong.exception, UserError)


class DyingExecutor(SerialExecutor):
    """Dies in the midst of each batch that holds one of some runs, after a few steps that left a checkpoint."""

    fatal: frozenset[str] = frozenset()
    times: int = 10**6
    deaths: list[Batch]

    def run(self, tasks: deque[Task], on_event: OnEvent, on_tick: Callable[[], None]) -> None:
        while tasks:
            task = tasks[0]
            if self.fatal & {run.key for run in task.runs} and len(self.deaths) < self.times:
                self.deaths.append(tasks.popleft().batch)
                on_event(BatchFinished(task.batch, error="killed", died=True))
            else:
                super().run(deque([tasks.popleft()]), on_event, on_tick)


@pytest.fixture
def dying(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> type[DyingExecutor]:
    class Executor(DyingExecutor):
        deaths: list[Batch] = []  # noqa: RUF012

        def __init__(self, world: LoadedGrid):
            super().__init__(world)

    monkeypatch.setattr("fastcoop.sweeps.grid_sweep.SerialExecutor", Executor)
    return Executor


def test_a_batch_whose_worker_dies_is_tried_once_more_in_halves(
    dying: type[DyingExecutor], run: Sweep, grid: dict[str, Any], tmp_path: Path
) -> None:
    run(grid, results=tmp_path / "whole", only=["coop"])
    victim = load_results(tmp_path / "whole").key[3]
    dying.fatal, dying.times = frozenset([victim]), 1
    summary = run(grid, results=tmp_path / "once", only=["coop"])
    assert (summary.finished, summary.failed, len(dying.deaths)) == (16, {}, 1)
    dying.deaths.clear()
    dying.times = 10**6
    summary = run(grid, results=tmp_path / "always", only=["coop"])
    whole, half = dying.deaths
    assert set(half.keys) < set(whole.keys)
    assert len(half.keys) == len(whole.keys) // 2
    assert set(summary.failed) == set(half.keys)
    assert summary.finished == 16 - len(half.keys)


def test_the_halves_of_a_batch_go_on_from_its_checkpoint(
    run_interrupted: Callable[..., None], grid: dict[str, Any], tmp_path: Path
) -> None:
    run_interrupted(1, grid, results=tmp_path, only=["coop"])
    with open_store(tmp_path) as store:
        (batch,) = store.batches()
        half = Batch("coop", batch.backbone, batch.keys[8:], 1, batch.budget)
        split_checkpoint(store, batch, [half])
    before, after = (read_state(checkpoint_path(tmp_path, name)) for name in (batch.name, half.name))
    assert before is not None
    assert after is not None
    assert int(after["step.0"]) == 2
    assert (after["momentum.0"] == before["momentum.8"]).all()


@pytest.mark.parametrize("stop_after_steps", [1, 3, 5])
def test_a_resumed_batch_comes_to_the_same_bits(
    run: Sweep,
    run_interrupted: Callable[..., None],
    grid: dict[str, Any],
    tmp_path: Path,
    stop_after_steps: int,
) -> None:
    """Runs of 3 and of 6 epochs in one batch, so that some have ended and are recorded when it is stopped."""
    grid["methods"] = {"coop": grid["methods"]["coop"] | {"epochs": {1: 3, 2: 6}, "batch_size": 4}}
    run(grid, results=tmp_path / "whole")
    run_interrupted(stop_after_steps, grid, results=tmp_path / "cut")
    summary = run(grid, results=tmp_path / "cut")
    assert summary.finished + summary.done_before == 16
    if stop_after_steps == 5:
        assert 0 < summary.done_before < 16
    one, two = (
        load_results(tmp_path / name)[["key", "accuracy", "losses"]].sort_values("key", ignore_index=True)
        for name in ("whole", "cut")
    )
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    for key in one.key:
        assert np.array_equal(load_contexts(tmp_path / "whole", key), load_contexts(tmp_path / "cut", key))


def test_a_quiet_collapse_is_seen_among_its_sister_seeds() -> None:
    settings = {
        "good": [60, 61, 59, 60.5],
        "one fell": [60, 61, 59, 20],
        "two seeds": [60, 1],
        "one image of eight": [62.5, 62.5, 50],
        "far from chance": [40, 40, 31],
        "near chance": [14, 14.1, 13.9, 10],
        "noisy": [60, 55, 65, 35],
    }
    same = {
        "backbone": "b",
        "dataset": "d",
        "source": "d",
        "method": "coop",
        "shots": 16,
        "chance": 10.0,
        "test": "t",
    }
    rows = [
        same | {"settings": name, "seed": seed, "accuracy": accuracy}
        for name, accuracies in settings.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    low = find_collapsed(pd.DataFrame(rows))
    assert [(row.settings, row.accuracy) for row in low.itertuples()] == [
        ("one fell", 20), ("far from chance", 31),
    ]  # fmt: skip
    for column in ("backbone", "dataset", "source", "method", "settings", "shots", "test"):
        seeds = [same | {"settings": "", "seed": seed, "accuracy": 60} for seed in (1, 2, 3)]
        alone = seeds[0] | {"accuracy": 20, column: 1 if column == "shots" else "other"}
        assert find_collapsed(pd.DataFrame([*seeds, alone])).empty, f"it differs in {column}"
    assert find_collapsed(pd.DataFrame(rows).iloc[:0]).empty


def test_the_summary_names_collapsed_runs(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = Method.scores_of

    def low(self: Method[Any], backbone: Any, runs: Sequence[RunSpec], learned: Any) -> Any:
        return [
            scores if (run.seed, run.shots) == (3, 1)
            else {name: replace(one, accuracy=90.0) for name, one in scores.items()}
            for run, scores in zip(runs, test(self, backbone, runs, learned), strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(Method, "scores_of", low)
    grid["methods"] = {"coop": {"context_length": 2, "epochs": 2}}
    summary = run(grid | {"seeds": [1, 2, 3], "shots": 1}, results=tmp_path)
    assert len(summary.collapsed) == 1
    assert "colours, 1 shot, seed 3" in summary.collapsed[0]


def test_a_results_folder_made_for_nothing_goes_again_and_nothing_else_does(tmp_path: Path) -> None:
    results = tmp_path / "results"

    def refused(name: str, work: Callable[[ResultsStore], object] = lambda store: None) -> None:
        with suppress(UserError), open_store(results / name) as store:
            work(store)
            raise UserError("refused")

    refused("one")
    assert not results.exists()
    refused("one", lambda store: (results / "another").mkdir())
    assert [path.name for path in results.iterdir()] == ["another"]

    def cache_and_describe(store: ResultsStore) -> None:
        (store.folder / "cache" / "tiny").mkdir(parents=True)
        (store.folder / "cache" / "tiny" / "colours.h5").touch()
        (store.folder / "grid.yaml").touch()

    refused("with", cache_and_describe)
    assert [path.name for path in (results / "with").rglob("*")] == ["cache", "tiny", "colours.h5"]
    (results / "there").mkdir()
    (results / "there" / "grid.yaml").touch()
    refused("there", cache_and_describe)
    assert sorted(path.name for path in (results / "there").iterdir()) == ["cache", "grid.yaml"]
    batch = Batch("coop", "tiny", ("key",), 1, 1, 1.0, 0)
    refused("begun", lambda store: store.replace_batches([], [batch]))
    refused("begun")
    with open_store(results / "begun") as store:
        assert store.batches() == [batch]
