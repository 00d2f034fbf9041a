"""What was learned on one dataset, tested on others: as targets of a grid would be, without training."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from fastcoop.cli.app import app
from fastcoop.errors import UserError
from fastcoop.results import load_predictions, load_results
from fastcoop.sweeps import Summary, evaluate, sweep
from tests.small_world import write_backbone, write_dataset

METHODS = {
    "zero_shot": None,
    "linear_probe": {"iterations": 50, "search_steps": 1},
    "text_transform": {"epochs": "8 steps"},
    "text_bias": {"epochs": 2},
    "coop": {"context_length": 2, "class_specific": [False, True], "epochs": 2},
}
FIT = ["coop", "coop", "linear_probe", "text_bias", "text_transform", "zero_shot"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a source whose class folders are WordNet IDs, one target that calls its classes otherwise, and one
    that has other classes; and the grid over it."""
    root = tmp_path_factory.mktemp("evaluate")
    write_dataset(root / "data" / "source")
    write_dataset(root / "data" / "sketch", ("grey", "green"), train=0, val=0, seed=1)
    write_dataset(root / "data" / "other", ("purple", "green"), train=0, val=0)
    ids = {"dark red": "n00000001", "green": "n00000002", "grey": "n00000003", "sky blue": "n00000004"}
    for name in ("source", "sketch"):
        for folder in sorted((root / "data" / name).glob("*/*")):
            folder.rename(folder.with_name(ids[folder.name]))
    called = {
        "source": {i: name for name, i in ids.items()},
        "sketch": {ids["grey"]: "smoke", ids["green"]: "grass"},
    }
    for name, names in called.items():
        (root / "data" / name / "dataset.yaml").write_text(yaml.safe_dump({"class_names": names}))
    write_backbone(root / "tiny")
    return root


def run(place: Path, results: Path, **changes: Any) -> Summary:
    grid = {
        "backbones": str(place / "tiny"), "datasets": "source", "shots": 2, "seeds": 1, "views": 0, "methods": METHODS,
    }  # fmt: skip
    return sweep(grid | changes, data_root=place / "data", cache=place / "cache", results=results, jobs=1)


@pytest.fixture(scope="module")
def results(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "study"
    run(place, folder)
    return folder


@pytest.fixture
def test_on(place: Path) -> Callable[..., Any]:
    def on(results: Path, *targets: str, **options: Any) -> Any:
        options = {"data_root": place / "data", "cache": place / "cache"} | options
        return evaluate(results, targets, backbones=[str(place / "tiny")], **options)

    return on


def scores(folder: Path, dataset: str) -> pd.DataFrame:
    frame = load_results(folder)
    columns = ["key", "method", "source", "accuracy", "macro_accuracy", "per_class", "chance"]
    return frame[frame.dataset == dataset][columns].sort_values("key", ignore_index=True)


def test_it_comes_to_what_targets_in_the_grid_come_to(
    place: Path, results: Path, test_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, tmp_path / "grid", targets={"source": "sketch"})
    expected = scores(tmp_path / "grid", "sketch")

    def no_training(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    for learner in (
        "engine.train",
        "methods.linear_probe.choose_c",
        "methods.text_learner.TextLearner.learn",
    ):
        monkeypatch.setattr(f"fastcoop.{learner}", no_training)
    tested = test_on(results, "sketch")
    assert sorted(load_results(results).query("dataset == 'sketch'").method) == FIT
    pd.testing.assert_frame_equal(scores(results, "sketch"), expected)
    assert {one.key: one.accuracy for one in tested} == dict(
        zip(expected.key, expected.accuracy, strict=True)
    )
    assert all(one.new for one in tested)
    again = test_on(results, "sketch")
    assert [one.accuracy for one in again] == [one.accuracy for one in tested]
    assert not any(one.new for one in again)


def test_what_cannot_be_tested_is_left_out_and_said(
    results: Path, test_on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tested = test_on(results, "other")
    assert sorted(one.label.split(" (")[0] for one in tested) == [
        "CoOp", "Text bias", "Text transform", "Zero-shot CLIP",
    ]  # fmt: skip
    assert "2 tests cannot be done" in caplog.text
    assert '"purple" is not among source' in caplog.text
    probe = load_results(results).query("method == 'linear_probe'").key.iloc[0]
    with pytest.raises(UserError, match='"purple" is not among source'):
        test_on(results, "other", runs=[probe[:12]])


def test_half_of_the_classes_is_a_target_too(results: Path, test_on: Any) -> None:
    """All runs answer among two of the four classes that they learned, and no worse for it."""
    tested = test_on(results, "source:new")
    assert len(tested) == len(FIT)
    assert set(load_results(results).query("dataset == 'source:new'").chance) == {50.0}
    for one in tested:
        among_all, among_two = (
            load_predictions(results, one.key),
            load_predictions(results, one.key, "source:new"),
        )
        inside = among_all.labels >= 2
        right = (among_all.predicted == among_all.labels)[inside]
        assert among_two.class_names == among_all.class_names[2:]
        assert (among_two.labels == among_all.labels[inside] - 2).all()
        assert (among_two.predicted[right] == among_two.labels[right]).all()


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["nowhere"], {}, "no dataset nowhere"),
        ([], {}, "nothing to test on"),
        (["sketch"], {"runs": ["zzz"]}, "has no run zzz"),
        (["sketch"], {"backbones": []}, "give it with --backbone"),
    ],
)
def test_nothing_is_recorded_where_something_does_not_exist(
    results: Path, place: Path, targets: list[str], options: dict, message: str
) -> None:
    before = len(load_results(results))
    given = {"backbones": [str(place / "tiny")]} | options
    with pytest.raises(UserError, match=message):
        evaluate(results, targets, data_root=place / "data", cache=place / "cache", **given)
    assert len(load_results(results)) == before


def test_runs_that_keep_nothing_are_refused(results: Path, test_on: Any, tmp_path: Path) -> None:
    key = load_results(results).query("method == 'text_bias'").key.iloc[0]
    path = results / "contexts" / f"{key}.safetensors"
    path.rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match=r"\(Text bias\) keeps nothing that could be tested"):
            test_on(results, "sketch", runs=[key])
        path.write_bytes(b"damaged")
        with pytest.raises(UserError, match="is damaged"):
            test_on(results, "sketch", runs=[key])
    finally:
        (tmp_path / "away").replace(path)


def test_a_damaged_file_leaves_out_its_run_only(
    results: Path, test_on: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(results, tmp_path / "copy"))
    damaged = min((copy / "contexts").iterdir())
    before = {one.key for one in test_on(copy, "sketch")}
    with closing(sqlite3.connect(copy / "results.sqlite")) as db, db:
        db.execute("DELETE FROM scores WHERE dataset = 'sketch'")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert {one.key for one in test_on(copy, "sketch")} == before - {damaged.stem}
    assert f"the first: {damaged} is damaged" in caplog.text


def test_the_command_prints_a_line_a_test_and_json(results: Path, place: Path) -> None:
    key = load_results(results).query("method == 'zero_shot'").key.iloc[0]
    options = [
        "evaluate", str(results), "--targets", "sketch", "--run", key[:10], "--backbone", str(place / "tiny"),
        "--data-root", str(place / "data"), "--cache", str(place / "cache"),
    ]  # fmt: skip
    said = CliRunner().invoke(app, options)
    assert said.exit_code == 0, said.output
    assert key[:12] in said.output
    assert "of 1 tests are new" in said.output
    (one,) = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (one["key"], one["dataset"], one["source"]) == (key, "sketch", "source")
