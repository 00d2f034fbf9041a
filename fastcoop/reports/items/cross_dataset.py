"""Cross-dataset transfer: contexts learned on a source, with the class names of other datasets."""

from __future__ import annotations

import pandas as pd

from fastcoop.reports import field, frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Table

SOURCE, MEAN = "on the source", "mean of targets"


def make(study: Study, piece: Slice) -> list[Exhibit]:
    found = frames.tested_elsewhere(piece.everything, frames.TRANSFER)
    if not found:
        raise frames.Missing("no run was tested on datasets of other classes than its own")
    everything = pd.concat([runs for _, runs in found.values()])
    targets = dict.fromkeys(name for targets, _ in found.values() for name in targets)
    title = f"From one dataset to others of other classes, {frames.in_shots(everything.shots.max())} ({piece.subtitle})"
    more = field.fact_columns(everything)
    table = Table(title, ("source", "method"), (SOURCE, *targets, MEAN, *more), "tested on")
    for source, (own, runs) in found.items():
        columns = {source: SOURCE} | {name: name for name in own}
        for kind in frames.kinds(runs):
            cells = frames.cells_of(frames.summarize(kind.runs, ["dataset"]), "dataset", columns)
            tests = kind.runs[kind.runs.dataset == source]
            averages = {MEAN: frames.mean_cell(kind.runs, own)}
            table.add((source, kind.name), cells | averages | (field.facts(study, tests) if more else {}))
    table.mark_best(columns=(SOURCE, *targets, MEAN), second=True)
    table.notes.append(
        "The context is learned on the source only and precedes the targets' own class names; zero-shot CLIP uses each"
        " dataset's own prompt. The mean is over all targets of the source; where one of them has no number, there is"
        " no mean. The best are marked per source."
    )
    if more:
        table.notes += ["ECE is that of the source.", *field.NOTES]
    return [Exhibit(piece.suffix, piece.subtitle, None, table)]


ITEM = Item(
    "cross_dataset",
    "Cross-dataset transfer",
    "Not in the paper: contexts learned on one dataset, tested on datasets of other classes.",
    per_slice(make),
    sweep_command(
        "cross_dataset",
        lambda study: {"datasets": study.datasets[:1], "targets": {study.datasets[0]: ["OTHER_DATASET"]}},
    ),
)
