"""Sweeps over a small world: complete, resumable, exact, and never two at once."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.progress import counted
from fastcoop.results import load_contexts, load_predictions, load_results, merge_results
from fastcoop.results.records import RunDescription
from fastcoop.results.store import ResultsStore, open_store
from fastcoop.sweeps import Summary
from tests.advice import follows

Sweep = Callable[..., Summary]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all the grid's runs, uninterrupted. Read only."""
    return tmp_path_factory.mktemp("results") / "whole"


@pytest.fixture
def done(run: Sweep, grid: dict[str, Any], whole: Path) -> Path:
    run(grid, results=whole)
    return whole


def comparable(folder: Path) -> pd.DataFrame:
    columns = ["key", "dataset", "source", "method", "accuracy", "losses", "per_class", "settings", "epochs"]
    return load_results(folder)[columns].sort_values(["key", "dataset"], ignore_index=True)


def test_every_run_of_the_grid_is_in_the_table_once(done: Path) -> None:
    table = load_results(done)
    assert table.method.value_counts().to_dict() == {"coop": 16, "linear_probe": 4, "zero_shot": 2}
    assert table.key.is_unique
    assert (table.status == "done").all()
    assert (table.chance == 25).all()
    coop = table[table.method == "coop"]
    combinations = coop.groupby(["shots", "seed", "class_position", "class_specific"]).size()
    assert len(combinations) == 16
    assert set(coop.label) == {
        "CoOp (M=2, end)", "CoOp (M=2, mid)", "CoOp (M=2, end, CSC)", "CoOp (M=2, mid, CSC)",
    }  # fmt: skip
    assert set(coop.schedule) == {"quick: 3 epochs"}
    assert set(table.shots[table.method == "zero_shot"]) == {0}
    assert sorted(table.train_images.unique()) == [0, 4, 8]
    assert {*coop.groupby("class_specific").trained_parameters.unique().map(tuple).items()} == {
        (False, (2 * 16,)), (True, (4 * 2 * 16,)),
    }  # fmt: skip
    assert set(table.trained_parameters[table.method == "linear_probe"]) == {4 * 16 + 4}
    assert table.trained_parameters[table.method == "zero_shot"].isna().all()


def test_contexts_and_predictions_lie_beside_the_table(done: Path) -> None:
    for row in load_results(done).itertuples():
        said = load_predictions(done, row.key)
        assert 100 * (said.predicted == said.labels).mean() == row.accuracy
        assert said.class_names == ("dark red", "green", "grey", "sky blue")
        if row.method == "coop":
            assert load_contexts(done, row.key).shape == ((4, 2, 16) if row.class_specific else (2, 16))
    with pytest.raises(UserError, match="no run"):
        load_predictions(done, "nonsense")
    with pytest.raises(UserError, match="no learned contexts"):
        load_contexts(done, "nonsense")


def test_a_second_sweep_has_nothing_to_do(done: Path, run: Sweep, grid: dict[str, Any]) -> None:
    summary = run(grid, results=done)
    assert (summary.runs, summary.done_before, summary.finished) == (22, 22, 0)
    assert run(grid, results=done, dry_run=True).done_before == 22


