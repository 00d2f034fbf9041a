"""Table 4: the nearest words of learned contexts: a column per dataset for unified ones; for class-specific ones a
row per dataset that sums up its classes, and a row per class."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from fastcoop import escape
from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.study import Missing, Slice, Study, in_shots
from fastcoop.reports.table import Cell, Table
from fastcoop.reports.words import NEAR, Readings, most_often, read_words

Chosen = dict[str, tuple[pd.Series, Readings]]  # by dataset: the run shown, and its readings
MOST_OFTEN = 5  # words of a summary over classes
CHANCE = (
    "chance: the mean nearest distance of random vectors of the same length. A * marks what is nearer than"
    f" {NEAR:.0%} of that; a word without one says no more than the word nearest to a random vector would. A hyphen"
    " ends a piece of a word."
)


def make(study: Study) -> list[Part]:
    parts = [part for piece in study.slices() for part in _parts(study, piece)]
    if not parts:
        raise Missing("no nearest words are stored for a CoOp context with the class at the end")
    return parts


def _parts(study: Study, piece: Slice) -> Iterator[Part]:
    coop = piece.runs[(piece.runs.method == "coop") & (piece.runs.class_position == "end")]
    coop = coop.assign(init=coop.init.fillna("random"))
    inits = [init for init in coop.init.unique() if init != "random"]
    for (init, specific), frame in coop.groupby(["init", "class_specific"], sort=False):
        length = 16 if (frame.context_length == 16).any() else int(frame.context_length.max())
        chosen = _one_run_per_dataset(study, frame[frame.context_length == length])
        if not chosen:
            continue
        suffix = piece.suffix
        if init != "random":
            suffix += "-words" + (f"{inits.index(init) + 1}" if len(inits) > 1 else "")
        if specific:
            yield _part(piece, f"{suffix}-csc", str(init), chosen, _summary(chosen))
            yield _part(piece, f"{suffix}-csc-classes", str(init), chosen, _by_class(chosen))
        else:
            yield _part(piece, suffix, str(init), chosen, _unified(chosen, length))


def _one_run_per_dataset(study: Study, frame: pd.DataFrame) -> Chosen:
    """Per dataset the run of most shots and the first seed that has readings."""
    found: Chosen = {}
    for _, run in frame.sort_values(["shots", "seed"], ascending=[False, True]).iterrows():
        if run.dataset not in found and (readings := read_words(study.folder, run.key)):
            found[run.dataset] = (run, readings)
    return {name: found[name] for name in frame.dataset.unique() if name in found}


def _unified(chosen: Chosen, length: int) -> Table:
    table = Table("Nearest words of contexts", ("#",), tuple(chosen), "dataset", unit="")
    for place in range(1, length + 1):
        cells: dict[str, Cell | str] = {}
        for name, (_, found) in chosen.items():
            vector = next((v for v in found.vectors if v.position == place), None)
            if vector:
                beside = "" if vector.chance is None else f" / {vector.chance:.3f}"
                mark = " *" if vector.near else ""
                cells[name] = f"{vector.word} ({vector.distances[0]:.3f}{beside}){mark}"
        table.add((place,), cells)
    for title, value in _means():
        table.add((title,), {name: value(found) for name, (_, found) in chosen.items()})
    return table


def _summary(chosen: Chosen) -> Table:
    columns = ("classes", *(title for title, _ in _means()), "met most often")
    table = Table(
        "Nearest words of class-specific contexts, over all classes", ("dataset",), columns, unit=""
    )
    for name, (_, found) in chosen.items():
        cells: dict[str, Cell | str] = {title: value(found) for title, value in _means()}
        cells["classes"] = str(len(found.of_classes()))
        cells["met most often"] = most_often(found.vectors, MOST_OFTEN)
        table.add((name,), cells)
    return table


def _by_class(chosen: Chosen) -> Table:
    columns = ("nearest words", "mean distance", "chance", "nearer than chance (%)")
    table = Table(
        "Nearest words of class-specific contexts, by class", ("dataset", "class"), columns, unit=""
    )
    for name, (_, found) in chosen.items():
        for class_name, readings in found.of_classes().items():
            words = ", ".join(f"{v.word}{'*' if v.near else ''}" for v in readings.vectors)
            table.add((name, class_name), {
                "nearest words": words,
                "mean distance": _number(readings.mean_distance),
                "chance": _number(readings.mean_chance),
                "nearer than chance (%)": f"{readings.near:.0f}",
            })  # fmt: skip
    return table


def _means():  # type: ignore[no-untyped-def]
    """(title, how a run's readings come to it) of the lines that say how near all vectors are."""
    return (
        ("mean distance", lambda found: _number(found.mean_distance)),
        ("chance", lambda found: _number(found.mean_chance)),
        ("initial context", lambda found: _number(found.initial)),
        ("random initial context", lambda found: _number(found.by_chance)),
        (f"nearer than {NEAR:.0%} of chance (% of vectors)", lambda found: f"{found.near:.0f}"),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _part(piece: Slice, suffix: str, init: str, chosen: Chosen, table: Table) -> Part:
    start = "started at random" if init == "random" else f"started from the words “{init}”"
    table.title = f"{table.title}, {start} ({piece.subtitle})"
    metrics = {found.metric for _, found in chosen.values()}
    kind = "Euclidean distance" if metrics == {"euclidean"} else "Distance (1 - cosine)"
    runs = (f"{name}: {in_shots(run.shots)}, seed {run.seed}" for name, (run, _) in chosen.items())
    table.notes = [f"{kind} to the nearest token of the vocabulary / {CHANCE}",
                   "“Initial context” is what the runs started from, “random initial context” what one drawn at"
                   " random gives.",
                   f"Runs shown: {'; '.join(runs)}."]  # fmt: skip
    return Part(suffix, piece.subtitle, None, table)


def _interpret(study: Study) -> str:
    """Read the contexts that there are; where there are none, run them first."""
    read = escape.shell_command("fastcoop", "interpret", study.folder, "--backbone", study.backbones[0])
    end = study.runs[(study.runs.method == "coop") & (study.runs.class_position == "end")]
    return read if len(end) else f"{sweep_of('table4')(study)} && {read}"


ITEM = Item(
    "table4",
    "Table 4. Nearest words",
    "What the learned context vectors are closest to in the vocabulary, and how close chance would bring them.",
    make,
    _interpret,
)
