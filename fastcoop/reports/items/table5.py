"""Table 5: CoOp against other ways of fine-tuning on the same few images."""

from __future__ import annotations

from dataclasses import replace

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    in_shots,
    main_runs,
    main_setting,
    most_shots,
    panels,
    per_slice,
)
from fastcoop.reports.style import name_of
from fastcoop.reports.table import Cell, Table, cell_of

OTHERS = ("finetune_image_encoder", "text_transform", "text_bias")
ORDER = ("zero_shot", "linear_probe", *OTHERS, "coop end")


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def _parts(piece: Slice) -> list[Part]:
    if not piece.runs.method.isin(OTHERS).any():
        raise Missing(f"there is no run of {', '.join(OTHERS)}; add one of these methods to the grid")
    runs = main_runs(piece.runs)
    shots = most_shots(runs)
    length, init = main_setting(runs)
    having = runs.dataset[runs.method.isin(OTHERS)].unique()
    runs = runs[runs.series.isin(ORDER) & runs.shots.isin((0.0, shots)) & runs.dataset.isin(having)]
    found, notes = panels(runs, ["series"])
    title = f"Ways of fine-tuning at {in_shots(shots)} ({piece.subtitle})"
    table = Table(title, ("dataset", "method"), ("accuracy", "Δ"), "number", notes=notes)
    for name, summary in found.items():
        zero = cell_of(summary, series="zero_shot")
        for series in ORDER:
            cell = cell_of(summary, series=series)
            if not isinstance(cell, Cell):
                continue
            cells: dict[str, Cell | str] = {"accuracy": cell}
            if isinstance(zero, Cell) and series != "zero_shot":
                cells["Δ"] = replace(cell, mean=cell.mean - zero.mean, signed=True)
            table.add((name, piece.name_of(series, length)), cells)
            number = printed(
                "table5", piece.backbone, name, series.split()[0], length=length, init=init, shots=shots
            )
            if number:
                table.add((name, f"{name_of(series, length)}, {AS_PRINTED}"), {"accuracy": number})
                table.notes = list(dict.fromkeys([*table.notes, NOTE]))
    table.mark_best()
    table.notes.append("Δ: difference with zero-shot CLIP, in percentage points.")
    return [Part(piece.suffix, piece.subtitle, None, table)]


ITEM = Item(
    "table5",
    "Table 5. Other ways of fine-tuning",
    "What else one could learn from the same images, and what it brings.",
    make,
    sweep_of("table5"),
)
