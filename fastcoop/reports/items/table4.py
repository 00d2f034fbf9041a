"""Table 4: the nearest words of learned contexts.

Unified contexts have a column per dataset; class-specific ones a row per dataset, which summarizes its classes, and in
another table a row per class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pandas as pd

from fastcoop import escape
from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Cells, Table, text_table
from fastcoop.reports.words import NEAR, NearestWords, read_words

Chosen = dict[str, tuple[pd.Series, NearestWords]]  # by dataset: the run shown, and its nearest words
NUMBER_OF_WORDS = 5  # of a summary over classes
NOT_LATIN = "N/A"  # stands for a word in another script
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
    coop = coop.sort_values("class_specific", kind="stable")  # unified contexts come first
    inits = [init for init in coop.init.unique() if init != "random"]
    for (init, specific), frame in coop.groupby(["init", "class_specific"], sort=False):
        length = 16 if (frame.context_length == 16).any() else int(frame.context_length.max())
        chosen = _one_run_per_dataset(study, frame[frame.context_length == length])
        suffix, start = piece.suffix, "random initialization"
        if init != "random":
            suffix += f"-words{inits.index(init) + 1 if len(inits) > 1 else ''}"
            start = f"initialized with the words “{init}”"
        tables = {"-csc": _summary, "-csc-classes": _by_class} if specific else {"": _unified}
        for kind, make_table in tables.items() if chosen else ():
            table = make_table(chosen)
            table.title += f", {start} ({piece.subtitle})"
            table.notes = _notes(chosen)
            yield Exhibit(f"{suffix}{kind}", piece.subtitle, None, table)


def _one_run_per_dataset(study: Study, frame: pd.DataFrame) -> Chosen:
    """Return each dataset's run with the most shots and the first seed that has nearest words."""
    found: Chosen = {}
    for _, run in frame.sort_values(["shots", "seed"], ascending=[False, True]).iterrows():
        if run.dataset not in found and (readings := study.read(read_words, run.key)):
            found[run.dataset] = (run, readings)
    return {name: found[name] for name in frame.dataset.unique() if name in found}


def _means(found: NearestWords) -> Cells:
    """Return summaries over the vectors of a run."""
    return {
        "mean distance": f"{found.vectors.distance.mean():.3f}",
        "chance": f"{found.vectors.chance.mean():.3f}",
        "initial context": f"{found.initial:.3f}",
        "random initial context": f"{found.by_chance:.3f}",
        f"nearer than {NEAR:.0%} of chance (% of vectors)": f"{100 * found.vectors.near.mean():.0f}",
    }


def _unified(chosen: Chosen) -> Table:
    """Return a row per vector and a column per dataset."""
    columns: dict[str, Cells] = {}
    for name, (_, found) in chosen.items():
        texts: Cells = {}
        for one in frames.rows_of(found.vectors):
            distances = f"{one.distance:.3f} / {one.chance:.3f}"
            texts[str(one.position)] = f"{one.word} ({distances}){' *' * one.near}"
        columns[name] = texts | _means(found)
    table = Table("Nearest words of contexts", ("#",), tuple(chosen), "dataset", unit="")
    for row in next(iter(columns.values())):
        table.add((row,), {name: cells[row] for name, cells in columns.items() if row in cells})
    return table


def _summary(chosen: Chosen) -> Table:
    """Return a row per dataset, which summarizes its classes."""
    rows: dict[str, Cells] = {}
    for name, (_, found) in chosen.items():
        counts = Counter(word for word in found.vectors.word if word != NOT_LATIN)
        frequent = ", ".join(f"{word} ({count})" for word, count in counts.most_common(NUMBER_OF_WORDS))
        number = {"classes": str(found.vectors["class"].nunique())}
        rows[name] = {**number, **_means(found), "most frequent": frequent}
    title = "Nearest words of class-specific contexts, over all classes"
    return text_table(title, pd.DataFrame.from_dict(rows, orient="index").rename_axis("dataset"))


def _by_class(chosen: Chosen) -> Table:
    """Return a row per class."""
    columns = ("nearest words", "mean distance", "chance", "nearer than chance (%)")
    title = "Nearest words of class-specific contexts, by class"
    table = Table(title, ("dataset", "class"), columns, unit="")
    for name, (_, found) in chosen.items():
        for class_name, vectors in found.vectors.groupby("class", sort=False):
            words = ", ".join(vectors.word + vectors.near.map({True: "*", False: ""}))
            distances = f"{vectors.distance.mean():.3f}", f"{vectors.chance.mean():.3f}"
            texts = (words, *distances, f"{100 * vectors.near.mean():.0f}")
            table.add((name, class_name), dict(zip(columns, texts, strict=True)))
    return table


def _notes(chosen: Chosen) -> list[str]:
    metrics = {found.metric for _, found in chosen.values()}
    kind = "Euclidean distance" if metrics == {"euclidean"} else "Distance (1 - cosine)"
    runs = (f"{name}: {frames.in_shots(run.shots)}, seed {run.seed}" for name, (run, _) in chosen.items())
    return [
        f"{kind} to the nearest token of the vocabulary / {CHANCE}",
        "“Initial context”: distance before training; “random initial context”: distance of a random context.",
        f"Runs shown: {'; '.join(runs)}.",
    ]


def _interpret(study: Study) -> str:
    """Return the command that finds nearest words, after a sweep if there is no context to interpret."""
    words = ("fastcoop", "interpret", study.folder, "--backbone", study.backbones[0])
    interpret = escape.shell_command(*words)
    has_contexts = (study.runs.class_position == "end").any()
    return interpret if has_contexts else f"{sweep_command('table4')(study)} && {interpret}"


ITEM = Item(
    "table4",
    "Table 4. Nearest words",
    "The words of the vocabulary that are nearest to the learned context vectors, and how near random vectors are.",
    make,
    _interpret,
)
