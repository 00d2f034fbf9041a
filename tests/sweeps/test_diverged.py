"""Runs that diverged to numbers that are none: they have no accuracy, and nothing is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from fastcoop.backbones import backbone_from_spec
from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.exchange import Classifier, export_run, find_run, make_classifier, predict
from fastcoop.methods import score
from fastcoop.methods.scores import NO_CLASS, accuracy
from fastcoop.reports import report
from fastcoop.results import confusion_matrix, load_predictions, load_results, merge_results, paired_test
from fastcoop.results.predictions import calibration_errors
from fastcoop.results.read import percent
from fastcoop.results.records import NO_CLASS as STORED_NO_CLASS
from fastcoop.sweeps import evaluate, interpret, sweep
from tests.advice import follows

FAR = {"epochs": 3, "learning_rate": 1e38}
GOOD = {"context_length": 2, "epochs": 3}


@pytest.fixture(scope="module")
def lost(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of runs that diverged, of every method that trains, and of one that did not."""
    results = tmp_path_factory.mktemp("lost") / "results"
    coop = GOOD | {"learning_rate": [0.002, 1e38]}
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "targets": {"colours": "shifted"}, "shots": 2,
        "seeds": [1, 2], "views": 1,
        "methods": [
            "zero_shot", {"coop": coop | {"val_accuracy": True}}, {"coop": coop | {"select": "best_val"}},
            {"text_bias": FAR}, {"text_transform": FAR}, {"finetune_image_encoder": FAR},
        ],
    }  # fmt: skip
    summary = sweep(grid, data_root=world / "data", cache=world / "cache", results=results, jobs=1)
    assert (summary.finished, summary.failed, summary.diverged) == (15, {}, 10)
    assert sweep(grid, data_root=world / "data", cache=world / "cache", results=results, jobs=1).finished == 0
    return results


def a_lost_run(folder: Path) -> str:
    table = load_results(folder)
    return str(table.key[(table.method == "coop") & table.accuracy.isna()].iloc[0])


def test_outputs_that_are_not_finite_have_no_accuracy(lost: Path) -> None:
    table = load_results(lost)
    nothing = table.accuracy.isna()
    assert set(table.method[nothing]) == {"coop", "text_bias", "text_transform", "finetune_image_encoder"}
    assert nothing.sum() == 2 * 8, "best_val keeps contexts from before"
    assert (table.macro_accuracy.isna() == nothing).all()
    assert np.isnan([*calibration_errors(lost).values()]).sum() == nothing.sum()
    assert set(table.status[nothing]) == {"diverged"}
    assert not any("val_accuracy" in json.loads(text) for text in table.extra[nothing])
    kept = (table.method == "coop") & ~nothing
    assert all("val_accuracy" in json.loads(text) for text in table.extra[kept])
    said = load_predictions(lost, a_lost_run(lost))
    assert (said.predicted == -1).all()
    assert np.isnan(said.confidence).all()
    for call in (lambda: confusion_matrix(said), lambda: paired_test(said, said)):
        with pytest.raises(UserError, match="predicted nothing"):
            call()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_are_scored_if_they_are_finite(value: float) -> None:
    logits = np.array([[2.0, 1.0, -np.inf], [0.0, 3.0, -np.inf]])
    assert score(logits, np.array([0, 1])).accuracy == 100, "-inf is a class of probability 0"
    logits[1, 0] = value
    found = score(logits, np.array([0, 1]))
    assert np.isnan([found.accuracy, found.macro_accuracy, *found.per_class, *found.confidence]).all()
    assert set(found.predictions) == {NO_CLASS} == {STORED_NO_CLASS}
    both = np.stack([logits, np.eye(3)[:2]])
    assert np.array_equal(accuracy(both, np.array([0, 1])), [np.nan, 100], equal_nan=True)
    assert np.isnan(score(np.full((1, 2), -np.inf), np.array([0])).accuracy)
    assert (percent(None), percent(float("nan")), percent(12.345)) == ("no accuracy", "no accuracy", "12.35%")


