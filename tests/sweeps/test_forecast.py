"""Forecasts: what they count is what the engine does. How long it takes is a machine's business, and no test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcoop.cli import main
from fastcoop.grids import read_grid
from fastcoop.grids.shown import grid_text
from fastcoop.sweeps import Summary, cache_grid, measure
from fastcoop.sweeps.dry_run import dry_run
from fastcoop.sweeps.forecast import _Curve, _makespan
from fastcoop.sweeps.workers import ExecutorConfig

NAMES = ("dark red", "green", "grey", "sky blue")


def test_imports_of_a_method_are_not_timed_as_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn takes seconds to import; as the time of the smallest probe that made sweeps seem hours long."""
    now = [0.0]

    class Method:
        imported = False

        def run(self, backbone: Any, runs: Any, done: Any, context: Any) -> None:
            now[0] += (not self.imported) * 100 + len(runs)
            self.imported = True

    monkeypatch.setattr(measure, "clock", lambda: now[0])
    monkeypatch.setitem(measure.METHODS, "slow", Method())
    anything: Any = None
    assert measure.time_run("slow", anything, anything) == 1


def test_workers_take_the_next_batch_when_they_are_free() -> None:
    assert _makespan([4, 3, 2, 2], ExecutorConfig(("cpu",), 2)) == 11
    assert _makespan([4, 3, 2, 2], ExecutorConfig(("cpu", "cpu"), 1)) == 6


def test_seconds_follow_sizes_through_what_was_timed() -> None:
    assert _Curve([(10, 2.0)])(20) == pytest.approx(4)
    curve = _Curve([(10, 1.0), (100, 100.0), (1000, 1000.0)])
    assert [curve(size) for size in (10, 20, 100, 400, 10_000)] == pytest.approx([1, 4, 100, 400, 10_000])


def test_a_dry_run_forecasts_what_is_left_and_writes_nothing(
    run: Callable[..., Summary], world: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    folders = {"data_root": world / "data", "cache": world / "cache", "jobs": 1}
    methods = grid["methods"] | {"ensemble": None, "text_bias": {"epochs": 3}}
    grid = grid | {"methods": methods}
    list(cache_grid(grid, data_root=world / "data", cache=world / "cache"))
    planned = dry_run(grid, results=tmp_path / "new", **folders)
    assert not (tmp_path / "new").exists()
    assert planned.left == planned.summary.runs == 27
    found = planned.forecast
    assert found is not None
    assert {part.method: part.runs for part in found.parts} == {
        "zero_shot": 2, "ensemble": 1, "linear_probe": 4, "text_bias": 4, "coop": 16,
    }  # fmt: skip
    assert (found.crops, found.workers) == (0, 1)
    assert found.seconds is not None
    assert 0 < found.seconds < 600
    assert found.memory > 1e8
    run(grid, results=tmp_path / "done", only=["coop", "zero_shot"], overrides=["seeds=1"])
    again = dry_run(grid, results=tmp_path / "done", **folders)
    assert (again.left, again.summary.done_before) == (27 - 10, 10)
    assert again.forecast is not None
    assert again.forecast.nodes == found.nodes / 2
    assert json.loads(json.dumps(again.as_json()))["would_run"] == 17
    assert dry_run(grid, results=tmp_path / "done", only=["zero_shot"], **folders).forecast is None


def test_features_that_are_missing_are_counted_and_stood_in_for(
    world: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    found = dry_run(
        grid, data_root=world / "data", cache=tmp_path / "cache", results=tmp_path / "new", jobs=1
    ).forecast
    assert found is not None
    drawn = 16  # all of the training images, or fewer
    assert 8 + 20 + 2 * 8 <= found.crops <= 8 + 20 + 2 * drawn
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--show-grid", "--jobs", "2", "--results", "r"],
            "Beside --show-grid these change nothing: --results, --jobs.",
        ),
        (["--dry-run", "--backend", "dask"], "Beside --dry-run these change nothing: --backend."),
        (["--show-grid", "--set", "datasets=e"], ""),
    ],
)
def test_options_that_change_nothing_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: list[str], said: str
) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("backbones: none-such\ndatasets: d\nmethods: zero_shot\n")
    with pytest.raises(SystemExit):
        main(["sweep", str(file), *options])
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


def test_the_grid_is_shown_with_every_default(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(
        "backbones: a\ndatasets: [b, c]\nseeds: 1\nexclude: {dataset: c, shots: 1}\nblocks:\n"
        "  one: {methods: {coop: {context_length: [4, 8], epochs: {1: 5, 16: 20 steps}}}, shots: [1, 16]}\n"
        "  two: {methods: zero_shot, include: {method: linear_probe, shots: 2}}\n"
    )
    with pytest.raises(SystemExit):
        main(["sweep", str(file), "--show-grid"])
    shown = capsys.readouterr().out
    for default in ("views: 8", "learning_rate: 0.002", "batch_size: 32", "iterations: 1000", "# 6 runs"):
        assert default in shown
    file.write_text(shown)
    read = read_grid(file)
    file.write_text(grid_text(read))
    assert sorted(read_grid(file).runs(), key=str) == sorted(read.runs(), key=str)
    assert sum(1 for _ in read.runs()) == 6 + 2 + 2
