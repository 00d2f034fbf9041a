"""What a results table means: which prompt is a dataset's own, which runs are of halves, shifts and transfers."""

from __future__ import annotations

import json

import pandas as pd

from fastcoop.reports.frames import own_prompt
from fastcoop.reports.items.table1 import shifted
from fastcoop.reports.study import study_of
from tests.reports.made_up_results import coop, results, run


def prompted(*prompts: str | None) -> pd.DataFrame:
    rows = []
    for i, prompt in enumerate(prompts):
        settings = json.dumps({"prompt": prompt})
        rows.append(run(backbone="b", dataset="pets", method="zero_shot", shots=0, seed=0, accuracy=50.0 + i,
                        settings=settings))  # fmt: skip
    return pd.DataFrame(rows)


def test_the_own_prompt_written_out_in_a_grid_is_still_the_own_one(tmp_path):
    (tmp_path / "datasets.json").write_text('{"pets": {"prompt": "a [CLASS], a pet."}}')
    frame = prompted("a {}.", "a {}, a pet.", "the {}.")
    assert own_prompt(study_of(frame, tmp_path).runs).accuracy.tolist() == [51.0]


def test_without_the_own_prompt_the_first_stands_and_none_are_averaged(tmp_path):
    assert own_prompt(study_of(prompted("a {}.", "the {}."), tmp_path).runs).accuracy.tolist() == [50.0]


def test_of_equally_many_runs_the_default_settings_keep_the_plain_name(tmp_path):
    common = {"backbone": "b", "dataset": "pets", "shots": 16}
    rows = [
        coop(
            **common, seed=seed, accuracy=accuracy, label=label, settings=json.dumps({"precision": precision})
        )
        for precision, label, accuracy in (
            ("bfloat16", "CoOp (M=16, bfloat16)", 1.0),
            ("float32", "CoOp (M=16)", 2.0),
        )
        for seed in (1, 2)
    ]
    runs = study_of(pd.DataFrame(rows), tmp_path).runs
    assert set(runs.series[runs.accuracy == 2.0]) == {"coop end"}
    assert set(runs.series[runs.accuracy == 1.0]) == {"coop end (precision bfloat16)"}


def test_halves_of_the_classes_are_no_datasets_of_their_own(tmp_path):
    halves = [
        coop(
            backbone="demo-resnet",
            dataset=f"objects:{half}",
            source="objects:base",
            shots=16,
            seed=1,
            accuracy=60.0,
        )
        for half in ("base", "new")
    ]
    frame = pd.concat([results(datasets=("objects",)), pd.DataFrame(halves)], ignore_index=True)
    study = study_of(frame, tmp_path)
    assert set(study.slices()[0].runs.dataset) == {"objects"}
    assert study.runs.classes.tolist()[-2:] == ["base", "new"]


def test_datasets_of_other_classes_are_no_shift(tmp_path):
    common = {"backbone": "demo-resnet", "source": "objects", "shots": 16, "seed": 1, "accuracy": 40.0}
    moved = pd.DataFrame([coop(**common, dataset="sketch"), coop(**common, dataset="weather")])
    names = {
        "objects": ["Cat", "barn_owl", "owl"],
        "sketch": ["cat", "barn owl", "barn"],
        "weather": ["rain", "snow"],
    }
    frame = pd.concat([results(datasets=("objects",)), moved], ignore_index=True)
    study = study_of(frame, tmp_path, names)
    assert study.runs.kind.tolist()[-2:] == ["shift", "transfer"]
    ((targets, runs),) = shifted(study.slices()[0]).values()
    assert targets == ["sketch"]
    assert "weather" not in set(runs.dataset)


def test_a_setting_without_effect_in_another_schedule_is_in_no_name_there(tmp_path):
    common, rows = {"backbone": "b", "dataset": "pets", "shots": 16, "accuracy": 60.0}, []
    for seed in (1, 2, 3):
        settings = json.dumps({"learning_rate": 0.05, "schedule": "paper"})
        rows.append(coop(**common, seed=seed, settings=settings))
    for select in ("last", "best_val"):
        settings = json.dumps({"learning_rate": 0.002, "schedule": "fast", "select": select})
        rows.append(coop(**common, seed=1, settings=settings, schedule="fast"))
    runs = study_of(pd.DataFrame(rows), tmp_path).runs
    assert set(runs.series[runs.schedule == "fast"]) == {"coop end", "coop end (select best_val)"}
