"""Table 1: contexts learned on a source dataset, tested on targets under domain shift."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from fastcoop import escape
from fastcoop.reports import field, frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.paper import add_printed, printed
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import name_of
from fastcoop.reports.table import Table

MEAN = "mean of targets"
SERIES = ("zero_shot", "linear_probe", "coop end")


def setting_of(runs: pd.DataFrame) -> frames.Setting:
    """Return `frames.main_setting`, or one that says nothing if there is no run of CoOp."""
    return frames.main_setting(runs) if (runs.method == "coop").any() else frames.Setting(0.0, "", 0.0)


def shifted(piece: Slice) -> dict[str, tuple[list[str], pd.DataFrame]]:
    """Return {source: (targets, runs)}: tests on the source and on its targets, at the most shots.

    The runs are the linear probe, unified CoOp with the class at the end for every context length that was tested on a
    target, zero-shot CLIP, and the field's methods. Datasets of other classes are not targets of a shift.
    """
    frame = piece.everything
    found = frames.tested_elsewhere(frame, frames.SHIFT)
    if not found:
        raise frames.Missing("no run was tested on another dataset than its own; give the grid `targets:`")
    init = setting_of(frame[(frame.classes == "all") & (frame.kind != frames.TRANSFER)]).init
    for source, (targets, runs) in found.items():
        runs = runs[runs.series.isin(SERIES) | runs.method.isin(field.FIELD)]
        found[source] = targets, runs[(runs.series != "coop end") | (runs.init == init)]
    return found


def make(study: Study, piece: Slice) -> list[Exhibit]:
    exhibits = []
    found = shifted(piece)
    names = escape.file_names(found)
    for source, (targets, runs) in found.items():
        setting = setting_of(piece.everything)._replace(shots=runs.shots.max())
        title = f"From {source} at {frames.in_shots(setting.shots)} to other datasets ({piece.subtitle})"
        columns = {source: f"{source} (source)", **{target: target for target in targets}}
        means, more = (MEAN,) * (len(targets) > 1), field.fact_columns(runs)
        table = Table(title, ("method",), (*columns.values(), *means, *more), "tested on")
        kinds = frames.kinds(runs)
        times = Counter((kind.series, kind.length) for kind in kinds)
        for kind in kinds:
            series, length, frame = kind.series, kind.length, kind.runs
            is_alone = times[series, length] == 1 and (not kind.has_others or series.startswith("coop"))
            name = piece.name_of(series, length) if is_alone else kind.name
            cells = frames.cells_of(frames.summarize(frame, ["dataset"]), "dataset", columns)
            cells |= {mean: frames.mean_cell(frame, targets) for mean in means}
            tests = frame[frame.dataset == source]
            table.add((name,), cells | (field.facts(study, tests) if more else {}))
            of_length = setting._replace(length=length)
            numbers = {
                column: printed("table1", piece.backbone, dataset, series, of_length)
                for dataset, column in columns.items()
            }
            add_printed(table, (name_of(series, length),), numbers)
        if more:
            table.notes += ["ECE is that of the source.", *field.NOTES]
            field.add_published(table, "shift", piece.backbone, columns)
        table.mark_best(group=(), second=bool(more))
        suffix = piece.suffix + (f"-{names[source]}" if len(found) > 1 else "")
        exhibits.append(Exhibit(suffix, piece.subtitle, None, table))
    return exhibits


ITEM = Item(
    "table1",
    "Table 1. Robustness to distribution shift",
    "Trained on the source only; tested on its test set and on the targets', with the targets' own class lists.",
    per_slice(make),
    sweep_command(
        "table1", lambda study: {"datasets": study.datasets[:1], "targets": {study.datasets[0]: ["TARGET"]}}
    ),
)
