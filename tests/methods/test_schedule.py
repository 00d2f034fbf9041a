"""Schedules in steps, by shots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcoop.errors import UserError
from fastcoop.methods import expand, get_method
from fastcoop.methods.schedule import epochs_of


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


@pytest.mark.parametrize("wrong", [{1: "paper"}, {1: "many"}, "0 steps", {1: 0}])
def test_other_words_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="epochs"):
        expand(get_method("coop"), {"epochs": wrong})
