"""The advice of reports, the demo and the benchmark, followed."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fastcoop as fc
from fastcoop.cli import main
from fastcoop.demo import glyphs
from fastcoop.errors import UserError
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset

pytestmark = pytest.mark.usefixtures("undrawn")
COOP = {"context_length": 2, "epochs": 2}
GRID: dict[str, Any] = {
    "backbones": "tiny", "datasets": "colours", "shots": 2, "seeds": 1, "views": 0,
    "methods": {"zero_shot": None, "coop": COOP},
}  # fmt: skip
Study = Callable[..., Path]


def with_methods(**methods: object) -> dict[str, Any]:
    return {"methods": {"coop": COOP, **methods}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, the backbones ``tiny`` and ``other``, and a finished study in ``results``."""
    root = tmp_path_factory.mktemp("advice")
    for number, name in enumerate(("colours", "elsewhere")):
        write_dataset(root / "data" / name, seed=number)
    write_backbone(root / "tiny")
    other = write_backbone(root / "other") / "open_clip_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(other).items()}, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fc.sweep(GRID, data_root="data", cache="cache", results="results", jobs=1)
    return root


@pytest.fixture
def study(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A function that sweeps ``GRID``, with changes, into a copy of the results or into a new folder."""
    monkeypatch.chdir(world)
    copy = tmp_path / "results"

    def run(changes: Mapping[str, Any] | None = None, anew: bool = False) -> Path:
        if not copy.exists() and not anew:
            shutil.copytree("results", copy)
        if changes is not None:
            fc.sweep(GRID | dict(changes), data_root="data", cache="cache", results=copy, jobs=1)
        return copy

    return run


def reported(results: Path) -> tuple[str, set[str]]:
    """The text of missing.txt, and the names of the files written."""
    files = fc.report(results, results.with_name("report"))
    (missing,) = (path for path in files if path.name == "missing.txt")
    return missing.read_text(encoding="utf-8"), {path.stem for path in files}


def run_command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "fastcoop"
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert not ended.value.code


@follows(
    "list several under `prompts:`",
    "give the grid several (`context_length: [4, 8, 16]`)",
    "give the grid several under `backbones:`",
    "give the grid `targets:`",
    "there is no run of ensemble; add the method to the grid",
    "there is no run of {}; add one of these methods to the grid",
)
@pytest.mark.parametrize(
    ("item", "advice", "changes"),
    [
        (
            "figure1",
            "list several under `prompts:`",
            with_methods(zero_shot={"prompts": ["a {}.", "the {}."]}),
        ),
        (
            "figure5a",
            "`context_length: [4, 8, 16]`",
            {"methods": {"coop": COOP | {"context_length": [2, 3]}}},
        ),
        ("figure5b", "several under `backbones:`", {"backbones": ["tiny", "other"]}),
        ("table1", "give the grid `targets:`", {"targets": {"colours": "elsewhere"}}),
        ("table2", "no run of ensemble; add the method", with_methods(zero_shot=None, ensemble=None)),
        ("table5", "add one of these methods", with_methods(text_bias={"learning_rate": 0.001, "epochs": 2})),
    ],
)
def test_what_an_item_lacks(study: Study, item: str, advice: str, changes: Mapping[str, Any]) -> None:
    missing, files = reported(study())
    assert advice in missing
    assert item not in files
    _, files = reported(study(changes))
    assert item in files


@follows("there is no run of coop; add the method to the grid")
def test_results_without_coop(study: Study) -> None:
    missing, files = reported(study({"methods": {"zero_shot": None}}, anew=True))
    assert "there is no run of coop; add the method to the grid" in missing
    assert "figure4" not in files
    _, files = reported(study({}))
    assert "figure4" in files


@follows(
    "run `fastcoop interpret`",
    "run `fastcoop interpret` again",
    "delete it and run `fastcoop interpret` again",
)
def test_nearest_words(study: Study) -> None:
    results = study({"methods": {"coop": COOP | {"init": "a photo"}}})
    words = results / "nearest_words"
    shutil.rmtree(words, ignore_errors=True)
    claims = results.with_name("report") / "claims.csv"
    reported(results)
    assert "no nearest words are stored for such runs; run `fastcoop interpret`" in claims.read_text()
    run_command(f"fastcoop interpret {shlex.quote(str(results))} --backbone tiny")
    _, files = reported(results)
    assert "table4" in files
    assert "vectors are nearest to the word that they were initialized with" in claims.read_text()

    for path in words.iterdir():  # as versions wrote them that did not store the words
        stored = json.loads(path.read_text())
        stored.pop("start_words", None)
        path.write_text(json.dumps(stored))
    reported(results)
    assert "run `fastcoop interpret` again" in claims.read_text()
    run_command(f"fastcoop interpret {shlex.quote(str(results))} --backbone tiny")
    reported(results)
    assert "vectors are nearest to the word that they were initialized with" in claims.read_text()

    damaged = next(words.iterdir())
    damaged.write_text("{")
    page = results.with_name("report") / "index.html"
    reported(results)
    assert "delete it and run `fastcoop interpret` again" in page.read_text(encoding="utf-8")
    damaged.unlink()
    run_command(f"fastcoop interpret {shlex.quote(str(results))} --backbone tiny")
    reported(results)
    assert "delete it and run `fastcoop interpret` again" not in page.read_text(encoding="utf-8")


@follows("the results folder has no datasets.json, which newer sweeps write; run the sweep again")
def test_no_datasets_json(study: Study) -> None:
    results = study()
    (results / "datasets.json").unlink()
    missing, files = reported(results)
    assert "no datasets.json" in missing
    assert "table6" not in files
    study({})
    assert "table6" in reported(results)[1]


@follows("delete it, and a sweep writes it again")
def test_damaged_datasets_json(study: Study) -> None:
    results = study()
    (results / "datasets.json").write_text("[1]")
    with pytest.raises(UserError, match="delete it, and a sweep writes it again"):
        reported(results)
    (results / "datasets.json").unlink()
    study({})
    assert "table6" in reported(results)[1]


@follows("was tested yet; run `{}`", "To test them, run `{}`")
def test_results_of_untested_runs(study: Study) -> None:
    results = study()
    page = results.with_name("report") / "index.html"

    def untest() -> None:
        with closing(sqlite3.connect(results / "results.sqlite")) as db, db:
            db.execute("DELETE FROM scores WHERE key IN (SELECT key FROM runs WHERE method = 'coop')")

    untest()
    reported(results)
    found = re.search("To test them, run `(.*?)`", html.unescape(page.read_text(encoding="utf-8")))
    assert found is not None
    run_command(found[1])
    reported(results)
    assert "not tested yet" not in page.read_text(encoding="utf-8")

    untest()
    with (
        closing(sqlite3.connect(results / "results.sqlite")) as db,
        db,
    ):  # as `fastcoop import-coop` leaves a folder
        for table in ("scores", "runs"):
            db.execute(f"DELETE FROM {table} WHERE key NOT IN (SELECT key FROM runs WHERE method = 'coop')")
    with pytest.raises(UserError, match="was tested yet") as refused:
        reported(results)
    (command,) = re.findall("`(.*?)`", str(refused.value))
    run_command(command)
    assert "figure3" in reported(results)[1]


@follows("holds no finished run; run `fastcoop sweep` into it first", "diverged and have no accuracy")
def test_results_of_failed_and_diverged_runs(study: Study) -> None:
    results = study({"methods": {"coop": COOP | {"learning_rate": 1e30, "epochs": 5}}}, anew=True)
    with pytest.raises(UserError, match="lower their learning rate"):
        reported(results)
    study({"methods": {"zero_shot": None, "coop": COOP | {"learning_rate": 0.002}}})
    assert "figure4" in reported(results)[1]

    with closing(sqlite3.connect(results / "results.sqlite")) as db, db:
        for table in ("scores", "runs"):
            db.execute(f"DELETE FROM {table}")
    with pytest.raises(UserError, match="run `fastcoop sweep` into it first"):
        reported(results)
    study({})
    assert "figure4" in reported(results)[1]


@follows("Each command adds runs to these results")
def test_the_commands_of_a_report(study: Study) -> None:
    results = study()
    missing, _ = reported(results)
    before = set(fc.load_results(results).key)
    commands = dict(re.findall(r"^- (.*?)\. .*\n +(fastcoop .*)$", missing, re.MULTILINE))
    run_command(commands["Figure 5b"].replace("ANOTHER", "other") + " --set methods.coop.epochs=2 --jobs 1")
    assert before < set(fc.load_results(results).key)
    assert "figure5b" in reported(results)[1]
    run_command(commands["Table 2"] + " --set methods.coop.epochs=2 --jobs 1")
    assert "table2" in reported(results)[1]


@follows('run `pip install "fastcoop[demo]"`', "install version 1.4.2")
def test_the_fonts_of_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r'pip install "fastcoop\[demo\]"'):
            glyphs.find_glyphs(["remix"])
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "fonts_folder", lambda: tmp_path)
        with pytest.raises(UserError, match=r"install version 1\.4\.2"):
            glyphs.find_glyphs(["remix"])
    extras = [re.sub("['\"]", "", one) for one in requires("fastcoop") or ()]
    assert "qtawesome==1.4.2; extra == demo" in extras
    assert glyphs.find_glyphs(["remix"])
