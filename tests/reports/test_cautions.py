"""Every way to be fooled that the report warns of, and silence where there is none."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest

from fastcoop.errors import UserError
from fastcoop.reports.cautions import cautions
from fastcoop.reports.study import study_of
from tests.reports.made_up_results import results, run


def warned(frame: pd.DataFrame) -> str:
    return "\n".join(one.text for one in cautions(study_of(frame, "results")))


def calm() -> pd.DataFrame:
    """Results with nothing to warn of: one dataset, gains far above their spread."""
    frame = results(datasets=("objects",), shots=(1, 16))
    return frame[~frame.class_specific.eq(True)].reset_index(drop=True)


def test_nothing_is_said_of_sound_results():
    assert warned(calm()) == ""


def test_a_diverged_run_is_named():
    frame = calm()
    frame.loc[frame.index[-1], "status"] = "diverged"
    assert "1 diverged run" in warned(frame)
    assert "CoOp (M=16, mid) on objects at 16 shots, seed 3" in warned(frame)


def test_a_collapsed_seed_is_named():
    frame = calm()
    frame.loc[frame.index[-1], "accuracy"] = 12.0
    assert "far below the other seeds" in warned(frame)
    assert "seed 3 (demo-resnet): 12.0%" in warned(frame)


def test_a_gain_within_its_spread_is_named():
    frame = calm()
    where = (frame.class_position == "end") & (frame.shots == 1)
    frame.loc[where, "accuracy"] = [49.0, 51.0, 50.5]
    assert "deviation over seeds exceeds the gain" in warned(frame)
    assert "CoOp (M=16, end) on objects at 1 shot (+0.2 ± 1.0)" in warned(frame)


def test_classes_without_test_images_are_counted():
    frame = calm()
    frame["per_class"] = json.dumps([50.0, None, 40.0])
    assert "objects: 1 of 3 classes have no test images" in warned(frame)
    frame["per_class"] = "[50.0, NaN, NaN]"
    assert "2 of 3" in warned(frame)


def test_runs_that_differ_in_a_setting_are_series_of_their_own():
    frame = calm()
    twin = frame[frame.index == frame.index[-1]].assign(
        key="other", settings='{"views": 8, "learning_rate": 0.1}'
    )
    series, before = (
        study_of(runs, "results").runs.set_index("key").series for runs in (pd.concat([frame, twin]), frame)
    )
    assert series["other"] == "coop mid (learning_rate 0.1)"
    assert series.drop("other").to_dict() == before.to_dict()
    everywhere = frame.assign(
        settings=frame.settings.where(frame.shots != 1, '{"views": 8, "learning_rate": 0.1}')
    )
    assert not study_of(everywhere, "results").runs.series.str.contains("learning_rate").any(), (
        "runs that nothing is averaged with keep their series"
    )


def test_of_the_same_run_done_twice_the_last_counts():
    frame = calm()
    twin = frame[frame.index == frame.index[-1]].assign(key="other", accuracy=60.0)
    study = study_of(pd.concat([frame, twin]), "results")
    assert (len(study.runs), study.runs.set_index("key").accuracy["other"]) == (len(frame), 60.0)
    assert "Left out: 1 run repeated later" in warned(pd.concat([frame, twin]))


def test_runs_without_an_accuracy_are_left_out_and_counted_at_every_figure():
    frame = calm()
    frame.loc[frame.index[-1], ["accuracy", "status"]] = [float("nan"), "diverged"]
    study = study_of(frame, "results")
    assert (len(study.runs), len(study.diverged)) == (len(frame) - 1, 1)
    assert all("1 diverged run left out" in piece.subtitle for piece in study.slices())
    assert "1 test of diverged runs without an accuracy" in warned(frame)
    assert "nan" not in warned(frame)
    with pytest.raises(UserError, match=r"All .* runs .* diverged"):
        study_of(frame.assign(accuracy=float("nan")), "results")


def test_a_single_seed_and_a_short_schedule_are_said():
    frame = results(datasets=("objects",), seeds=(1,), schedule="quick: 5 epochs")
    assert "Only one seed" in warned(frame)
    assert "quick schedule: 5 epochs" in warned(frame)


def test_no_better_than_guessing_is_named():
    frame = calm()
    frame.loc[0, ["accuracy", "chance"]] = [9.9, 10.0]
    assert "1 run not better than chance: Zero-shot CLIP on objects" in warned(frame)


def test_a_run_with_several_tests_is_counted_once():
    frame = calm()
    frame.loc[frame.index[-1], ["accuracy", "status"]] = [9.0, "diverged"]
    away = frame.iloc[-1:].assign(dataset="sketch")  # of the same run
    text = warned(pd.concat([frame, away], ignore_index=True))
    assert "The means include 1 diverged run (a loss was not finite): " in text
    assert "1 run not better than chance: " in text
    assert text.count("on sketch at 16 shots, seed 3") >= 2


def test_a_dataset_that_is_not_the_same_for_all_runs_is_named():
    frame = calm()
    frame["test"] = [8 * "a"] * (len(frame) - 2) + [8 * "b"] * 2
    text = "objects is the name of 2 different sets of classes, images or splits, which are shown separately"
    assert text in warned(frame)
    names = study_of(frame, "results").runs.set_index("key").dataset
    assert names[frame.key].tolist() == ["objects (aaaaaaaa)"] * (len(frame) - 2) + ["objects"] * 2


def test_seeds_of_different_epochs_at_one_point_of_a_curve_are_named():
    frame = calm()
    assert frame.method.iloc[-1] == "coop"
    frame.loc[frame.index[-1], "epochs"] = 50
    assert "different numbers of epochs" in warned(frame)
    assert "CoOp (M=16, mid) on objects at 16 shots: 50 and 200" in warned(frame)


@pytest.mark.parametrize("column", ["dataset", "shots"])
def test_settings_that_differ_within_a_curve_are_said(column):
    frame = results(datasets=("objects", "digits"), shots=(1, 16))
    assert "different settings" not in warned(frame)
    where = (
        (frame.method == "coop") & (frame[column] == frame[column].iloc[-1]) & (frame.class_position == "end")
    )
    frame.loc[where, "settings"] = json.dumps({"views": 8, "learning_rate": 0.1})
    text = warned(frame)
    assert "One name has different settings on other datasets or at other shots: " in text
    assert "CoOp (M=16, end) (learning_rate default and 0.1); CoOp (M=16, end, CSC)" in text


def test_fewer_training_images_than_shots_are_said():
    frame = calm()
    frame["per_class"] = json.dumps([50.0, 40.0])
    frame["train_images"] = 2 * frame.shots
    assert warned(frame) == ""
    frame.loc[frame.shots == 16, "train_images"] = 30
    assert "Some classes have fewer training images than requested at 16 shots: objects." in warned(frame)


def test_datasets_with_too_few_images_share_a_warning(tmp_path):
    frame = results(datasets=("objects", "digits"), shots=(1, 16))
    frame["per_class"] = json.dumps([50.0, 40.0])
    frame["train_images"] = 1
    short = "classes with too few images at 1 shot, 16 shots"
    (found,) = [one for one in cautions(study_of(frame, tmp_path)) if one.short == short]
    assert list(found.datasets) == ["objects", "digits"]


def test_a_zero_shot_run_is_named_without_shots_and_seed(tmp_path):
    frame = results()
    frame.loc[frame.method == "zero_shot", "chance"] = 100.0
    text = warned(frame)
    assert "not better than chance: Zero-shot CLIP on " in text
    assert "0 shots" not in text
    assert "seed 0" not in text


def test_seeds_that_share_all_their_images_are_said(tmp_path):
    (tmp_path / "datasets.json").write_text('{"objects": {"train": 160}}')
    frame = calm()
    frame["train_images"] = 10 * frame.shots.where(frame.shots > 0)
    ((found, _, _),) = cautions(study_of(frame, tmp_path))
    assert found.startswith(
        "All seeds train on the same images, because there are no others: objects at 16 shots."
    )
    (tmp_path / "datasets.json").write_text('{"objects": {"train": 161}}')
    assert not list(cautions(study_of(frame, tmp_path)))


def test_two_schedules_are_said_to_be_judged_apart():
    frame = pd.concat([calm(), results(datasets=("objects",), schedule="quick: 5 epochs")])
    assert "The runs have 2 schedules" in warned(frame.drop_duplicates("key"))


def test_failed_runs_are_named_with_their_error():
    study = study_of(calm(), "results")
    row = {
        "label": "CoOp (M=16, end)",
        "dataset": "objects",
        "shots": 16,
        "seed": 2,
        "error": "out of memory",
    }
    text = "\n".join(one.text for one in cautions(dataclasses.replace(study, failed=pd.DataFrame([row]))))
    assert (
        text
        == "Left out, because it failed: CoOp (M=16, end) on objects at 16 shots, seed 2 (out of memory)."
    )


LATER = ("select", "val_every", "val_accuracy", "pull", "precision")


def with_settings(frame: pd.DataFrame, of_last_seed: dict, **columns: object) -> pd.DataFrame:
    """CoOp's runs with all settings as they are recorded, but those of the last seed with others."""
    trained = frame.method == "coop"
    last = trained & (frame.seed == 3)
    usual = {
        "learning_rate": 0.002,
        "select": "last",
        "val_every": None,
        "pull": None,
        "precision": "float32",
    }
    frame = frame.assign(settings=frame.settings.where(~trained, json.dumps(usual)), **columns)
    changed = {name: value for name, value in (usual | of_last_seed).items() if value != "missing"}
    return frame.assign(settings=frame.settings.where(~last, json.dumps(changed)))


