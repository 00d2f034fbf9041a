"""Table 1: contexts learned on a source dataset, tested on targets under shift."""

from __future__ import annotations

import pandas as pd

from fastcoop import escape
from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import (
    TRANSFER,
    Missing,
    Slice,
    Study,
    in_shots,
    main_setting,
    most_shots,
    own_prompt,
    per_slice,
    rows_of,
    summarise,
)
from fastcoop.reports.style import name_of
from fastcoop.reports.table import Cell, Table, cell_of


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def shifted(piece: Slice) -> dict[str, tuple[list[str], pd.DataFrame]]:
    """{source: (targets, runs)}: the runs learned on a source at the most shots and tested on it and on its
    targets, unified CoOp with the class at the end for every context length tested on a target, and zero-shot CLIP on
    the same datasets. Datasets of other classes are no shift of the source and stay out."""
    frame = piece.everything[(piece.everything.classes == "all") & (piece.everything.kind != TRANSFER)]
    moved = frame[(frame.source != frame.dataset) & (frame.shots > 0)]
    if moved.empty:
        raise Missing("no run was tested on another dataset than its own; give the grid `targets:`")
    shots = most_shots(moved) if (moved.method == "coop").any() else float(moved.shots.max())
    _, init = main_setting(frame)
    frame = own_prompt(frame)
    found = {}
    for source, away in moved.groupby("source", sort=False):
        targets = [str(name) for name in away.dataset.unique()]
        trained = frame[
            (frame.source == source) & (frame.shots == shots) & frame.dataset.isin([source, *targets])
        ]
        kept = trained[(trained.series != "coop end") | (trained.init.fillna("random") == init)]
        zero = frame[(frame.method == "zero_shot") & frame.dataset.isin([source, *targets])]
        kept = kept[kept.series.isin(("linear_probe", "coop end"))]
        on_target = kept.dataset.isin(targets)
        kept = kept[on_target.groupby([kept.series, kept.context_length.fillna(0.0)]).transform("any")]
        found[str(source)] = targets, pd.concat([zero.drop_duplicates(["dataset", "seed"]), kept])
    return found


def _parts(piece: Slice) -> list[Part]:
    parts = []
    found = shifted(piece)
    names = escape.file_names(found)
    _, init = main_setting(piece.everything)
    for source, (targets, runs) in found.items():
        shots = runs.shots.max()
        title = f"From {source} at {in_shots(shots)} to other datasets ({piece.subtitle})"
        columns = (f"{source} (source)", *targets, *(["mean of targets"] if len(targets) > 1 else []))
        table = Table(title, ("method",), columns, "tested on")
        runs = runs.assign(length=runs.context_length.fillna(0.0))
        kinds = {(str(row.series), float(row.length)) for row in rows_of(runs)}
        order = ("zero_shot", "linear_probe", "coop end")
        for series, length in sorted(kinds, key=lambda kind: (order.index(kind[0]), -kind[1])):
            frame = runs[(runs.series == series) & (runs.length == length)]
            name = piece.name_of(series, length)
            table.add((name,), _cells(frame, source, targets))
            numbers = [
                printed("table1", piece.backbone, d, series.split()[0], length=length, init=init, shots=shots)
                for d in (source, *targets)
            ]
            if any(numbers):
                cells = {column: number or "" for column, number in zip(columns, numbers, strict=False)}
                table.add((f"{name_of(series, length)}, {AS_PRINTED}",), dict(cells))
        table.mark_best(group=())
        if any(AS_PRINTED in names[0] for names, _ in table.rows):
            table.notes.append(NOTE)
        parts.append(
            Part(piece.suffix + (f"-{names[source]}" if len(found) > 1 else ""), piece.subtitle, None, table)
        )
    return parts


def _cells(runs: pd.DataFrame, source: str, targets: list[str]) -> dict[str, Cell | str]:
    summary = summarise(runs, ["dataset"])
    cells: dict[str, Cell | str] = {f"{source} (source)": cell_of(summary, dataset=source)}
    cells |= {target: cell_of(summary, dataset=target) for target in targets}
    away = (
        runs[runs.dataset.isin(targets)]
        .pivot_table(index="seed", columns="dataset", values="accuracy")
        .dropna()
    )
    if len(targets) > 1 and away.shape[1] == len(targets) and len(away):
        seeds = away.mean(axis=1)
        cells["mean of targets"] = Cell(float(seeds.mean()), float(seeds.std()), len(seeds))
    return cells


ITEM = Item(
    "table1",
    "Table 1. Robustness to distribution shift",
    "Trained on the source only; tested on its test set and on the targets', with the targets' own class"
    " lists.",
    make,
    sweep_of(
        "table1",
        lambda study: {"datasets": study.datasets[:1], "targets": {study.datasets[0]: ["TARGET"]}},
    ),
)
