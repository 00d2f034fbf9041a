"""``fastcoop demo`` by its command, on one of its datasets and a grid of seconds."""

from __future__ import annotations

import json
import re

import pytest

from fastcoop.cli import main
from fastcoop.demo import run, world

GRID = """
backbones: demo-resnet
datasets: [digits]
shots: [1, 2]
seeds: [1]
views: 0
methods: {zero_shot: , coop: {context_length: 4, epochs: 2 steps}}
"""


def test_it_shows_what_it_made_and_finds_it_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    digits = [one for one in world.plan() if one.name == "digits"]
    monkeypatch.setattr(world, "plan", lambda: digits)
    monkeypatch.setattr(run, "GRID", tmp_path / "grid.yaml")
    command = ["demo", "--out", str(tmp_path / "out")]

    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["runs"], shown["finished"]) == (3, 3)
    accuracy = shown["accuracy"]["demo-resnet"]
    assert {label: list(row) for label, row in accuracy.items()} == {
        "Zero-shot CLIP": ["0"],
        "CoOp (M=4, end)": ["1", "2"],
    }
    assert 20 < accuracy["Zero-shot CLIP"]["0"] < 75
    files = [*shown["figures"], *shown["words"], shown["page"]]
    assert len(files) == 3
    before = [(tmp_path / file).stat().st_mtime_ns for file in files]

    with pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr().out
    assert f"{shown['results']}  (3 runs, 0 finished by this call)" in said
    assert re.search(rf"^Zero-shot CLIP +{accuracy['Zero-shot CLIP']['0']:.1f} *$", said, re.MULTILINE)
    assert [(tmp_path / file).stat().st_mtime_ns for file in files] == before


def test_a_report_that_was_interrupted_is_made_by_the_next_call(tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(GRID.replace("[1, 2]", "1"), encoding="utf-8")
    digits = [one for one in world.plan() if one.name == "digits"]
    monkeypatch.setattr(world, "plan", lambda: digits)
    monkeypatch.setattr(run, "GRID", tmp_path / "grid.yaml")
    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.reports.claims.texts_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.run_demo(tmp_path / "out")
    summary = run.run_demo(tmp_path / "out")
    assert summary.finished == 0
    page = (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
    assert "not finished" not in page
    assert "digits" in page


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
