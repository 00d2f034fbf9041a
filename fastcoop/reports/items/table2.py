"""Table 2: prompt engineering, prompt ensembling and CoOp on every backbone."""

from __future__ import annotations

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import (
    Missing,
    Study,
    in_shots,
    lost_note,
    main_runs,
    main_setting,
    most_shots,
    panels,
    schedule_note,
)
from fastcoop.reports.style import name_of
from fastcoop.reports.table import Cell, Table, cell_of

NAMES = {
    "zero_shot": "Prompt engineering",
    "ensemble": "Prompt ensembling",
    "ensemble all": "Prompt ensembling (80)",
    "coop end": "",
}


def make(study: Study) -> list[Part]:
    if not (study.runs.method == "ensemble").any():
        raise Missing("there is no run of ensemble; add the method to the grid")
    shots = most_shots(study.runs)
    schedules = list(dict.fromkeys(piece.schedule for piece in study.slices()))
    parts = []
    for schedule in schedules:
        slices = [
            piece
            for piece in study.slices()
            if piece.schedule == schedule and (piece.runs.method == "coop").any()
        ]
        found = {}
        for piece in slices:
            runs = main_runs(piece.runs)
            runs = runs[runs.series.isin(NAMES) & runs.shots.isin((0.0, shots))]
            found[piece.backbone] = panels(runs, ["series"])
        if not found:
            continue
        length, init = main_setting(slices[0].runs)
        title = ", ".join(
            filter(
                None,
                (f"Ensembling and CoOp at {in_shots(shots)}", schedule_note(schedule), lost_note(study.lost)),
            )
        )
        table = Table(title, ("dataset", "method"), tuple(found), "backbone")
        table.notes = [f"{backbone}: {note}" for backbone, (_, notes) in found.items() for note in notes]
        for dataset in dict.fromkeys(name for summaries, _ in found.values() for name in summaries):
            for series, name in NAMES.items():
                cells: dict[str, Cell | str] = {
                    b: cell_of(summaries[dataset], series=series)
                    for b, (summaries, _) in found.items()
                    if dataset in summaries
                }
                if not any(cells.values()):
                    continue
                name = name or name_of(series, length)
                table.add((dataset, name), cells)
                numbers = {
                    b: printed("table2", b, dataset, series.split()[0], length=length, init=init, shots=shots)
                    for b in found
                }
                if any(numbers.values()):
                    table.add(
                        (dataset, f"{name}, {AS_PRINTED}"), {b: number or "" for b, number in numbers.items()}
                    )
                    table.notes = list(dict.fromkeys([*table.notes, NOTE]))
        table.mark_best()
        suffix = "" if len(schedules) == 1 else "-paper" if schedule == "paper" else "-quick"
        parts.append(Part(suffix, schedule_note(schedule), None, table))
    return parts


ITEM = Item(
    "table2",
    "Table 2. Prompt engineering and ensembling",
    "One hand-written prompt, an ensemble of prompts, and CoOp.",
    make,
    sweep_of("table2"),
)
