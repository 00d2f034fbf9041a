"""`report` end to end on made-up results: which files, which numbers, and what is said to be missing."""

from __future__ import annotations

import csv
import json
import sqlite3

import numpy as np
import pandas as pd
import pytest

from fastcoop.errors import UserError
from fastcoop.reports import report
from fastcoop.reports.study import study_of
from fastcoop.results.parameters import Parameters, write_parameters
from tests.reports.made_up_results import coop, results, run, store_words, whole_study

RUN = (
    "INSERT INTO runs VALUES (:key, :backbone, 'd', :dataset, :method, :label, :shots, :seed, :settings,"
    " :context_length, :class_position, :class_specific, :init, :epochs, :schedule, 1, NULL, :status, :seconds,"
    " NULL, '{}', 'now', 'cpu', :versions, '{}')"
)
SCORE = (
    "INSERT INTO scores VALUES (:key, :dataset, 't', NULL, NULL, NULL, :accuracy, :accuracy, :chance, '[1, NaN]', x'',"
    " x'')"
)


def rows_of(path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_figure3_and_its_numbers_come_out_in_all_formats(folder_of, tmp_path):
    frame = results()
    folder = folder_of(frame)
    store_words(folder, frame)
    written = report(folder, tmp_path / "out")
    names = {path.name for path in written}
    assert {f"figure3.{kind}" for kind in ("png", "pdf", "svg", "csv", "md", "tex")} <= names
    assert {"table4.csv", "missing.txt", "claims.csv", "claims.md", "index.html"} <= names
    assert all(path.stat().st_size for path in written)
    assert (tmp_path / "out" / "figure3.pdf").read_bytes().startswith(b"%PDF")
    assert not list((tmp_path / "out").glob("*.part"))

    rows = rows_of(tmp_path / "out" / "figure3.csv")
    mine = frame[
        (frame.dataset == "objects") & (frame.method == "linear_probe") & (frame.shots == 4)
    ].accuracy
    (cell,) = [
        r for r in rows if (r["dataset"], r["method"], r["shots"]) == ("objects", "Linear probe", "4 shots")
    ]
    assert float(cell["mean"]) == pytest.approx(mine.mean(), rel=1e-5)
    assert float(cell["std"]) == pytest.approx(mine.std(ddof=1), rel=1e-5)
    assert cell["runs"] == "3"


@pytest.mark.usefixtures("undrawn")
def test_figures_of_an_earlier_report_are_told(folder_of, tmp_path, caplog):
    frame = results(datasets=("objects",), shots=(1, 16))
    report(folder_of(frame), tmp_path / "out")
    (tmp_path / "out" / "notes.md").touch()
    assert not caplog.text
    fast = results(datasets=("objects",), shots=(1, 16), backbone="other")
    report(folder_of(pd.concat([frame, fast])), tmp_path / "out")  # a figure for each backbone
    assert "such as figure3.csv: figures and tables of an earlier report" in caplog.text


@pytest.mark.usefixtures("undrawn")
def test_the_average_is_over_datasets_and_its_spread_over_seeds(folder_of, tmp_path):
    frame = results()
    report(folder_of(frame), tmp_path / "out")
    end = frame[
        (frame.method == "coop")
        & (frame.class_position == "end")
        & ~frame.class_specific.eq(True)
        & (frame.shots == 16)
    ]
    per_seed = end.groupby("seed").accuracy.mean()
    rows = rows_of(tmp_path / "out" / "figure3.csv")
    key = ("Average over 5 datasets", "CoOp (M=16, end)", "16 shots")
    (cell,) = [r for r in rows if (r["dataset"], r["method"], r["shots"]) == key]
    assert float(cell["mean"]) == pytest.approx(end.accuracy.mean(), rel=1e-5)
    assert float(cell["std"]) == pytest.approx(per_seed.std(ddof=1), rel=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_a_dataset_with_missing_runs_stays_out_of_the_average_and_is_named(folder_of, tmp_path):
    frame = results()
    frame = frame[~((frame.dataset == "digits") & (frame.method == "linear_probe") & (frame.shots == 1))]
    report(folder_of(frame), tmp_path / "out")
    text = (tmp_path / "out" / "figure3.md").read_text()
    assert "Average over 4 datasets" in text
    assert "leaves out digits" in text


def test_a_shorter_schedule_is_named_on_what_is_drawn_and_in_tables(folder_of, tmp_path):
    from fastcoop.reports.items import figure3
    from fastcoop.reports.study import study_of

    frame = results(datasets=("objects",), schedule="quick: 30 epochs instead of 200")
    (part,) = figure3.ITEM.make(study_of(frame, tmp_path))
    assert "quick schedule: 30 epochs instead of 200" in part.figure.get_suptitle().replace("\n", " ")
    assert "quick schedule: 30 epochs instead of 200" in part.table.to_latex()
    (part,) = figure3.ITEM.make(study_of(results(datasets=("objects",)), tmp_path))
    assert "schedule" not in part.figure.get_suptitle()


def test_the_papers_schedule_and_another_are_drawn_together_and_never_averaged(tmp_path):
    from fastcoop.reports.items import figure3, figure4
    from fastcoop.reports.study import study_of
    from fastcoop.reports.style import drawing

    frames = [
        results(("objects",), schedule=schedule, lift=lift)
        for schedule, lift in (("paper", 0), ("fast, no pull", 10), ("quick: 5 epochs", 20))
    ]
    study = study_of(pd.concat(frames[:2]).drop_duplicates("key"), tmp_path)
    with drawing():
        (part,) = figure3.ITEM.make(study)
    assert part.suffix == ""
    assert part.subtitle == "demo-resnet, paper schedule and fast schedule, no pull"
    cells, axis = dict(part.table.rows), part.figure.axes[0]
    lines = {line.get_gid(): line for line in axis.lines if line.get_gid()}
    legend = {text.get_text() for text in part.figure.legends[0].get_texts()}
    for variant in ("end", "mid", "end, CSC", "mid, CSC"):
        names = [f"CoOp (M=16, {variant}), {schedule}" for schedule in ("paper", "fast")]
        paper, fast = (cells["objects", name]["16 shots"] for name in names)
        assert (paper.runs, fast.runs) == (3, 3)
        assert fast.mean - paper.mean == pytest.approx(10)
        assert legend >= {*names}
        series = f"coop {variant.replace(', CSC', ' csc')} by schedule"
        drawn = [lines[f"{series} {schedule}"] for schedule in ("paper", "fast")]
        assert drawn[0].get_color() == drawn[1].get_color() == drawn[0].get_markerfacecolor()
        assert drawn[0].get_linestyle() in ("-", "--")
        assert (drawn[1].get_linestyle(), drawn[1].get_markerfacecolor()) == (":", "white")
        looks = [part.charts[0].looks[name] for name in names]
        assert looks[0].color == looks[1].color
    assert [one.suffix for one in figure4.ITEM.make(study)] == ["-fast-no-pull", "-paper"]
    three = study_of(pd.concat(frames).drop_duplicates("key"), tmp_path)
    suffixes = [one.suffix for one in figure3.ITEM.make(three)]
    assert suffixes == ["-fast-no-pull", "-paper", "-quick-5-epochs"]


@pytest.mark.parametrize("less", ["one dataset", "few shots of a dataset"])
def test_a_schedule_that_was_tried_on_less_takes_nothing_from_the_papers_average(tmp_path, less):
    from fastcoop.reports.items import figure3
    from fastcoop.reports.study import study_of
    from fastcoop.reports.style import drawing

    paper, fast = (results(("objects", "digits"), schedule=one) for one in ("paper", "fast, no pull"))
    if less == "one dataset":
        fast = fast[fast.dataset == "objects"]
    else:
        fast = fast[(fast.dataset == "objects") | (fast.shots == 16)]
    frame = pd.concat([paper, fast]).drop_duplicates("key")
    with drawing():
        exhibits = figure3.ITEM.make(study_of(frame, tmp_path))
    assert [one.suffix for one in exhibits] == ["-fast-no-pull", "-paper"]
    assert "Average over 2 datasets" in exhibits[1].charts[0].panels


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_said(folder_of, tmp_path):
    frame = results(datasets=("objects",))
    folder = folder_of(frame[frame.method != "coop"])
    report(folder, tmp_path / "out")
    text = (tmp_path / "out" / "missing.txt").read_text()
    assert text.startswith(f"The folder {folder} lacks runs for the following.")
    assert "Figure 3" in text
    assert "no run of coop" in text


def test_the_same_results_give_the_same_bytes(folder_of, tmp_path):
    folder = folder_of(results(datasets=("objects",)))
    first = {p.name: p.read_bytes() for p in report(folder, tmp_path / "a")}
    second = {p.name: p.read_bytes() for p in report(folder, tmp_path / "a")}
    assert first == second


@pytest.mark.usefixtures("undrawn")
def test_a_report_does_not_depend_on_the_order_in_which_runs_finished(folder_of, tmp_path):
    frame = whole_study().drop_duplicates("key")
    frame = frame[frame.source == frame.dataset]  # others need stored predictions
    rates = np.where(frame.seed == 1, '{"learning_rate": 0.01}', '{"learning_rate": 0.02}')
    frame.loc[frame.method == "text_bias", "settings"] = rates[frame.method == "text_bias"]
    frame.loc[frame.seed == 3, "accuracy"] -= 40  # warnings name runs
    grid = {"datasets": list(dict.fromkeys(frame.dataset)), "backbones": ["demo-resnet", "demo-vit"]}
    made = []
    for state in (1, 2):
        folder = folder_of(frame.sample(frac=1, random_state=state))
        (folder / "grid.yaml").write_text(json.dumps(grid))
        made.append({path.name: path.read_bytes() for path in report(folder, tmp_path / "out")})
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []


def test_results_without_runs_are_refused(folder_of, tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        report(folder_of(results().iloc[:0]), tmp_path / "out")


def test_a_number_of_processes_is_needed(tmp_path):
    with pytest.raises(UserError, match="number of jobs to be a whole number from 1"):
        report(tmp_path, tmp_path / "out", jobs=0)


@pytest.mark.usefixtures("undrawn")
def test_a_broken_words_file_is_named_and_left_out(folder_of, tmp_path, caplog):
    frame = results(datasets=("objects", "digits"))
    folder = folder_of(frame)
    store_words(folder, frame)
    for key in frame.key[frame.dataset == "objects"]:
        path = folder / "nearest_words" / f"{key}.json"
        if path.exists():
            path.write_text('{"vectors": [{"position": 1}]}')
    report(folder, tmp_path / "out")
    assert f"Left out: {folder / 'nearest_words'}" in caplog.text
    assert "is damaged or of another version" in caplog.text
    assert "is damaged or of another version" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert {row["dataset"] for row in rows_of(tmp_path / "out" / "table4.csv")} == {"digits"}


@pytest.mark.usefixtures("undrawn")
def test_damaged_contexts_are_named_and_left_out(folder_of, tmp_path, caplog):
    kinds = {"backbone": "b", "shots": 16, "seed": 1, "accuracy": 50.0}
    frame = pd.DataFrame([run(**kinds, dataset=name, method="task_res") for name in ("objects", "digits")])
    folder = folder_of(frame)
    for key, size in zip(frame.key, (3, 5), strict=True):
        write_parameters(folder, key, Parameters(None, {"residual": np.zeros(size, np.float32)}))
    damaged = folder / "contexts" / f"{frame.key[0]}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report(folder, tmp_path / "out")
    assert caplog.text.count(f"Left out: {damaged} is damaged") == 1
    assert {
        row["text"] for row in rows_of(tmp_path / "out" / "field_fewshot.csv") if row["shots"] == "parameters"
    } == {"5"}


@pytest.mark.parametrize(
    "name", ["index.html", "claims.csv", "missing.txt", "figure3.png", "figure3-RN50.csv"]
)
@pytest.mark.usefixtures("undrawn")
def test_a_report_replaces_no_file_of_another_program(folder_of, tmp_path, name):
    folder, out = folder_of(results(datasets=("objects",), shots=(1, 16))), tmp_path / "site"
    out.mkdir()
    (out / name).write_text("my own")
    with pytest.raises(UserError, match=rf"{name} is already there and is not known as this command's own"):
        report(folder, out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "my own")]
    (out / name).rename(out / "table10_of_mine.csv")
    report(folder, out)
    assert (out / "table10_of_mine.csv").read_text() == "my own"
    report(folder, out)  # a folder of a report is written again


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_report_is_written_again(folder_of, tmp_path, monkeypatch):
    folder = folder_of(results(datasets=("objects",), shots=(1, 16)))
    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.reports.claims.texts_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            report(folder, tmp_path / "out")
    assert "figure3.csv" in {path.name for path in (tmp_path / "out").iterdir()}
    assert "figure3.csv" in {path.name for path in report(folder, tmp_path / "out")}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_datasets_and_targets_stand_in_the_grids_order(folder_of, tmp_path):
    found = [coop(backbone="b", dataset=name, source="objects", shots=16, seed=1, accuracy=50.0, test="t")
             for name in ("awesome", "sketch", "objects", "phosphor")]  # fmt: skip
    frame = pd.DataFrame(found)
    folder = folder_of(frame)
    for grid in (
        "datasets: objects\ntargets: {objects: [sketch, data/phosphor, awesome]}",
        "datasets: objects\nblocks: {a: {targets: {objects: [sketch, phosphor]}}, b: {targets: {objects: awesome}}}",
    ):
        (folder / "grid.yaml").write_text(grid)
        names = study_of(frame, folder).runs.dataset
        assert list(names) == ["objects", "sketch", "phosphor", "awesome"]


@pytest.mark.usefixtures("undrawn")
def test_a_results_folder_as_sweeps_write_it_is_read(tmp_path):
    from fastcoop.results.database import DATABASE
    from fastcoop.results.schema import create

    frame = results(datasets=("objects",), shots=(16,)).astype({"shots": object})
    folder = tmp_path / "results"
    folder.mkdir()
    db = sqlite3.connect(folder / DATABASE)
    create(db)
    for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
        trained, specific = row["method"] == "coop", row["class_specific"]
        row |= {"versions": '{"fastcoop": "9.9"}', "schedule": "paper" if trained else None}
        row["class_specific"] = None if specific is None else int(specific)
        db.execute(RUN, row)
        db.execute(SCORE, row)
    db.commit()
    db.close()
    report(folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "figure3.csv")
    assert len(rows) == 6  # zero-shot, linear probe, four of CoOp
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "fastcoop=9.9" in text
    assert "1 of 2 classes have no test images" in text