@pytest.mark.parametrize(
    "of_last_seed",
    [{"schedule": "fast", "pull": "prompt"}, dict.fromkeys(LATER, "missing"), {"val_accuracy": True}],
    ids=["a default that is written out", "results from before a setting", "a number more"],
)
def test_runs_whose_settings_mean_the_same_are_one_curve(of_last_seed):
    frame = with_settings(calm(), of_last_seed)
    if "schedule" in of_last_seed:
        frame["schedule"] = frame.schedule.where(frame.method != "coop", "fast")
        frame["settings"] = frame.settings.map(
            lambda text: json.dumps({"schedule": "fast"} | json.loads(text))
        )
    study = study_of(frame, "results")
    plain = study_of(calm(), "results").runs.series.unique()
    assert study.runs.series.unique().tolist() == plain.tolist()
    assert "different settings" not in "\n".join(one.text for one in cautions(study))


def test_the_papers_epochs_given_as_a_number_are_the_papers_schedule():
    frame = calm()
    last = (frame.method == "coop") & (frame.seed == 3)
    frame["epochs"] = frame.epochs.where(frame.shots != 1, 50.0)
    given = frame.epochs.map("quick: {:.0f} epochs".format)
    study = study_of(
        frame.assign(schedule=frame.schedule.where(~last | (frame.shots == 1), given)), "results"
    )
    assert [piece.schedule for piece in study.slices()] == ["paper"]
    other = frame.assign(epochs=frame.epochs.where(~last, 30.0))
    other["schedule"] = other.schedule.where(~last, "quick: 30 epochs")
    assert len(study_of(other, "results").slices()) == 2


def test_a_setting_without_a_column_is_no_other_seed():
    """Runs of tip_adapter_f have no column of their epochs, nor cross_modal one of how it starts."""
    rows = [
        run(backbone="b", dataset="objects", method=method, shots=16, seed=seed, accuracy=50.0 + accuracy,
            schedule=None, settings=json.dumps({name: value}))
        for method, name, values in (
            ("tip_adapter_f", "epochs", (20, 50)), ("cross_modal", "init", ("zero_shot", "random")),
        )
        for accuracy, value in enumerate(values) for seed in (1, 2)
    ]  # fmt: skip
    study = study_of(pd.DataFrame(rows), "results")
    assert len(study.runs) == 8
    assert study.runs.series.nunique() == 4
