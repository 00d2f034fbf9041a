"""A sweep of both schedules: trained together, resumed to the same bits, and drawn apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcoop.reports import report
from fastcoop.results import load_contexts, load_results
from fastcoop.sweeps import Summary, checkpoints
from tools import fast_trial

REPORTS = Path(__file__).parents[2] / "reports"
SHORT = {"context_length": 2, "class_position": "end"}


@pytest.fixture
def both(grid: dict[str, Any]) -> dict[str, Any]:
    del grid["methods"]
    blocks = {
        "paper": {"methods": {"coop": SHORT | {"epochs": 4}, "zero_shot": None}},
        "fast": {
            "methods": {"coop": SHORT | {"schedule": ["fast-half", {"steps": 5}], "pull": ["prompt", "none"]}}
        },
    }
    return grid | {"blocks": blocks}


@pytest.mark.usefixtures("undrawn")
def test_runs_of_both_schedules_are_swept_resumed_and_drawn(
    run: Callable[..., Summary], both: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run(both, results=tmp_path / "whole", dry_run=True)
    assert planned.forecast is not None
    assert {part.method: part.seconds is not None for part in planned.forecast.parts}["coop"]
    assert run(both, results=tmp_path / "whole").finished == 21
    table = load_results(tmp_path / "whole")
    coop = table[table.method == "coop"]
    names = ["fast-half", "fast-half, no pull", "fast: steps 5", "fast: steps 5, no pull"]
    assert sorted(set(coop.schedule)) == [*names, "quick: 4 epochs"]
    epochs = coop.groupby("schedule").epochs.agg(lambda steps: tuple(sorted(set(steps)))).to_dict()
    assert epochs == dict(zip([*names, "quick: 4 epochs"], [(8, 11), (8, 11), (5,), (5,), (4,)], strict=True))

    class Stop(BaseException):
        pass

    def stop(self: object, get_state: Callable[[], Any]) -> None:
        offers.append(1)
        offer(self, get_state)
        if len(offers) == 3:
            raise Stop

    offers: list[int] = []
    offer = checkpoints.CheckpointFile.offer
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints.CheckpointFile, "offer", stop)
    with pytest.raises(Stop):
        run(both, results=tmp_path / "stopped", only=["coop"])
    run(both, results=tmp_path / "stopped", only=["coop"])
    for key in coop.key:
        np.testing.assert_array_equal(
            load_contexts(tmp_path / "stopped", key), load_contexts(tmp_path / "whole", key)
        )

    report(tmp_path / "whole", tmp_path / "pages")
    drawn = {path.stem: path.read_text() for path in (tmp_path / "pages").glob("figure3-*.md")}
    assert len(drawn) == 5
    assert "fast-half schedule, no pull" in drawn["figure3-fast-half-no-pull"]
    assert "fast schedule: steps 5" in drawn["figure3-fast-steps-5"]
    assert "The runs have 5 schedules" in (tmp_path / "pages" / "index.html").read_text()


def test_the_comparison_refuses_two_sources_of_one_cell(tmp_path: Path) -> None:
    """Such as the CSV of a report on the fast schedule alone, which does not name it."""
    shipped = REPORTS / "demo" / "full" / "figure3-demo-resnet.csv"
    (tmp_path / shipped.name).write_text((REPORTS / "demo" / "figure3.csv").read_text())
    with pytest.raises(
        SystemExit, match=r"^Two sources have demo-resnet, .* by the schedule paper; name one"
    ):
        fast_trial.main([str(shipped), str(tmp_path / shipped.name)])
