"""Table 5: CoOp against other ways of fine-tuning on the same few images."""

from __future__ import annotations

from dataclasses import replace

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.paper import add_printed, printed
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import name_of
from fastcoop.reports.table import Cell, Cells, Table

OTHERS = ("finetune_image_encoder", "text_transform", "text_bias")
ORDER = ("zero_shot", "linear_probe", *OTHERS, "coop end")


def make(study: Study, piece: Slice) -> list[Exhibit]:
    if not piece.runs.method.isin(OTHERS).any():
        raise frames.Missing(f"there is no run of {', '.join(OTHERS)}; add one of these methods to the grid")
    runs = frames.main_runs(piece.runs)
    setting = frames.main_setting(runs)
    datasets = runs.dataset[runs.method.isin(OTHERS)].unique()
    runs = runs[runs.series.isin(ORDER) & runs.shots.isin((0.0, setting.shots)) & runs.dataset.isin(datasets)]
    found, notes = frames.panels(runs, ["series"])
    title = f"Ways of fine-tuning at {frames.in_shots(setting.shots)} ({piece.subtitle})"
    table = Table(title, ("dataset", "method"), ("accuracy", "Δ"), "number", notes=notes)
    for name, summary in found.items():
        zero = frames.cell_of(summary, series="zero_shot")
        for series in ORDER:
            if isinstance(cell := frames.cell_of(summary, series=series), Cell):
                cells: Cells = {"accuracy": cell}
                if isinstance(zero, Cell) and series != "zero_shot":
                    cells["Δ"] = replace(cell, mean=cell.mean - zero.mean, signed=True)
                table.add((name, piece.name_of(series, setting.length)), cells)
                number = printed("table5", piece.backbone, name, series, setting)
                add_printed(table, (name, name_of(series, setting.length)), {"accuracy": number})
    table.mark_best()
    table.notes.append("Δ: difference with zero-shot CLIP, in percentage points.")
    return [Exhibit(piece.suffix, piece.subtitle, None, table)]


ITEM = Item(
    "table5",
    "Table 5. Other ways of fine-tuning",
    "Other methods that learn from the same images.",
    per_slice(make),
    sweep_command("table5"),
)
