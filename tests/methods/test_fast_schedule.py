"""``schedule`` and ``pull`` of coop: steps, names, keys, and the numbers of the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcoop.engine import FastSchedule, PullToPrompt, train
from fastcoop.errors import UserError
from fastcoop.methods import get_method
from fastcoop.methods.estimators import CoOpClassifier
from fastcoop.methods.schedule import epochs_of
from fastcoop.methods.text import class_texts
from fastcoop.reports.study import schedule_note
from tests.methods.conftest import job, run
from tests.methods.test_settings import key


@pytest.mark.parametrize(
    ("schedule", "shots", "steps"),
    [
        ("fast", 1, 15),
        ("fast", 4, 30),
        ("fast-half", 4, 16),
        ("fast", "all", 37),  # 6 images of each class
        ("fast", 8, 42),
        ({"steps": "0.1 sqrt(shots)"}, 1, 1),
        ({"steps": 7}, 4, 7),
        ({"steps": "2.5 sqrt(shots)"}, 2, 4),
    ],
)
def test_steps_grow_with_the_root_of_the_shots(data, schedule, shots, steps):
    assert epochs_of(job(data, "coop", shots, schedule=schedule)) == steps


@pytest.mark.parametrize(
    ("settings", "name", "note"),
    [
        ({"schedule": "fast"}, "fast", "fast schedule"),
        ({"schedule": {"steps": "8 sqrt(shots)"}}, "fast-half", "fast-half schedule"),
        ({"schedule": "fast", "pull": "none"}, "fast, no pull", "fast schedule, no pull"),
        (
            {"schedule": {"steps": 9, "ridge": 0.1}},
            "fast: steps 9, ridge 0.1",
            "fast schedule: steps 9, ridge 0.1",
        ),
    ],
)
def test_labels_columns_and_figures_name_the_schedule(data, backbone, settings, name, note):
    one, method = job(data, "coop", **settings), get_method("coop")
    assert method.label(one.settings) == f"CoOp (M=16, end, {name})"
    assert method.columns(one, backbone)["schedule"] == name
    assert schedule_note(name) == note


def test_keys_differ_in_what_matters_alone(data, backbone):
    fast = key("coop", data, backbone, {"schedule": "fast"})
    assert fast == key("coop", data, backbone, {"schedule": {}, "pull": "prompt"})
    assert fast == key("coop", data, backbone, {"schedule": {"steps": 21}})  # 15 sqrt(2)
    others = [{"steps": 20}, {"learning_rate": 0.005}, {"ridge": 0.1}]
    keys = {key("coop", data, backbone, {"schedule": one}) for one in (*others, "fast-half", "paper")}
    assert len(keys | {fast}) == 6
    other = replace(data, dataset=replace(data.dataset, template="the {}."))
    assert key("coop", other, backbone, {"schedule": "fast"}) != fast
    for settings in ({}, {"schedule": "fast", "pull": "none"}):
        assert key("coop", other, backbone, settings) == key("coop", data, backbone, settings)


@pytest.mark.parametrize("pull", ["prompt", "none"])
def test_a_run_learns_from_all_views_with_the_pull_over_its_shots(data, backbone, pull):
    one = job(data, "coop", 2, context_length=2, schedule={"steps": 5, "learning_rate": 0.01}, pull=pull)
    (outcome,) = run(backbone, "coop", [one])
    expected = get_method("coop").training(backbone, job(data, "coop", 2, context_length=2, epochs=5))
    expected = replace(expected, schedule=FastSchedule(0.01))
    assert expected.features.shape[:2] == (6, 3)
    if pull == "prompt":
        reference = torch.from_numpy(class_texts(backbone, data))
        expected = replace(expected, objective=PullToPrompt(reference, 2.0))
    (trained,) = train(backbone, [expected])
    np.testing.assert_array_equal(outcome.contexts, trained.contexts.numpy())
    assert outcome.losses is not None
    assert len(outcome.losses) == 5


def test_validation_chooses_among_steps(data, backbone):
    chosen = job(data, "coop", context_length=2, schedule={"steps": 6}, select="best_val", val_every=2)
    (outcome,) = run(backbone, "coop", [chosen])
    assert outcome.extra["epoch"] in (2, 4, 6)
    with pytest.raises(UserError, match="val_every of coop is 7, but a run has 6 epochs"):
        get_method("coop").check(job(data, "coop", schedule={"steps": 6}, select="best_val", val_every=7))


def test_the_estimator_is_the_run(data, backbone):
    settings = {"context_length": 2, "schedule": {"steps": 4}}
    features, labels = data.train(data.subset(2, 1))
    fitted = CoOpClassifier(backbone, seed=1, **settings).fit(features, labels, class_names=data.class_names)
    (outcome,) = run(backbone, "coop", [job(data, "coop", 2, **settings)])
    np.testing.assert_array_equal(fitted.contexts_, outcome.contexts)
    fast = CoOpClassifier(backbone, context_length=2, schedule="fast-half")
    assert len(fast.fit(features, labels, class_names=data.class_names).losses_) == 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "faster"}, "'paper', 'fast' or 'fast-half'"),
        ({"schedule": {"step": 3}}, 'Unknown setting "schedule.step"'),
        ({"schedule": {"steps": 0}}, "greater than or equal to 1"),
        ({"schedule": {"steps": "15 shots"}}, "15 sqrt"),
        ({"schedule": {"ridge": 0}}, "greater than or equal to 0.000001"),
        ({"schedule": "fast", "pull": "words"}, "'prompt' or 'none'"),
    ],
)
def test_settings_that_mean_nothing(data, settings, message):
    with pytest.raises(UserError, match=message):
        job(data, "coop", **settings)
