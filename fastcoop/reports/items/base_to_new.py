"""Base to new: contexts learned on the first half of a dataset's classes, tested on both halves."""

from __future__ import annotations

from pathlib import Path
from statistics import harmonic_mean, mean

import pandas as pd

from fastcoop.progress import counted
from fastcoop.reports import field, frames
from fastcoop.reports.item import Exhibit, Item, Value, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Cell, Cells, Table

MIN_CLASSES = 4  # two for each half
COLUMNS = ("base", "new", "harmonic mean")
MEAN_OF_H = "mean of harmonic means"


def make(study: Study, piece: Slice) -> list[Exhibit]:
    tested = frames.halves(piece.everything)
    found = tested.dropna(subset=["base", "new"])
    title = f"Base to new classes at {frames.in_shots(found.shots.max())} ({piece.subtitle})"
    more = field.fact_columns(found)
    table = Table(title, ("dataset", "method"), (*COLUMNS, MEAN_OF_H, *more), "tested on")
    methods, names = frames.kinds(found), list(found.family.unique())
    whole = [name for name in names if all((kind.runs.family == name).any() for kind in methods)]
    groups = {name: [name] for name in names}
    if len(names) > 1:
        table.notes += frames.left_out_note([name for name in names if name not in whole])
    if len(whole) > 1:
        groups = {f"{frames.AVERAGE} over {len(whole)} datasets": whole, **groups}
    tests = piece.everything[piece.everything.classes == "base"]
    for place, (title, families) in enumerate(groups.items()):
        for kind in methods:
            rows = kind.runs[kind.runs.family.isin(families)]
            if len(rows):
                own = tests[tests.key.isin(rows.key) & (tests.source == tests.dataset)]
                table.add((title, kind.name), _average(rows) | (field.facts(study, own) if more else {}))
        if more and not place:
            field.add_published(
                table, "base-to-new", piece.backbone, dict(zip(("base", "new", "H"), COLUMNS, strict=True))
            )
    table.mark_best(columns=(*COLUMNS, MEAN_OF_H), second=True)
    table.notes.append(
        "Base: the first half of the classes, whose images are used in training; new: the second half. The harmonic"
        " mean is that of the two means. The mean of harmonic means is over the harmonic mean of each dataset; both"
        " definitions are in use, and published numbers mix them. Deviations are over the same number of each seed."
    )
    if left_out := len(tested) - len(found):
        table.notes.append(f"Left out: {counted(left_out, 'run')} without an accuracy on one of the halves.")
    if more:
        table.notes += ["ECE is that of the base classes.", *field.NOTES]
    return [Exhibit(piece.suffix, piece.subtitle, None, table)]


def _average(rows: pd.DataFrame) -> Cells:
    """Return means over datasets, and deviations over the seeds that all datasets have."""
    means = rows.groupby("family")[["base", "new"]].mean().mean()
    counts = rows.groupby("seed").family.nunique()
    seeds = rows[rows.seed.isin(counts.index[counts == rows.family.nunique()])]
    each = seeds.groupby("seed")[["base", "new"]].mean()
    means["harmonic mean"] = harmonic_mean([means.base, means.new])
    each["harmonic mean"] = [harmonic_mean(pair) for pair in zip(each.base, each.new, strict=True)]
    found: Cells = {name: Cell(float(means[name]), float(each[name].std()), len(rows)) for name in COLUMNS}
    if rows.family.nunique() > 1:
        pairs = rows.groupby("family")[["base", "new"]].mean().itertuples(index=False)
        of_seeds = seeds.assign(h=[harmonic_mean(pair) for pair in zip(seeds.base, seeds.new, strict=True)])
        std = float(of_seeds.groupby("seed").h.mean().std())
        found[MEAN_OF_H] = Cell(float(mean([harmonic_mean(pair) for pair in pairs])), std, len(rows))
    return found


def _targets(study: Study) -> dict[str, Value]:
    """Return the first dataset with enough classes for two halves, as a grid names them."""

    known = {name for name, about in study.known.items() if (about.get("classes") or 0) >= MIN_CLASSES}
    names = (name for name in study.datasets if known & {Path(name).name, Path(name).stem})
    name = next(names, "DATASET")
    return {"datasets": [f"{name}:base"], "targets": {f"{name}:base": [f"{name}:new"]}}


ITEM = Item(
    "base_to_new",
    "Base to new classes",
    "Not in the paper: contexts learned on the first half of a dataset's classes, tested on both halves.",
    per_slice(make),
    sweep_command("base_to_new", _targets),
)
