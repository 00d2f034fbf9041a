"""Every way to be fooled that the report warns of, and silence where there is none."""

from __future__ import annotations

import json

import pandas as pd

from fastcoop.reports.cautions import cautions
from fastcoop.reports.study import study_of
from tests.reports.made_up_results import results


def warned(frame: pd.DataFrame) -> str:
    return "\n".join(cautions(study_of(frame, "results")))


def calm() -> pd.DataFrame:
    """Results with nothing to warn of: one dataset, gains far above their spread."""
    frame = results(datasets=("objects",), shots=(1, 16))
    return frame[~frame.class_specific.eq(True)].reset_index(drop=True)


def test_nothing_is_said_of_sound_results():
    assert warned(calm()) == ""


def test_a_diverged_run_is_named():
    frame = calm()
    frame.loc[frame.index[-1], "status"] = "diverged"
    assert "1 run diverged" in warned(frame)
    assert "CoOp (M=16, mid) on objects, 16 shots, seed 3" in warned(frame)


def test_a_collapsed_seed_is_named():
    frame = calm()
    frame.loc[frame.index[-1], "accuracy"] = 12.0
    assert "far below the other seeds" in warned(frame)
    assert "seed 3 (demo-resnet): 12.0%" in warned(frame)


def test_a_gain_within_its_spread_is_named():
    frame = calm()
    where = (frame.class_position == "end") & (frame.shots == 1)
    frame.loc[where, "accuracy"] = [49.0, 51.0, 50.5]
    assert "spread over seeds is larger than the gain" in warned(frame)
    assert "CoOp (M=16, end) on objects at 1 (+0.2 ± 1.0)" in warned(frame)


def test_classes_without_test_images_are_counted():
    frame = calm()
    frame["per_class"] = json.dumps([50.0, None, 40.0])
    assert "objects: 1 of 3 classes have no test images" in warned(frame)
    frame["per_class"] = "[50.0, NaN, NaN]"
    assert "2 of 3" in warned(frame)


def test_runs_that_figures_do_not_tell_apart_are_named():
    frame = calm()
    twin = frame[frame.index == frame.index[-1]].assign(key="other", settings='{"learning_rate": 0.1}')
    assert "differ in other settings only" in warned(pd.concat([frame, twin]))


def test_a_single_seed_and_a_short_schedule_are_said():
    frame = results(datasets=("objects",), seeds=(1,), schedule="quick: 5 epochs")
    assert "Only one seed" in warned(frame)
    assert "quick schedule: 5 epochs" in warned(frame)
