"""What the results folder's messages advise, done."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastcoop as fc
from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.methods import METHODS
from fastcoop.results import store as results_store
from fastcoop.results.store import open_store
from fastcoop.sweeps import Summary
from tests.advice import follows
from tests.results.test_scores import OwnColumns
from tests.small_world import write_backbone, write_dataset


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "data" / "colours")
    write_dataset(root / "data" / "shifted", ("grey", "green"), train=0, val=0, seed=1)
    write_backbone(root / "tiny")
    return root


@pytest.fixture(scope="module")
def sweep(world: Path) -> Callable[..., Summary]:
    coop = {"context_length": 2, "class_position": ["end", "mid"], "epochs": 2, "learning_rate": [0.1, 1e38]}
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1,
        "targets": {"colours": "shifted"}, "methods": {"coop": coop, "zero_shot": None},
    }  # fmt: skip
    return partial(fc.sweep, grid, data_root=world / "data", cache=world / "cache", jobs=1)


@pytest.fixture(scope="module")
def done(sweep: Callable[..., Summary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One zero-shot run and four of CoOp, two of them diverged. Read only."""
    folder = tmp_path_factory.mktemp("done") / "results"
    assert sweep(results=folder).finished == 5
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run ``fastcoop results``: (exit code, error message)."""

    def command(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["results", *map(str, arguments)])
        return int(stopped.value.code or 0), capsys.readouterr().err

    return command


def zero_shot(sweep: Callable[..., Summary], folder: Path, **options: Any) -> int:
    return sweep(results=folder, only=["zero_shot"], **options).finished


@follows("delete it, and a sweep writes it again")
def test_damaged_dataset_facts_are_deleted(sweep: Callable[..., Summary], copy: Path) -> None:
    for text in ("[", "[]", '{"colours": 3}'):
        (copy / "datasets.json").write_text(text)
        with pytest.raises(UserError, match="delete it, and a sweep writes it again"):
            sweep(results=copy)
    (copy / "datasets.json").unlink()
    sweep(results=copy)
    assert json.loads((copy / "datasets.json").read_text()).keys() == {"colours", "shifted"}


@follows("and cannot be compared as one; choose one of them with --where")
def test_one_of_several_settings_is_chosen_to_compare(call: Callable[..., Any], copy: Path) -> None:
    with closing(sqlite3.connect(copy / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET accuracy = 1 WHERE accuracy IS NULL")
    compare = ["compare", copy, "--labels", "CoOp (M=2, end)", "CoOp (M=2, mid)"]
    code, err = call(*compare)
    assert (code, "differ in learning_rate (0.1 and 1e+38), and cannot be compared" in err) == (2, True)
    assert call(*compare, "--where", "learning_rate=0.1")[0] == 0


@follows("; choose others with --where")
def test_comparable_pairs_are_chosen(call: Callable[..., Any], done: Path, copy: Path) -> None:
    with closing(sqlite3.connect(copy / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET images = 'others' WHERE dataset = 'shifted'")
    code, err = call("compare", done, copy)
    assert (code, "choose others with --where" in err) == (2, True)
    assert call("compare", done, copy, "--where", "dataset=colours")[0] == 0


@follows("compare runs tested on the same dataset", "so it predicted nothing; choose another run")
def test_runs_with_predictions_on_the_same_images_are_compared(done: Path) -> None:
    table = fc.load_results(done)
    good, diverged = (table.key[table.status == status].iloc[0] for status in ("done", "diverged"))
    own = fc.load_predictions(done, good)
    with pytest.raises(UserError, match="compare runs tested on the same dataset"):
        fc.paired_test(own, fc.load_predictions(done, good, "shifted"))
    with pytest.raises(UserError, match="choose another run"):
        fc.paired_test(own, fc.load_predictions(done, diverged))
    other = table.key[(table.status == "done") & (table.key != good)].iloc[0]
    assert 0 < fc.paired_test(own, fc.load_predictions(done, other)).p <= 1


@follows("Merge only the folder")
def test_one_of_two_folders_in_conflict_is_merged(done: Path, copy: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(copy / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET predictions = x'00', accuracy = 1")
    with pytest.raises(UserError, match="Merge only the folder whose results are right"):
        fc.merge_results([copy, done], tmp_path / "all")
    assert fc.merge_results([done], tmp_path / "right") == 5


@follows("; restore it from a copy.")
@pytest.mark.parametrize("content", [b"cut", None])
def test_damaged_contexts_are_restored(done: Path, copy: Path, content: bytes | None) -> None:
    one, other = sorted((copy / "contexts").iterdir())[:2]
    one.write_bytes(other.read_bytes() if content is None else content)
    with pytest.raises(UserError, match=r"is damaged.*; restore it from a copy"):
        fc.load_contexts(copy, one.stem)
    shutil.copy(done / "contexts" / one.name, one)
    assert np.array_equal(fc.load_contexts(copy, one.stem), fc.load_contexts(done, one.stem), equal_nan=True)


@follows(
    "holds no results (no {}); run `fastcoop sweep` into it first",
    "holds no results yet; run `fastcoop sweep`",
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_without_results_is_swept_into(
    sweep: Callable[..., Summary], tmp_path: Path, begun: bool
) -> None:
    if begun:
        (tmp_path / "results.sqlite").touch()
    with pytest.raises(UserError, match=r"holds no results.*run `fastcoop sweep` into it first"):
        fc.load_results(tmp_path)
    assert zero_shot(sweep, tmp_path) == 1
    assert len(fc.load_results(tmp_path)) == 2


@follows("which is not a number; give one, or use = or !=")
def test_a_condition_compares_with_a_number(call: Callable[..., Any], done: Path) -> None:
    code, err = call("list", done, "--where", "label<CoOp")
    assert (code, "give one, or use = or !=" in err) == (2, True)
    for condition in ("accuracy<50", "label=Zero-shot CLIP", "label!=Zero-shot CLIP"):
        assert call("list", done, "--where", condition)[0] == 0


@follows("restore it from a copy, or move it away and run the sweep again")
@pytest.mark.parametrize("way", ["restore", "move"])
def test_a_damaged_database_is_restored_or_moved(
    sweep: Callable[..., Summary], done: Path, copy: Path, way: str
) -> None:
    path = copy / "results.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="restore it from a copy, or move it away and run the sweep again"):
        fc.load_results(copy)
    if way == "restore":
        shutil.copy(done / path.name, path)
    else:
        path.rename(copy / "damaged")
        assert sweep(results=copy).finished == 5
    assert len(fc.load_results(copy)) == len(fc.load_results(done))


@follows("close the program that has it open")
def test_the_program_that_locks_the_database_is_closed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcoop.results.database.READ_TIMEOUT", 0.1)
    with closing(sqlite3.connect(copy / "results.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="close the program that has it open"):
            fc.load_results(copy)
    assert len(fc.load_results(copy))


@follows("free space on its disk and run the same command again")
def test_a_merge_is_repeated_once_the_disk_has_room(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(UserError, match="free space on its disk and run the same command again"):
            fc.merge_results([done], tmp_path / "all")
    assert fc.merge_results([done], tmp_path / "all") == 5


@follows(
    "choose another folder, or change this folder's permissions",
    "not written by this version of fastcoop; use another",
)
@pytest.mark.parametrize(
    ("database", "message"),
    [("folder", "choose another folder, or change"), ("foreign", "use another folder")],
)
def test_another_folder_is_used(
    sweep: Callable[..., Summary], tmp_path: Path, database: str, message: str
) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    if database == "folder":
        (folder / "results.sqlite").mkdir()
    else:
        with closing(sqlite3.connect(folder / "results.sqlite")) as db:
            db.execute("CREATE TABLE something (other TEXT)")
    with pytest.raises(UserError, match=message):
        zero_shot(sweep, folder)
    assert zero_shot(sweep, tmp_path / "another") == 1


@follows("which every run has; rename it")
def test_a_methods_own_column_is_renamed(
    sweep: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OwnColumns()
    own.named = "seed"
    monkeypatch.setitem(METHODS, "own", own)
    with pytest.raises(UserError, match="which every run has; rename it"):
        sweep(results=tmp_path, overrides=["methods=[own]"])
    own.named = "own_seed"
    assert sweep(results=tmp_path, overrides=["methods=[own]"]).finished == 1
    assert (fc.load_results(tmp_path).own_seed == 0.5).all()


def test_a_sweep_is_repeated_once_the_disk_has_room(
    sweep: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(results_store.ResultsStore, "_put", full)
        with pytest.raises(UserError, match=r"earlier ones are kept .*; free space on its disk"):
            zero_shot(sweep, tmp_path)
    assert zero_shot(sweep, tmp_path) == 1


@follows("; wait for it, or use another folder (--results)")
def test_another_sweep_is_waited_for(sweep: Callable[..., Summary], tmp_path: Path) -> None:
    with open_store(tmp_path / "one"):
        with pytest.raises(UserError, match=r"wait for it, or use another folder \(--results\)"):
            zero_shot(sweep, tmp_path / "one")
        assert zero_shot(sweep, tmp_path / "two") == 1
    assert zero_shot(sweep, tmp_path / "one") == 1
