"""Cross-dataset transfer: contexts learned on a source, with the class names of other datasets."""

from __future__ import annotations

from fastcoop.reports import field, frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Table

SOURCE, MEAN = "on the source", "mean of targets"


def make(study: Study, piece: Slice) -> list[Exhibit]:
    frame = frames.own_prompt(piece.everything[piece.everything.classes == "all"])
    moved = frame[(frame.kind == frames.TRANSFER) & (frame.shots > 0)]
    if moved.empty:
        raise frames.Missing("no run was tested on datasets of other classes than its own")
    shots = frames.moved_shots(moved)
    targets = [str(name) for name in moved.dataset.unique()]
    title = f"From one dataset to others of other classes, {frames.in_shots(shots)} ({piece.subtitle})"
    more = field.fact_columns(moved)
    table = Table(title, ("source", "method"), (SOURCE, *targets, MEAN, *more), "tested on")
    zero = frame[frame.method == "zero_shot"].drop_duplicates("dataset")
    trained = frame[(frame.shots == shots) & frame.source.isin(moved.source) & (frame.kind != frames.SHIFT)]
    for source, runs in trained.groupby("source", sort=False):
        own = [name for name in targets if name in set(runs.dataset) - {source}]
        columns = {str(source): SOURCE} | {name: name for name in own}
        for kind in [*frames.kinds(zero), *frames.kinds(runs)]:
            if kind.runs.dataset.isin(own).any():  # not tested on the source only
                cells = frames.cells_of(frames.summarize(kind.runs, ["dataset"]), "dataset", columns)
                tests = kind.runs[kind.runs.dataset == source]
                averages = {MEAN: frames.mean_cell(kind.runs, own)}
                table.add((source, kind.name), cells | averages | (field.facts(study, tests) if more else {}))
    table.mark_best(columns=(SOURCE, *targets, MEAN), second=True, without=field.OFFICIAL)
    table.notes.append(
        "The context is learned on the source only and precedes the targets' own class names; zero-shot CLIP uses each"
        " dataset's own prompt. The mean is over the targets that have a number; the best are marked per source."
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
