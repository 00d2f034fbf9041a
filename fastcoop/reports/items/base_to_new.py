"""Base to new: contexts learned on the first half of a dataset's classes, tested on both halves."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from fastcoop.reports.item import Item, Part, Value, sweep_of
from fastcoop.reports.study import (
    AVERAGE,
    Missing,
    Slice,
    Study,
    in_shots,
    most_shots,
    own_prompt,
    per_slice,
    read_datasets,
    rows_of,
)
from fastcoop.reports.style import name_of, rank
from fastcoop.reports.table import Cell, Table

FEWEST_CLASSES = 4  # two for each half
COLUMNS = ("base", "new", "harmonic mean")


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def halves(piece: Slice) -> pd.DataFrame:
    """One row per family of classes, series, context length, initialisation and seed, with the columns ``base`` and
    ``new``: accuracy on the classes learned on, and on the others. Zero-shot CLIP, which learns on neither, too.

    Raises Missing where nothing was tested on both halves.
    """
    frame = piece.everything[piece.everything.classes.isin(("base", "new"))]
    family = frame.dataset.str.rsplit(":", n=1).str[0]
    learned_here = frame.source == family + ":base"
    untrained = frame.shots == 0
    frame = own_prompt(frame.assign(family=family)[learned_here | untrained])
    trained = frame[frame.shots > 0]
    if (trained.method == "coop").any():
        frame = frame[(frame.shots == most_shots(trained)) | (frame.shots == 0)]
    frame = frame.assign(length=frame.context_length.fillna(0.0), init=frame.init.fillna("random"))
    keys = ["family", "series", "length", "init", "shots", "seed"]
    wide = frame.pivot_table(index=keys, columns="classes", values="accuracy", sort=False)
    if not {"base", "new"} <= set(wide.columns) or wide.dropna().empty:
        raise Missing("no run learned on the first half of the classes (NAME:base) was tested on both halves")
    return wide.dropna().reset_index()


def _parts(piece: Slice) -> list[Part]:
    table_of = halves(piece)
    shots = table_of.shots.max()
    title = f"Base to new classes at {in_shots(shots)} ({piece.subtitle})"
    table = Table(title, ("dataset", "method"), COLUMNS, "tested on")
    kinds = table_of[["series", "length", "init"]].drop_duplicates()
    kinds = kinds.sort_values(["series", "length"], key=lambda c: c.map(rank) if c.name == "series" else -c)
    families = list(table_of.family.unique())
    counts = table_of.groupby(["series", "length", "init"]).family.nunique()
    whole = [name for name in families if _kinds_of(table_of, name) == len(counts)]
    if len(families) > 1 and whole:
        for kind in rows_of(kinds):
            rows = _of(table_of[table_of.family.isin(whole)], kind)
            table.add((f"{AVERAGE} over {len(whole)} datasets", _name(kind)), _average(rows))
        if left_out := [name for name in families if name not in whole]:
            table.notes.append(
                f"The average leaves out {', '.join(left_out)}, where some of the runs compared are missing."
            )
    for name in families:
        for kind in rows_of(kinds):
            rows = _of(table_of[table_of.family == name], kind)
            if len(rows):
                table.add((name, _name(kind)), _cells(rows))
    table.mark_best()
    table.notes.append(
        "Base: the first half of the classes, whose images were learned from; new: the second half, never seen."
        " The harmonic mean is that of the two means beside it; its spread is that of the seeds' own."
    )
    return [Part(piece.suffix, piece.subtitle, None, table)]


def _kinds_of(frame: pd.DataFrame, family: str) -> int:
    return len(frame[frame.family == family].drop_duplicates(["series", "length", "init"]))


def _of(frame: pd.DataFrame, kind) -> pd.DataFrame:  # type: ignore[no-untyped-def]
    return frame[(frame.series == kind.series) & (frame.length == kind.length) & (frame.init == kind.init)]


def _name(kind) -> str:  # type: ignore[no-untyped-def]
    name = name_of(kind.series, kind.length)
    return name if kind.init == "random" else name.replace(")", f", “{kind.init}”)")


def _cells(rows: pd.DataFrame) -> dict[str, Cell | str]:
    """Means over rows of one per seed."""
    base, new = rows.base, rows.new
    harmonic = harmonic_mean(base, new)
    return {
        "base": Cell(float(base.mean()), float(base.std()), len(rows)),
        "new": Cell(float(new.mean()), float(new.std()), len(rows)),
        "harmonic mean": Cell(
            float(harmonic_mean(base.mean(), new.mean())), float(harmonic.std()), len(rows)
        ),
    }


def _average(rows: pd.DataFrame) -> dict[str, Cell | str]:
    """The mean over datasets; the spread is that of the per-seed averages, over the seeds that all datasets have."""
    means = rows.groupby("family")[["base", "new"]].mean().mean()
    counted = rows.groupby("seed").family.nunique()
    seeds = rows[rows.seed.isin(counted.index[counted == rows.family.nunique()])]
    each = seeds.groupby("seed")[["base", "new"]].mean()
    spread = {name: each[name].std() if len(each) > 1 else math.nan for name in ("base", "new")}
    spread["harmonic mean"] = harmonic_mean(each.base, each.new).std() if len(each) > 1 else math.nan
    values = {"base": means.base, "new": means.new, "harmonic mean": harmonic_mean(means.base, means.new)}
    return {name: Cell(float(values[name]), float(spread[name]), len(rows)) for name in COLUMNS}


def harmonic_mean(base, new):  # type: ignore[no-untyped-def]
    """2 b n / (b + n), of numbers or columns; 0 where both are."""
    total = base + new
    return 2 * base * new / (total.where(total > 0, 1.0) if hasattr(total, "where") else max(total, 1e-12))


def _halved(study: Study) -> dict[str, Value]:
    """The first dataset with enough classes for two halves."""
    classes = {name: about.get("classes") or 0 for name, about in read_datasets(study.folder).items()}
    counts = {spec: classes.get(Path(spec).name, classes.get(Path(spec).stem, 0)) for spec in study.datasets}
    name = next((spec for spec, count in counts.items() if count >= FEWEST_CLASSES), "DATASET")
    return {"datasets": [f"{name}:base"], "targets": {f"{name}:base": [f"{name}:new"]}}


ITEM = Item(
    "base_to_new",
    "Base to new classes",
    "Not in the paper: contexts learned on the first half of a dataset's classes, on that half and on the other.",
    make,
    sweep_of("base_to_new", _halved),
)