@pytest.mark.usefixtures("undrawn")
def test_reports_leave_them_out_and_count_them(lost: Path, tmp_path: Path) -> None:
    report(lost, tmp_path)
    table = load_results(lost)
    good = table[(table.method == "coop") & table.accuracy.notna() & (table.dataset == "colours")]
    figure = pd.read_csv(tmp_path / "figure3.csv")
    shown = figure[figure.method.str.startswith("CoOp") & ~figure.method.str.contains("select")]
    means = good[good.settings.str.contains('"last"')].accuracy.mean()
    assert shown["mean"].tolist() == [pytest.approx(means, rel=1e-5)]
    for path in tmp_path.iterdir():
        if path.suffix in (".csv", ".md", ".tex"):
            assert "nan" not in path.read_text(encoding="utf-8").lower().replace("finance", ""), path
    assert "8 diverged runs left out" in (tmp_path / "figure3.md").read_text(encoding="utf-8")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "nan%" not in page
    assert "16 tests of diverged runs without an accuracy" in page


@follows(
    "or its scale are not finite: the run diverged; choose another run",
    "is not finite and cannot be tested; choose other runs",
    "have no nearest words; choose other runs (--run)",
)
def test_nothing_is_made_of_them(lost: Path, world: Path, tmp_path: Path) -> None:
    backbone = backbone_from_spec(str(world / "tiny"))
    key = a_lost_run(lost)
    for call in (
        lambda: export_run(lost, key, "classifier", tmp_path / "c.safetensors", str(world / "tiny")),
        lambda: evaluate(
            lost,
            ["other"],
            runs=[key],
            data_root=world / "data",
            cache=tmp_path,
            backbones=[str(world / "tiny")],
        ),
        lambda: interpret(lost, backbone, runs=[key]),
    ):
        with pytest.raises(UserError, match="diverged"):
            call()
    assert not list(tmp_path.iterdir())
    assert len(interpret(lost, backbone)) == 6, "the others are read"
    table = load_results(lost)
    good_key = table.key[(table.method == "coop") & table.accuracy.notna()].iloc[0]
    assert len(interpret(lost, backbone, runs=[good_key])) == 1
    places = {"data_root": world / "data", "cache": world / "cache", "backbones": [str(world / "tiny")]}
    assert len(evaluate(lost, ["shifted"], runs=[good_key], **places)) == 1
    run = find_run(lost, good_key)
    with pytest.raises(UserError, match="diverged"):
        make_classifier(replace(run, contexts=np.full_like(run.contexts, np.nan)), backbone)
    good = make_classifier(run, backbone)
    good.save(tmp_path / "good.safetensors")
    arrays = load_file(tmp_path / "good.safetensors")
    arrays["text_features"][0, 0] = np.nan
    from safetensors import safe_open

    with safe_open(tmp_path / "good.safetensors", "np") as file:
        save_file(arrays, tmp_path / "bad.safetensors", file.metadata())
    with pytest.raises(UserError, match="not finite"):
        Classifier.load(tmp_path / "bad.safetensors")
    picture = world / "data" / "colours" / "test" / "green" / "0.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(backbone), "encode_images", lambda self, images: images.new_full((len(images), 16), np.nan)
        )
        (told,) = predict(good, backbone, [picture])
    assert told.probabilities is None
    assert "not finite" in str(told.problem)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A command that succeeds: what it prints, as JSON where it is asked for."""

    def command(*arguments: str | Path) -> Any:
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        said = capsys.readouterr()
        assert stopped.value.code in (None, 0), said.err
        assert "nan" not in said.out.lower()
        return json.loads(said.out, parse_constant=pytest.fail) if "--json" in arguments else said.out

    return command


def test_commands_print_them_as_none_and_json_stays_json(lost: Path, tmp_path: Path, call: Any) -> None:
    key = a_lost_run(lost)
    rows = call("results", "list", lost, "--where", "status=diverged", "--json")
    assert [row["accuracy"] for row in rows].count(None) == 16
    assert call("results", "list", lost)
    assert call("results", "show", lost, key, "--json")["tests"]["colours"]["accuracy"] is None
    assert "on colours: no accuracy" in call("results", "show", lost, key)
    assert call("results", "compare", lost, lost, "--json")
    call("results", "export", lost, tmp_path / "all.csv")
    exported = pd.read_csv(tmp_path / "all.csv")
    assert exported.accuracy.isna().sum() == 16
    assert merge_results([lost], tmp_path / "merged") == 15
    assert merge_results([lost], tmp_path / "merged") == 0, "what is not finite is no conflict with itself"
    call("report", lost, "--out", tmp_path / "report", "--json")
