"""What methods report while they run: the work of each run adds up to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastcoop.backbones import Backbone
from fastcoop.methods import METHODS, Data, RunContext
from tests.methods.conftest import job

SETTINGS: dict[str, dict[str, Any]] = {
    "coop": {"context_length": 2, "epochs": 4},
    "cocoop": {"epochs": 3, "batch_size": 2},
    "tcp": {"epochs": 4, "layer": 1, "batch_size": 4},
    "linear_probe": {},
    "task_res": {"epochs": 4},
    "lp_plus_plus": {"epochs": 4},
    "prolip": {"epochs": 4, "selection": "few_val"},
    "tip_adapter": {},
    "zero_shot": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_work_of_each_run_adds_up_to_one(backbone: Backbone, data: Data, name: str) -> None:
    jobs = [job(data, name, **SETTINGS[name])] if name == "zero_shot" else [
        job(data, name, seed=seed, **SETTINGS[name]) for seed in (1, 2)
    ]  # fmt: skip
    reported: list[float] = []
    METHODS[name].run(backbone, jobs, lambda index, outcome: None, RunContext(on_progress=reported.append))
    assert sum(reported) == pytest.approx(len(jobs))
    assert min(reported) > -1e-9
    if name in ("coop", "cocoop", "tcp", "task_res", "lp_plus_plus", "prolip"):
        assert len(reported) >= 2 * len(jobs), "and within a run, which may take long"


class Kept:
    """A checkpoint with the state after one step."""

    def __init__(self) -> None:
        self.state: Any = None

    def load(self) -> Any:
        return self.state

    def offer(self, get_state: Callable[[], Any]) -> None:
        if self.state is None:
            self.state = get_state()


def test_a_resumed_training_reports_what_is_done_already(backbone: Backbone, data: Data) -> None:
    checkpoint, before, since = Kept(), list[float](), list[float]()
    jobs = [job(data, "coop", context_length=2, epochs=epochs) for epochs in (1, 4)]
    context = RunContext(checkpoint=checkpoint, on_progress=since.append, on_resume=before.append)
    METHODS["coop"].run(backbone, jobs, lambda index, outcome: None, context)
    assert (before, sum(since)) == ([], pytest.approx(2))
    since.clear()
    METHODS["coop"].run(backbone, jobs, lambda index, outcome: None, context)
    assert before == [pytest.approx(2 * 2 / 5)], "a step of each of two runs with five in all"
    assert sum(before + since) == pytest.approx(2)
