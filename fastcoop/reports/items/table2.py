"""Table 2: prompt engineering, prompt ensembling and CoOp on every backbone."""

from __future__ import annotations

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, sweep_command
from fastcoop.reports.paper import add_printed, printed
from fastcoop.reports.study import Study, across_backbones, diverged_note, joined, lacking_note, schedule_note
from fastcoop.reports.style import name_of
from fastcoop.reports.table import Table

NAMES = {
    "zero_shot": "Prompt engineering",
    "ensemble": "Prompt ensembling",
    "ensemble all": "Prompt ensembling (80)",
    "coop end": "",
}


def make(study: Study) -> list[Exhibit]:
    if not (study.runs.method == "ensemble").any():
        raise frames.Missing("there is no run of ensemble; add the method to the grid")
    shots = frames.main_setting(study.runs).shots
    of_schedules = across_backbones(study, shots)
    if not of_schedules:
        raise frames.Missing(
            f"there is no run of CoOp on all classes of a dataset at {frames.in_shots(shots)}"
        )
    exhibits = []
    for schedule, (suffix, runs) in of_schedules.items():
        setting = frames.main_setting(next(iter(runs.values())))._replace(shots=shots)
        runs = {backbone: own[own.series.isin(NAMES)] for backbone, own in runs.items()}
        found = {backbone: frames.panels(own, ["series"]) for backbone, own in runs.items()}
        notes = schedule_note(schedule), diverged_note(study.diverged)
        title = joined(f"Ensembling and CoOp at {frames.in_shots(shots)}", *notes)
        table = Table(title, ("dataset", "method"), tuple(found), "backbone")
        table.notes = [f"{backbone}: {note}" for backbone, (_, notes) in found.items() for note in notes]
        table.notes += lacking_note(study, schedule, found)
        averaged = {one: frames.averaged_datasets(own, ["series"]) for one, own in runs.items()}
        if len(set(map(frozenset, averaged.values()))) > 1:
            each = "; ".join(f"{one}: {', '.join(names) or 'none'}" for one, names in averaged.items())
            table.notes.append(f"The averages of the backbones are over different datasets ({each}).")
        for dataset in dict.fromkeys(name for summaries, _ in found.values() for name in summaries):
            for series, name in NAMES.items():
                cells = {
                    backbone: frames.cell_of(summaries[dataset], series=series)
                    for backbone, (summaries, _) in found.items()
                    if dataset in summaries
                }
                if any(cells.values()):
                    names = (dataset, name or name_of(series, setting.length))
                    table.add(names, cells)
                    numbers = {one: printed("table2", one, dataset, series, setting) for one in found}
                    add_printed(table, names, numbers)
        table.mark_best()
        exhibits.append(Exhibit(suffix, schedule_note(schedule), None, table))
    return exhibits


ITEM = Item(
    "table2",
    "Table 2. Prompt engineering and ensembling",
    "One hand-written prompt, an ensemble of prompts, and CoOp.",
    make,
    sweep_command("table2"),
)
