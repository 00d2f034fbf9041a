"""Table 4: the nearest words of learned contexts.

Unified contexts have a column per dataset; class-specific ones a row per dataset, which summarizes its classes, and in
another table a row per class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from fastcoop import escape
from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Cell, Table
from fastcoop.reports.words import NEAR, Readings, most_frequent, read_words

Chosen = dict[str, tuple[pd.Series, Readings]]  # by dataset: the run shown, and its nearest words
NUMBER_OF_WORDS = 5  # of a summary over classes
CHANCE = (
    "chance: the mean distance of random vectors of the same length to their nearest token. A * marks a distance below"
    f" {NEAR:.0%} of that; other words are as near as to random vectors. A hyphen at the end marks part of a longer"
    " word."
)


def make(study: Study) -> list[Exhibit]:
    exhibits = [one for piece in study.slices() for one in _of_slice(study, piece)]
    if not exhibits:
        raise frames.Missing("no nearest words are stored for a CoOp context with the class at the end")
    return exhibits


def _of_slice(study: Study, piece: Slice) -> Iterator[Exhibit]:
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
            yield _exhibit(piece, f"{suffix}-csc", str(init), chosen, _summary(chosen))
            yield _exhibit(piece, f"{suffix}-csc-classes", str(init), chosen, _by_class(chosen))
        else:
            yield _exhibit(piece, suffix, str(init), chosen, _unified(chosen, length))


def _one_run_per_dataset(study: Study, frame: pd.DataFrame) -> Chosen:
    """Return each dataset's run with the most shots and the first seed that has nearest words."""
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
            vector = next((vector for vector in found.vectors if vector.position == place), None)
            if vector:
                chance = "" if vector.chance is None else f" / {vector.chance:.3f}"
                cells[name] = (
                    f"{vector.word} ({vector.distances[0]:.3f}{chance}){' *' if vector.near else ''}"
                )
        table.add((place,), cells)
    for title, text in MEANS.items():
        table.add((title,), {name: text(found) for name, (_, found) in chosen.items()})
    return table


def _summary(chosen: Chosen) -> Table:
    columns = ("classes", *MEANS, "most frequent")
    table = Table(
        "Nearest words of class-specific contexts, over all classes", ("dataset",), columns, unit=""
    )
    for name, (_, found) in chosen.items():
        cells: dict[str, Cell | str] = {title: text(found) for title, text in MEANS.items()}
        cells["classes"] = str(len(found.of_classes()))
        cells["most frequent"] = most_frequent(found.vectors, NUMBER_OF_WORDS)
        table.add((name,), cells)
    return table


def _by_class(chosen: Chosen) -> Table:
    columns = ("nearest words", "mean distance", "chance", "nearer than chance (%)")
    title = "Nearest words of class-specific contexts, by class"
    table = Table(title, ("dataset", "class"), columns, unit="")
    for name, (_, found) in chosen.items():
        for class_name, readings in found.of_classes().items():
            words = ", ".join(f"{vector.word}{'*' if vector.near else ''}" for vector in readings.vectors)
            distances = _number(readings.mean_distance), _number(readings.mean_chance)
            texts = (words, *distances, f"{readings.near:.0f}")
            table.add((name, class_name), dict(zip(columns, texts, strict=True)))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


MEANS: dict[str, Callable[[Readings], str]] = {  # summaries over the vectors of a run
    "mean distance": lambda found: _number(found.mean_distance),
    "chance": lambda found: _number(found.mean_chance),
    "initial context": lambda found: _number(found.initial),
    "random initial context": lambda found: _number(found.by_chance),
    f"nearer than {NEAR:.0%} of chance (% of vectors)": lambda found: f"{found.near:.0f}",
}


def _exhibit(piece: Slice, suffix: str, init: str, chosen: Chosen, table: Table) -> Exhibit:
    start = "random initialization" if init == "random" else f"initialized with the words “{init}”"
    table.title = f"{table.title}, {start} ({piece.subtitle})"
    metrics = {found.metric for _, found in chosen.values()}
    kind = "Euclidean distance" if metrics == {"euclidean"} else "Distance (1 - cosine)"
    runs = (f"{name}: {frames.in_shots(run.shots)}, seed {run.seed}" for name, (run, _) in chosen.items())
    table.notes = [
        f"{kind} to the nearest token of the vocabulary / {CHANCE}",
        "“Initial context”: distance before training; “random initial context”: distance of a random context.",
        f"Runs shown: {'; '.join(runs)}.",
    ]
    return Exhibit(suffix, piece.subtitle, None, table)


def _interpret(study: Study) -> str:
    """Return the command that finds nearest words, after a sweep if there is no context to interpret."""
    words = ("fastcoop", "interpret", study.folder, "--backbone", study.backbones[0])
    interpret = escape.shell_command(*words)
    end = study.runs[(study.runs.method == "coop") & (study.runs.class_position == "end")]
    return interpret if len(end) else f"{sweep_command('table4')(study)} && {interpret}"


ITEM = Item(
    "table4",
    "Table 4. Nearest words",
    "The words of the vocabulary that are nearest to the learned context vectors, and how near random vectors are.",
    make,
    _interpret,
)
