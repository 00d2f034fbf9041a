"""Settings that are written differently but make the same run are the same where results are compared."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pandas as pd
import pytest

from fastcoop.errors import UserError
from fastcoop.methods import METHODS
from fastcoop.reports.comparison import compare_results
from fastcoop.results.records import DATASET_PROMPT
from fastcoop.results.settings import plain_settings
from fastcoop.results.tables import pair_folders, pair_labels, select_rows
from tests.reports.made_up_results import coop, run

LATER = ("prompt", "select", "val_every", "val_accuracy", "schedule", "pull", "precision")  # settings of CoOp


class Row(NamedTuple):
    """What is read of a row of a results table."""

    settings: str
    epochs: float = float("nan")
    schedule: str | None = None
    selection: str | None = None


def settings(method: str, **given: Any) -> str:
    return METHODS[method].Settings(**given).model_dump_json()


FAST = {"epochs": 60.0, "schedule": "fast"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            Row(settings("coop", schedule="fast"), **FAST),
            Row(settings("coop", schedule="fast", pull="prompt"), **FAST),
        ),
        (
            Row(settings("coop", schedule="fast"), **FAST),
            Row(settings("coop", schedule={"steps": "15 sqrt(shots)"}), **FAST),
        ),
        (
            Row(settings("coop"), epochs=200.0, schedule="paper"),
            Row(settings("coop", epochs=200), epochs=200.0, schedule="quick: 200 epochs"),
        ),
        (
            Row(settings("coop"), epochs=200.0, schedule="paper"),
            Row(settings("coop", val_accuracy=True), epochs=200.0, schedule="paper"),
        ),
        (Row(settings("linear_probe")), Row('{"iterations": 1000, "search_steps": 8}')),
    ],
    ids=[
        "pull",
        "schedule",
        "epochs",
        "recorded number",
        "before solver",
    ],
)
def test_defaults_that_are_written_out_or_not_recorded_are_the_same(one: Row, other: Row) -> None:
    assert plain_settings(one) == plain_settings(other)


def test_results_from_before_a_setting_existed_have_its_default() -> None:
    now = json.loads(settings("coop"))
    before = {name: value for name, value in now.items() if name not in LATER}
    trained = {"epochs": 200.0, "schedule": "paper"}
    assert plain_settings(Row(json.dumps(before), **trained)) == plain_settings(
        Row(json.dumps(now), **trained)
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (settings("coop", select="best_val"), settings("coop")),
        (settings("coop", precision="bfloat16"), settings("coop")),
        (settings("linear_probe", solver="converged"), settings("linear_probe")),
        (settings("tip_adapter", alpha=2.0), settings("tip_adapter")),
        (settings("gda", variant="base_to_new"), settings("gda")),
        (settings("tip_adapter_f", epochs=50), settings("tip_adapter_f")),
        (settings("cross_modal", init="random"), settings("cross_modal")),
        (json.dumps({DATASET_PROMPT: "a {}."}), json.dumps({DATASET_PROMPT: "the {}."})),
    ],
)
def test_what_makes_another_run_stays_another(one: str, other: str) -> None:
    assert plain_settings(Row(one)) != plain_settings(Row(other))


def table(**given: Any) -> pd.DataFrame:
    columns = {"backbone": "b", "dataset": "objects", "shots": 16, "label": "CoOp", "features": None}
    return pd.DataFrame([coop(**columns | given, seed=seed, accuracy=50.0 + seed) for seed in (1, 2, 3)])


def test_folders_of_two_versions_are_compared() -> None:
    before, now = (table(settings=text) for text in ('{"learning_rate": 0.002}', settings("coop")))
    now["settings"] = now.settings.map(lambda text: json.dumps(json.loads(text) | {"extra": None}))
    before["settings"] = json.dumps(
        {name: one for name, one in json.loads(settings("coop")).items() if name not in LATER}
    )
    assert len(pair_folders(before, now)) == 3
    assert len(pair_folders(before, now.assign(label="CoOp (learning_rate=0.002)"))) == 3, (
        "labels only name runs"
    )
    twice = pd.concat([now, now.assign(key="other", settings=before.settings)])
    assert len(pair_folders(twice, now)) == 3, "a run that was done twice is one run"


def test_labels_are_compared_where_a_run_was_done_twice() -> None:
    once = pd.concat([table(), table(label="other")])
    twice = once.assign(key="again", settings=json.dumps({"views": 8, "val_accuracy": True}))
    assert len(pair_labels(pd.concat([once, twice]), "CoOp", "other", "here")) == 3
    changed = twice.assign(settings=json.dumps({"views": 8, "learning_rate": 0.1}))
    with pytest.raises(UserError, match="differ in learning_rate"):
        pair_labels(pd.concat([once, changed]), "CoOp", "other", "here")


def test_runs_without_a_partner_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    first, second = table(), pd.concat([table(), table(dataset="digits")])
    assert len(pair_folders(first, first)) == 3
    assert not caplog.text
    assert len(pair_folders(first[first.seed != 1], second)) == 2
    assert "Left out: 0 of 2 tests of the first and 4 of 6 of the second, which the other" in caplog.text
    zero = table(label="zero", shots=0)[:1]
    assert len(pair_labels(pd.concat([zero, second]), "zero", "CoOp", "here")) == 3
    assert "Left out: 0 of 1 tests of the first and 3 of 6 of the second, which the other" in caplog.text


def test_diverged_runs_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    first, second = table(), table()
    second.loc[second.seed != 1, "status"] = "diverged"
    second.loc[second.seed == 3, "accuracy"] = None
    assert len(pair_folders(first, second)) == 2
    assert (
        "2 tests of diverged runs (a loss was not finite): 1 in the means, 1 left out, without" in caplog.text
    )
    caplog.clear()
    assert len(pair_folders(first, select_rows(second, ["status=done"]))) == 1
    assert "diverged" not in caplog.text


def test_a_method_of_ones_own_keeps_its_settings() -> None:
    own = Row(json.dumps({"schedule": "cosine", "pull": 2, "epochs": 3, "select": "first"}))
    assert plain_settings(own) == {"schedule": "cosine", "pull": 2, "epochs": 3, "select": "first"}
    assert run(method="own")["settings"]


def test_folders_are_compared_by_each_setting_of_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one label with two learning rates: two comparisons, not the mean of both."""
    slow, fast = (table(settings=json.dumps({"learning_rate": rate})) for rate in (0.002, 0.1))
    usual = table(dataset="digits", settings=json.dumps({"learning_rate": 0.002}))
    first = pd.concat([slow, fast, usual])
    second = pd.concat([slow.assign(accuracy=slow.accuracy + 4), fast.assign(accuracy=0.0), usual])
    folders = {"one": first, "other": second}
    monkeypatch.setattr("fastcoop.reports.comparison.load_results", folders.__getitem__)
    groups = {group["label"]: group for group in compare_results("one", "other")}
    assert {label: group["difference"] for label, group in groups.items()} == {
        "CoOp, learning_rate 0.002": 2.0,  # 4 on one dataset and 0 on the other
        "CoOp, learning_rate 0.1": -52.0,
    }
    assert [group["label"] for group in compare_results("one", "one", conditions=["dataset=digits"])] == [
        "CoOp"
    ]


def test_seeds_of_other_settings_are_not_compared_as_one() -> None:
    runs = pd.concat([table(), table(label="other")])
    runs.loc[(runs.label == "CoOp") & (runs.seed == 3), "settings"] = json.dumps(
        {"views": 8, "learning_rate": 0.1}
    )
    with pytest.raises(
        UserError, match=r"3 runs of CoOp on objects, 16 shots, differ in learning_rate \(0.1 and"
    ):
        pair_labels(runs, "other", "CoOp", "here")
