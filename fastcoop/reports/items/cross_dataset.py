"""Cross-dataset transfer: contexts learned on a source before the class names of other datasets."""

from __future__ import annotations

import math

import pandas as pd

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.study import (
    TRANSFER,
    Missing,
    Slice,
    Study,
    in_shots,
    most_shots,
    own_prompt,
    per_slice,
    rows_of,
    summarise,
)
from fastcoop.reports.style import name_of, rank
from fastcoop.reports.table import Cell, Table, cell_of

SOURCE, MEAN = "on the source", "mean of targets"


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def _parts(piece: Slice) -> list[Part]:
    frame = piece.everything[piece.everything.classes == "all"]
    moved = frame[(frame.kind == TRANSFER) & (frame.shots > 0)]
    if moved.empty:
        raise Missing("no run was tested on datasets of other classes than its own")
    shots = most_shots(moved) if (moved.method == "coop").any() else float(moved.shots.max())
    frame = own_prompt(frame)
    targets = [str(name) for name in moved.dataset.unique()]
    title = f"From one dataset to others of other classes, {in_shots(shots)} ({piece.subtitle})"
    columns = (SOURCE, *targets, MEAN)
    table = Table(title, ("source", "method"), columns, "tested on")
    trained = frame[(frame.shots == shots) & frame.source.isin(moved.source)]
    trained = trained[(trained.kind != "shift")]
    zero = frame[frame.method == "zero_shot"].drop_duplicates("dataset")
    for source, runs in trained.groupby("source", sort=False):
        own = [name for name in targets if name in set(runs.dataset) - {source}]
        table.add((source, name_of("zero_shot", 0)), _cells(zero, str(source), own))
        runs = runs.assign(length=runs.context_length.fillna(0.0), init=runs.init.fillna("random"))
        away = runs[runs.dataset.isin(own)]  # what was tested on its source alone has no line here
        kinds = away[["series", "length", "init"]].drop_duplicates()
        by_name = kinds.sort_values("length", ascending=False).sort_values(
            "series", key=lambda names: names.map(rank), kind="stable"
        )
        for kind in rows_of(by_name):
            alike = (runs.series == kind.series) & (runs.length == kind.length) & (runs.init == kind.init)
            name = name_of(kind.series, kind.length)
            name += "" if kind.init == "random" else f", from “{kind.init}”"
            table.add((source, name), _cells(runs[alike], str(source), own))
    table.mark_best()
    table.notes.append(
        "The context is learned on the source only and precedes the targets' own class names; zero-shot CLIP uses"
        " each dataset's own prompt. The mean is over the targets that have a number; the best are marked per source."
    )
    return [Part(piece.suffix, piece.subtitle, None, table)]


def _cells(runs: pd.DataFrame, source: str, targets: list[str]) -> dict[str, Cell | str]:
    summary = summarise(runs, ["dataset"])
    cells: dict[str, Cell | str] = {SOURCE: cell_of(summary, dataset=source)}
    cells |= {target: cell_of(summary, dataset=target) for target in targets}
    away = runs[runs.dataset.isin(targets)]
    wide = away.pivot_table(index="seed", columns="dataset", values="accuracy").dropna()
    if wide.shape[1] == len(targets) and len(wide):
        seeds = wide.mean(axis=1)
        spread = float(seeds.std()) if len(seeds) > 1 else math.nan
        cells[MEAN] = Cell(float(seeds.mean()), spread, len(seeds))
    return cells


ITEM = Item(
    "cross_dataset",
    "Cross-dataset transfer",
    "Not in the paper: contexts learned on one dataset, tested on datasets of other classes.",
    make,
    sweep_of(
        "cross_dataset",
        lambda study: {"datasets": study.datasets[:1], "targets": {study.datasets[0]: ["OTHER_DATASET"]}},
    ),
)