def test_a_dry_run_counts_and_writes_nothing(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    summary = run(grid, results=tmp_path / "results", cache=tmp_path / "cache", dry_run=True)
    assert {count.method: count.runs for count in summary.counts} == {
        "zero_shot": 2, "linear_probe": 4, "coop": 16,
    }  # fmt: skip
    assert summary.done_before == 0
    assert list(tmp_path.iterdir()) == []


def test_a_grown_grid_keeps_what_is_done(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    assert run(grid, results=tmp_path, overrides=["seeds=1"], only=["coop"]).finished == 8
    assert run(grid, results=tmp_path, overrides=["seeds=1"]).finished == 4
    summary = run(grid, results=tmp_path)
    assert (summary.done_before, summary.finished) == (12, 10)


def test_schedules_written_differently_are_the_same_runs(
    run: Sweep, grid: dict[str, Any], tmp_path: Path
) -> None:
    run(grid, results=tmp_path, only=["coop"])
    assert (
        run(grid, results=tmp_path, only=["coop"], overrides=["methods.coop.epochs={1: 3, 2: 3}"]).finished
        == 0
    )
    assert run(grid, results=tmp_path, only=["coop"], overrides=["methods.coop.epochs=4"]).finished == 16


@pytest.mark.parametrize("stop_after", [1, 5, 13])
def test_interrupted_and_resumed_equals_uninterrupted(
    done: Path,
    run: Sweep,
    grid: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop_after: int,
) -> None:
    record, recorded = ResultsStore.record, []

    def interrupted(self: ResultsStore, planned: Any, *rest: Any) -> None:
        if len(recorded) == stop_after:
            raise KeyboardInterrupt
        record(self, planned, *rest)
        recorded.append(planned.key)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsStore, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(grid, results=tmp_path)
    said = capsys.readouterr().err
    assert f"; kept in {tmp_path}: {counted(stop_after, 'run')}\n" in said
    assert "Stopped" not in said, "only the command line prints that"
    assert set(load_results(tmp_path).key) == set(recorded)
    assert run(grid, results=tmp_path).done_before == stop_after
    pd.testing.assert_frame_equal(comparable(tmp_path), comparable(done), check_exact=True)
    for key in load_results(done).query("method == 'coop'").key:
        np.testing.assert_array_equal(load_contexts(tmp_path, key), load_contexts(done, key))


def test_the_command_ends_an_interrupted_sweep_with_one_line_and_code_130(
    world: Path,
    grid: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = ResultsStore.record

    def interrupted(self: ResultsStore, planned: Any, *rest: Any) -> None:
        record(self, planned, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultsStore, "record", interrupted)
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    places = ["--data-root", world / "data", "--cache", world / "cache", "--results", tmp_path / "results"]
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *map(str, [tmp_path / "grid.yaml", *places, "--jobs", 1])])
    assert stopped.value.code == 130
    assert "Stopped. Finished work is kept" in capsys.readouterr().err
    assert len(load_results(tmp_path / "results").key.unique()) == 1


def test_new_targets_are_tested_without_learning_again(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(grid, results=tmp_path)
    before = comparable(tmp_path)

    def no_training(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("fastcoop.engine.train", no_training)
    monkeypatch.setattr("fastcoop.methods.linear_probe.choose_c", no_training)
    summary = run(grid | {"targets": {"colours": ["shifted"]}}, results=tmp_path)
    assert (summary.done_before, summary.finished) == (0, 22)
    table = comparable(tmp_path)
    assert set(table[table.dataset == "shifted"].source) == {"colours"}
    pd.testing.assert_frame_equal(table[table.dataset == "colours"].reset_index(drop=True), before)
    key = table.key[table.method == "linear_probe"].iloc[0]
    assert load_predictions(tmp_path, key, "shifted").class_names == ("green", "grey")


@follows("is not known as this command's own; choose another place, or move it away")
def test_a_sweep_replaces_no_grid_of_ones_own(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    folder, own = tmp_path / "study", "# my study\nshots: 1\n"
    folder.mkdir()
    (folder / "grid.yaml").write_text(own)
    with pytest.raises(UserError, match="choose another place, or move it away"):
        run(grid, results=folder, only=["zero_shot"])
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("grid.yaml", own)]
    assert run(grid, results=tmp_path / "elsewhere", only=["zero_shot"]).finished == 2
    (folder / "grid.yaml").rename(tmp_path / "mine.yaml")
    assert run(grid, results=folder, only=["zero_shot"]).finished == 2
    assert run(grid, results=folder, only=["zero_shot"]).finished == 0, "its own is replaced"


def test_two_sweeps_on_one_folder_are_refused(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(UserError, match="Another sweep is writing"):
        run(grid, results=tmp_path)
    assert run(grid, results=tmp_path, only=["zero_shot"]).finished == 2


def test_damage_in_the_midst_of_a_store_is_said(
    done: Path, run: Sweep, grid: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(done, folder)
    with closing(sqlite3.connect(folder / "results.sqlite")) as db, db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = db.execute("PRAGMA page_size").fetchone()
    whole = (folder / "results.sqlite").read_bytes()
    (folder / "results.sqlite").write_bytes(whole[:size] + b"\xa5" * (len(whole) - size))
    with pytest.raises(UserError, match="cannot be used as a results store"):
        run(grid, results=folder)
    with pytest.raises(UserError, match=r"cannot be read \(database disk image is malformed\); restore it"):
        load_results(folder)


def test_a_corrupt_or_foreign_store_is_refused(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="cannot be used as a results store"):
        run(grid, results=tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_results(tmp_path)
    (tmp_path / "results.sqlite").unlink()
    with closing(sqlite3.connect(tmp_path / "results.sqlite")) as db, db:
        db.execute("CREATE TABLE something (else_ TEXT)")
    with pytest.raises(UserError, match="not written by this version"):
        run(grid, results=tmp_path)
    with pytest.raises(UserError, match="holds no results"):
        load_results(tmp_path / "nowhere")


def test_a_full_disk_loses_nothing(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.results.store.write_parameters", full)
        with pytest.raises(UserError, match="No space left"):
            run(grid, results=tmp_path)
    assert set(load_results(tmp_path).method) == {"zero_shot"}
    assert run(grid, results=tmp_path).finished == 20


def test_a_disk_that_is_full_from_the_start_is_one_sentence(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    run(grid, results=tmp_path / "first")  # caches the features
    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.files.os.replace", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space"):
            run(grid, results=tmp_path / "about")
    error = sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr("fastcoop.results.database.create", lambda db: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"disk is full\); free space"):
        run(grid, results=tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


def test_a_folder_that_cannot_be_written_to_is_one_sentence(
    run: Sweep, grid: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "results.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\); .*choose another place"):
        run(grid, results=tmp_path)


def test_the_database_is_one_file_also_while_a_sweep_writes_it(done: Path, tmp_path: Path) -> None:
    """So a copy of it is whole, it can be read where nothing can be written, and machines can share its folder."""
    shutil.copytree(done, tmp_path / "there")
    with open_store(tmp_path / "there") as store:
        store.record_failure(_described(store), "none of its own")
        (tmp_path / "copy").mkdir()
        shutil.copy(tmp_path / "there" / "results.sqlite", tmp_path / "copy")
        assert not list((tmp_path / "there").glob("results.sqlite-*"))
    assert len(load_results(tmp_path / "copy")) == 22
    with closing(sqlite3.connect(tmp_path / "copy" / "results.sqlite")) as db, db:
        assert db.execute("SELECT count(*) FROM failures").fetchone() == (1,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def _described(store: ResultsStore) -> RunDescription:
    """The description of a run that is done, to note that it failed."""
    key = next(iter(store.finished()))
    return RunDescription(
        key=key, backbone="b", dataset="d", method="zero_shot", label="L", shots=0, seed=0, settings="{}"
    )


def test_a_merge_that_cannot_be_done_is_one_sentence_and_writes_nothing(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds no results"):
        merge_results([done, tmp_path / "nowhere"], tmp_path / "all")
    assert not (tmp_path / "all").exists()

    copy = shutil.copyfile
    for room in (0, 3):
        left = iter(range(room))

        def fill(*args: Any) -> None:
            if next(left, None) is None:  # noqa: B023
                raise OSError(28, "No space left on device")
            copy(*args)

        with monkeypatch.context() as patch:
            patch.setattr("shutil.copyfile", fill)
            with pytest.raises(UserError, match=r"could not be merged into .*No space left.*free space"):
                merge_results([done], tmp_path / "all")
        assert not (tmp_path / "all").exists()
    assert merge_results([done], tmp_path / "all") == 22


def test_a_run_that_failed_here_and_was_done_elsewhere_is_done_once_merged(
    done: Path, tmp_path: Path
) -> None:
    with open_store(tmp_path) as store, open_store_copy(done, tmp_path / "other") as other:
        store.record_failure(_described(other), "no room")
    merge_results([done], tmp_path)
    with open_store(tmp_path) as store:
        assert store.failures() == {}


def open_store_copy(folder: Path, to: Path) -> Any:
    shutil.copytree(folder, to)
    return open_store(to)


def test_folders_merge_by_key(done: Path, run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    run(grid, results=tmp_path / "a", overrides=["seeds=1"])
    run(grid, results=tmp_path / "b", overrides=["seeds=[2]"])
    assert merge_results([tmp_path / "a", tmp_path / "b"], tmp_path / "all") == 22
    assert merge_results([tmp_path / "a"], tmp_path / "all") == 0
    assert set(load_results(tmp_path / "all").key) == set(load_results(done).key)
    assert run(grid, results=tmp_path / "all").finished == 0
    with closing(sqlite3.connect(tmp_path / "a" / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET predictions = x'00', accuracy = 1")
    with pytest.raises(UserError, match=r"is .* but 1.00%"):
        merge_results([tmp_path / "a"], tmp_path / "all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": "colors"}, 'Did you mean "colours"'),
        ({"backbones": "demo-resnett"}, "no backbone"),
        ({"datasets": "shifted"}, "only test images"),
        ({"methods": {"coop": {"epochs": {1: 3}}}}, "not for 2"),
        ({"methods": "linear_probe", "targets": {"colours": "other"}}, "not among colours"),
        (
            {"methods": {"coop": {"class_specific": True}}, "targets": {"colours": "other"}},
            "not among colours",
        ),
    ],
)
def test_nothing_is_run_where_something_does_not_exist(
    run: Sweep, grid: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(grid | change, results=tmp_path / "results", cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
