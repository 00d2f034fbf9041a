"""Schedules in steps, by shots."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcoop.errors import UserError
from fastcoop.methods import expand, get_method
from fastcoop.methods.schedule import epochs_of, paper_epochs, steps_of
from tests.methods.conftest import job, make_data


def epochs(schedule: Any, shots: int, images: int) -> int:
    (settings,) = expand(get_method("coop"), {"epochs": schedule})
    data = SimpleNamespace(readable=lambda split, rows: rows)
    job: Any = SimpleNamespace(
        settings=settings, shots=shots, data=data, subset=SimpleNamespace(train=np.arange(images))
    )
    return epochs_of(job)


def test_steps_may_differ_by_shots() -> None:
    schedule = {1: "40 steps", 16: "200 steps", "all": 7}
    assert epochs(schedule, 1, 22) == 40  # one batch an epoch
    assert epochs(schedule, 16, 16 * 22) == round(200 / 11)
    with pytest.raises(UserError, match="not for 4; add them"):
        epochs(schedule, 4, 88)


def test_such_a_schedule_is_named_on_what_is_drawn() -> None:
    (settings,) = expand(get_method("coop"), {"epochs": {1: "40 steps", 16: "200 steps"}})
    assert settings.schedule_label == "quick: 40/200 steps at 1/16 shots"


@pytest.mark.parametrize("wrong", [{1: "paper"}, {1: "many"}, "0 steps", {1: 0}, {True: 5}, {1: True}])
def test_other_words_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="epochs"):
        expand(get_method("coop"), {"epochs": wrong})


def test_the_papers_epochs_are_those_of_the_next_shots() -> None:
    shots = (1, 2, 3, 4, 5, 8, 16, 20, "all")
    assert [paper_epochs("dtd", one) for one in shots] == [50, 100, 100, 100, 200, 200, 200, 200, 200]
    assert {paper_epochs(name, one) for name in ("imagenet", "imagenet:base") for one in shots} == {50}
    names, others = ("dtd", "imagenet:base", "sun397:new"), ("kgcoop", "prograd", "cocoop", "tcp")
    official = {one: [get_method(one).Settings().paper_epochs(name, 16) for name in names] for one in others}
    hundred = [100] * 3
    assert official == {"kgcoop": hundred, "prograd": hundred, "cocoop": [10] * 3, "tcp": [50, 25, 25]}


def test_the_steps_of_a_run_are_those_that_it_has_still_to_do() -> None:
    data = make_data(tuple(f"class {number}" for number in range(40)))
    paper, fast = (job(data, "coop", 4, **given) for given in ({}, {"schedule": "fast"}))
    assert (steps_of(paper), steps_of(fast)) == (100 * 5, 30)  # 160 images are five batches, or one
    assert steps_of(replace(paper, weights={})) == 0
    assert steps_of(job(data, "zero_shot")) == 0
