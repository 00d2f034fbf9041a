"""The advice in messages of the command line, followed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcoop.cli import main
from fastcoop.errors import UserError
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset

FASTCOOP = [sys.executable, "-m", "fastcoop.cli"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a zero-shot run, by relative paths."""
    root = tmp_path_factory.mktemp("advice")
    write_dataset(root / "data" / "colours", train=1, val=1, test=1)
    write_backbone(root / "tiny")
    (root / "grid.yaml").write_text(
        "backbones: tiny\ndatasets: colours\nshots: 1\nseeds: 1\nviews: 0\nmethods: zero_shot\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with pytest.raises(SystemExit) as stopped:
            main(["sweep", "grid.yaml", "--jobs", "1"])
    assert not stopped.value.code
    return root


@pytest.fixture
def call(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in the world: (exit code, standard output, standard error)."""
    monkeypatch.chdir(world)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


@follows(
    "Give either a second results folder to compare with, or --labels FIRST SECOND",
    "choose one of those endings",
    '`pip install "fastcoop[parquet]"`, or export to a .csv file',
    "Leave that out",
)
@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        (
            ["results", "compare", "results/grid"],
            "Give either a second",
            [
                ["results", "compare", "results/grid", "results/grid"],
                ["results", "compare", "results/grid", "--labels", "Zero-shot CLIP", "Zero-shot CLIP"],
            ],
        ),
        (
            ["results", "export", "results/grid", "runs.xlsx"],
            "choose one",
            [["results", "export", "results/grid", f"runs.{ending}"] for ending in ("csv", "parquet")],
        ),
        (
            ["cache-features", "grid.yaml", "--shots", "2"],
            "Leave that out",
            [["cache-features", "grid.yaml"]],
        ),
    ],
)
def test_arguments_are_given_as_advised(
    call: Call, wrong: list[str], message: str, right: list[list[str]]
) -> None:
    code, _, err = call(*wrong)
    assert (code, message in err) == (2, True), err
    for words in right:
        code, _, err = call(*words)
        assert code == 0, err


@follows("or export to a .csv file")
def test_without_pyarrow_a_csv_file_is_written(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = call("results", "export", "results/grid", "more.parquet")
    assert (code, "needs pyarrow" in err) == (2, True)
    assert call("results", "export", "results/grid", "more.csv")[0] == 0


def test_bench_writes_to_another_place(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object, **__: object) -> None:
        raise UserError("measuring now")

    monkeypatch.setattr("fastcoop.bench.benchmark.run_in_fresh_process", measure)
    code, _, err = call("bench", "--datasets", "imagenet-10", "--out", "grid.yaml")
    assert (code, "choose another place" in err) == (2, True), err
    code, _, err = call("bench", "--datasets", "imagenet-10", "--out", "new")
    assert err == "fastcoop: measuring now\n"


@follows(
    "There is no room to write to ({}); free space and run the command again",
    "{}; free space there, or set TMPDIR to another folder",
)
def test_space_is_freed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Any] = [OSError(errno.ENOSPC, "No space left on device")]

    def run_demo(*_: object) -> str:
        if problems:
            raise problems.pop()
        return "done"

    monkeypatch.setattr("fastcoop.demo.run.run_demo", run_demo)
    code, _, err = call("demo")
    assert (code, "free space and run the command again" in err) == (2, True)
    assert call("demo")[:2] == (0, "done\n")
    problems.append(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"))
    code, _, err = call("demo")
    assert (code, "in ['/tmp']; free space there, or set TMPDIR" in err) == (2, True)
    assert call("demo")[:2] == (0, "done\n")


@follows("Standard output cannot be written ({}); free space", "set PYTHONUTF8=1, or a locale of UTF-8")
def test_output_goes_where_there_is_room_and_in_utf8(world: Path, tmp_path: Path) -> None:
    words = [*FASTCOOP, "results", "list", "results/grid"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, cwd=world, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, "free space" in done.stderr) == (2, True)
    assert subprocess.run(words, cwd=world, stdout=subprocess.DEVNULL).returncode == 0
    folder = write_dataset(tmp_path / "data" / "colours", train=1, val=1, test=1)
    (folder / "dataset.yaml").write_text("name: café\n", encoding="utf-8")
    for locale, code in (
        ({"LC_ALL": "C"}, 2),
        ({"LC_ALL": "C", "PYTHONUTF8": "1"}, 0),
        ({"LC_ALL": "C.UTF-8"}, 0),
    ):
        (tmp_path / "café-names.csv").unlink(missing_ok=True)
        environment = os.environ | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"} | locale
        words = ["datasets", "names", str(folder)]  # writes café-names.csv
        done = subprocess.run(
            [*FASTCOOP, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, "set PYTHONUTF8=1" in done.stderr) == (code, code == 2), done.stderr


@follows("A name or a file is not UTF-8 ({}); rename or convert it")
def test_a_name_is_converted(call: Call) -> None:
    key = json.loads(call("results", "list", "results/grid", "--json")[1])[0]["key"]
    code, _, err = call("results", "show", "results/grid", os.fsdecode(b"\xe9" + key[1:].encode()))
    assert (code, "rename or convert it" in err) == (2, True), err
    assert call("results", "show", "results/grid", key)[0] == 0


@follows("{} cannot be written ({}); free space or choose another place")
def test_another_place_is_chosen(call: Call) -> None:
    code, _, err = call("report", "results/grid", "--out", "grid.yaml")
    assert (code, "choose another place" in err) == (2, True), err
    assert call("report", "results/grid", "--out", "rep")[0] == 0
