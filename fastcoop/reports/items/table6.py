"""Table 6: the datasets of the study."""

from __future__ import annotations

from fastcoop import escape
from fastcoop.reports.frames import Missing
from fastcoop.reports.item import Exhibit, Item
from fastcoop.reports.paper import AS_PRINTED, printed_dataset
from fastcoop.reports.study import Study
from fastcoop.reports.table import Table

COLUMNS = ("classes", "train", "val", "test", "prompt")


def make(study: Study) -> list[Exhibit]:
    used = [name for name in dict.fromkeys(study.runs.dataset) if name in study.known]
    if not used:
        raise Missing(
            "the results folder has no datasets.json, which newer sweeps write; run the sweep again"
        )
    table = Table("Datasets", ("dataset",), COLUMNS, "statistic", unit="")
    for name in used:
        table.add((name,), {column: _text(study.known[name].get(column)) for column in COLUMNS})
        if printed := printed_dataset(name):
            table.add((f"{name}, {AS_PRINTED}",), {column: printed[column] for column in COLUMNS})
    return [Exhibit("", "", None, table)]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value).replace("{}", "[CLASS]")


def _sweep_again(study: Study) -> str:
    grid = study.folder / "grid.yaml" if study.grid_text else "GRID.yaml"
    return escape.shell_command("fastcoop", "sweep", grid, "--results", study.folder, *study.sweep_options)


ITEM = Item(
    "table6",
    "Table 6. Datasets",
    "Classes, images per split and the hand-written prompt.",
    make,
    _sweep_again,
)
