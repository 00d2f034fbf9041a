"""Dry runs: what they count. How close their times are is measured by forecast_trial.py, not by a test."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastcoop.backbones import backbone_from_spec
from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.grids.grid import read_grid
from fastcoop.grids.planning import plan_runs
from fastcoop.methods import METHODS, RunContext, RunSpec
from fastcoop.results.records import Batch
from fastcoop.sweeps import Summary, cache_grid, known, timing
from fastcoop.sweeps.loading import load_grid, open_features, open_unchanged
from tests.small_world import write_backbone


def test_a_dry_run_forecasts_what_is_left_and_writes_nothing(
    run: Callable[..., Summary], world: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    methods = grid["methods"] | {"ensemble": None, "text_bias": {"epochs": 3}}
    grid = grid | {"methods": methods}
    list(cache_grid(grid, data_root=world / "data", cache=world / "cache"))
    planned = run(grid, results=tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists()
    assert planned.left == planned.runs == 27
    found = planned.forecast
    assert found is not None
    assert {part.method: part.runs for part in found.parts} == {
        "zero_shot": 2, "ensemble": 1, "linear_probe": 4, "text_bias": 4, "coop": 16,
    }  # fmt: skip
    assert (found.crops, found.workers) == (0, 1)
    assert found.seconds is not None
    assert 0 < found.seconds < 600
    assert found.memory_bytes > 1e8
    run(grid, results=tmp_path / "done", only=["coop", "zero_shot"], overrides=["seeds=1"])
    again = run(grid, results=tmp_path / "done", dry_run=True)
    assert (again.left, again.done_before) == (27 - 10, 10)
    assert again.forecast is not None
    assert again.forecast.nodes == found.nodes / 2
    coop = next(part for part in again.forecast.parts if part.method == "coop")
    assert coop.seconds is not None
    assert 0 < coop.seconds < 60
    assert json.loads(json.dumps(again.as_json()))["left"] == 17
    assert run(grid, results=tmp_path / "done", only=["zero_shot"], dry_run=True).forecast is None


def test_a_dry_run_builds_no_model_and_goes_by_the_pace_of_the_last_sweep(
    run: Callable[..., Summary],
    world: Path,
    grid: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    list(cache_grid(grid, data_root=world / "data", cache=cache))
    did = run(grid, cache=cache, results=tmp_path / "first")
    with monkeypatch.context() as patched:
        patched.setattr("fastcoop.backbones.backbone_from_spec", lambda *given, **how: pytest.fail("loaded"))
        patched.setattr(timing, "time_work", lambda *given: pytest.fail("timed"))
        found = run(grid, cache=cache, results=tmp_path / "second", dry_run=True).forecast
    assert found is not None
    assert {part.source for part in found.parts} == {"by earlier sweeps"}
    assert found.seconds is not None
    expected = sum(part.seconds or 0.0 for part in found.parts)
    assert 0.5 * did.seconds * did.engine_share < expected < did.seconds, "the same runs take the same time"
    (cache / known.FILE).unlink()
    again = run(grid, cache=cache, results=tmp_path / "second", dry_run=True).forecast
    assert again is not None
    assert {part.source for part in again.parts} == {"timed now"}
    same = ("nodes", "flops", "crops", "prompts")
    assert [getattr(again, name) for name in same] == [getattr(found, name) for name in same]
    assert [(part.runs, part.batches, part.largest) for part in again.parts] == [
        (part.runs, part.batches, part.largest) for part in found.parts
    ]


def test_a_dry_run_with_records_loads_no_torch(
    run: Callable[..., Summary],
    world: Path,
    grid: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its import takes seconds."""
    cache, file, model = tmp_path / "cache", tmp_path / "grid.yaml", write_backbone(tmp_path / "deep", 2)
    methods = {name: {"layer": 1} if name == "tcp" else {} for name in METHODS}
    methods["coop"] = {"schedule": ["paper", "fast"], "prompt": ["[V]x4 a [CLASS], printed.", None]}
    grid = grid | {"backbones": str(model), "shots": 1, "seeds": 1, "methods": methods}
    file.write_text(json.dumps(grid))
    list(cache_grid(grid, data_root=world / "data", cache=cache))
    known.record_backbones(cache, {str(model): backbone_from_spec(model, device="cpu")})
    with monkeypatch.context() as patched:
        patched.setattr(timing, "time_work", lambda *given: 1.0)
        expected = run(grid, cache=cache, results=tmp_path / "results", dry_run=True).forecast
    assert expected is not None
    kinds = {(part.method, part.backbone, trains) for part in expected.parts for trains in (True, False)}
    known.record_paces(cache, "cpu", expected.threads, dict.fromkeys(kinds, 1.0))
    options = [
        "--dry-run",
        "--json",
        "--jobs",
        "1",
        "--cache",
        str(cache),
        "--data-root",
        str(world / "data"),
    ]
    code = (
        f"from fastcoop.cli.app import run; run({['sweep', str(file), *options]}); import sys; "
        "print({'torch', 'open_clip', 'sklearn', 'matplotlib'} & sys.modules.keys(), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == "set()"
    found = json.loads(ran.stdout)["forecast"]
    assert {part["source"] for part in found["parts"]} == {"by earlier sweeps"}
    assert (found["nodes"], found["flops"], found["crops"]) == (expected.nodes, expected.flops, 0)


def test_the_time_of_tests_after_the_last_progress_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Tested:
        def run(self, backbone: Any, runs: list[Any], done: Any, context: RunContext) -> None:
            nonlocal now
            for _ in runs:
                context.on_progress(1.0)
                now += 0.25

    monkeypatch.setitem(METHODS, "tested", Tested())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    loaded: Any = SimpleNamespace(backbone=lambda name: None)
    batch = Batch("tested", "tiny", ("key",), threads=1, cost=2.0)
    run = RunSpec("tested", None, "tiny", "colours")
    assert timing.time_work(loaded, [batch], {"key": run}, threads=1) == 0.25 / batch.cost


def test_tests_alone_record_no_pace_of_learning(
    run: Callable[..., Summary], world: Path, grid: dict[str, Any], tmp_path: Path
) -> None:
    places = {"cache": tmp_path / "cache", "results": tmp_path / "results"}
    grid = grid | {"methods": {"text_bias": {"epochs": 2}}}
    run(grid, **places)
    paces = known.known_paces(tmp_path / "cache", "cpu", 1)
    assert set(paces) == {("text_bias", "tiny", False)}
    assert run(grid | {"targets": {"colours": "other"}}, **places).finished == 4
    assert known.known_paces(tmp_path / "cache", "cpu", 1) == paces


@pytest.fixture
def model(world: Path, tmp_path: Path) -> Path:
    """A model folder, named by a link, with its record in ``tmp_path``."""
    shutil.copytree(world / "tiny", tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    link = tmp_path / "link"
    known.record_backbones(tmp_path, {str(link): backbone_from_spec(link, device="cpu")})
    return link


def is_recorded(cache: Path, model: Path) -> bool:
    found = known.recorded_backbone(cache, str(model), "cpu")
    return known.loaded_backbone(found) is not found


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "[1]", "not JSON", "[" * 100_000, '{"backbones": null}', '{"backbones": {"MODEL": 1}}',
        '{"backbones": {"MODEL": {"files": 1}}}', '{"paces": {"here": [["coop", 1]]}}', None,
    ],
)  # fmt: skip
def test_a_damaged_record_is_replaced(tmp_path: Path, model: Path, damage: str | None) -> None:
    path = tmp_path / known.FILE
    assert is_recorded(tmp_path, model)
    whole = path.read_text()
    path.write_text(whole[:-40] if damage is None else damage.replace("MODEL", str(model)))
    assert not is_recorded(tmp_path, model)
    known.record_paces(tmp_path, "cpu", 1, {("coop", "tiny", True): 2.0})
    assert known.known_paces(tmp_path, "cpu", 1) == {("coop", "tiny", True): 2.0}
    known.record_backbones(tmp_path, {str(model): backbone_from_spec(model, device="cpu")})
    assert is_recorded(tmp_path, model)


