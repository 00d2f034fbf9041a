"""Every grid file that comes with the project is one, and those of the paper's items share their runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fastcoop.grids import read_grid

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
ITEMS = ["fig1", "fig3", "fig4", "fig5a", "fig5b", "table1", "table2", "table3", "table4", "table5"]


def runs(item: str) -> set[tuple]:
    """(backbone, dataset, method, settings, shots, seed) of every run of a grid."""
    grid = read_grid(FOLDER / f"{item}.yaml")
    return {
        (run.backbone, run.dataset, run.method, run.settings.model_dump_json(), run.shots, run.seed)
        for run in grid.runs()
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_reads(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # One number for all of the paper's items, or they would not share runs.
    assert path.stem.startswith("field_") or read_grid(path).views in (0, 8)
    assert path.read_text().startswith("# ")
    assert not caplog.records
    again = read_grid(yaml.safe_load(yaml.safe_dump(dict(read_grid(path).source))))
    assert {str(run) for run in again.runs()} == {str(run) for run in read_grid(path).runs()}


@pytest.mark.parametrize("item", [*ITEMS, "base_to_new", "cross_dataset"])
def test_the_full_demo_asks_for_every_item(item: str) -> None:
    """With the same settings, but for what the demo's world has its own of: prompts, and a tuned learning rate."""

    def asked(name: str) -> set[tuple]:
        return {(method, own_aside(settings), shots) for _, _, method, settings, shots, _ in runs(name)}

    def own_aside(settings: str) -> str:
        return str({k: v for k, v in json.loads(settings).items() if k not in ("prompt", "learning_rate")})

    assert asked(item) <= asked("demo-full")


def test_there_is_one_for_every_item() -> None:
    assert {*ITEMS, "base_to_new", "cross_dataset", "demo"} <= {path.stem for path in FOLDER.glob("*.yaml")}


def test_items_share_their_runs() -> None:
    assert runs("fig4") < runs("fig3")
    assert {run for run in runs("table3") if '"random"' in run[3]} < runs("fig5a")
    assert {run for run in runs("fig5a") if '"context_length":16' in run[3]} < runs("fig3")
    assert {run for run in runs("fig5b") if run[0] == "RN50"} == runs("fig4")
    assert {run for run in runs("table4") if '"context_length":16' in run[3]} < runs("fig3")
    assert {run for run in runs("table2") if run[2] != "ensemble"} < runs("fig5b")
    assert {run for run in runs("table1") if run[2] == "zero_shot"} < runs("table2")
    assert {run for run in runs("cross_dataset") if run[2] == "coop"} < runs("table1")


def test_each_of_the_fields_methods_is_tested_under_domain_shift() -> None:
    assert {run[2] for run in runs("field_fewshot")} == {run[2] for run in runs("field_transfer")}