@pytest.mark.parametrize("change", ["weights", "preprocessing", "config", "link"])
def test_a_record_is_only_of_what_the_name_finds_now(tmp_path: Path, model: Path, change: str) -> None:
    weights = next(path for path in model.iterdir() if path.suffix != ".json")
    if change == "weights":
        weights.write_bytes(weights.read_bytes())  # a new time
    elif change == "preprocessing":
        (model / "preprocessor_config.json").write_text("{}")
    elif change == "config":
        shutil.copy(model / "tiny.json", model / "open_clip_config.json")  # comes before others
    else:
        shutil.copytree(model, tmp_path / "other")
        model.unlink()
        model.symlink_to(tmp_path / "other")
    assert not is_recorded(tmp_path, model)


@pytest.mark.parametrize(
    "methods",
    [
        {name: None for name in METHODS if name != "tcp"},
        {"tcp": None},
        {"prograd": {"context_length": 3}},
        {"clip_adapter": {"reduction": 99}},
        {"cocoop": {"reduction": 99}},
    ],
)
def test_a_recorded_backbone_gives_the_keys_and_refusals_of_a_loaded_one(
    world: Path,
    grid: dict[str, Any],
    tmp_path: Path,
    model: Path,
    methods: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for load in (None, partial(known.recorded_backbone, tmp_path, device="cpu")):
        if load:
            monkeypatch.setattr(
                "fastcoop.backbones.backbone_from_spec", lambda *given, **how: pytest.fail("loaded")
            )
        whole = read_grid(grid | {"backbones": str(model), "methods": methods})
        loaded = load_grid(whole, world / "data", "cpu", load=load)
        open_features(loaded, tmp_path, open_unchanged)
        try:
            found.append({run.key for run in plan_runs(loaded.runs())})
        except UserError as error:
            found.append({str(error)})
    assert found[0] == found[1]


def test_a_recorded_backbone_names_its_device_as_a_loaded_one(tmp_path: Path, model: Path) -> None:
    found = known.recorded_backbone(tmp_path, str(model), "cpu:0")
    assert str(found.device) == str(known.loaded_backbone(found).device)


def test_missing_features_are_counted_and_only_training_is_timed(
    run: Callable[..., Summary], grid: dict[str, Any], tmp_path: Path
) -> None:
    found = run(grid, cache=tmp_path / "cache", results=tmp_path / "new", dry_run=True).forecast
    assert found is not None
    drawn = 16  # all of the training images, or fewer
    assert 8 + 20 + 2 * 8 <= found.crops <= 8 + 20 + 2 * drawn
    assert {part.method for part in found.parts if part.seconds is None} == {"linear_probe", "zero_shot"}
    assert found.seconds is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dry-run", "--backend", "dask"], "Beside --dry-run these change nothing: --backend."),
        (["--dry-run", "--set", "datasets=e"], ""),
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
