"""Table 4: the nearest words of learned contexts, one column per dataset."""

from __future__ import annotations

import pandas as pd

from fastcoop.reports.item import Item, Part
from fastcoop.reports.study import Missing, Slice, Study, shots_text
from fastcoop.reports.table import Table
from fastcoop.reports.words import Readings, read_words


def make(study: Study) -> list[Part]:
    parts = []
    for piece in study.slices():
        coop = piece.runs[(piece.runs.method == "coop") & ~piece.runs.class_specific]
        for init, frame in coop.groupby(coop.init.fillna("random"), sort=False):
            length = 16 if (frame.context_length == 16).any() else int(frame.context_length.max())
            readings = _one_run_per_dataset(
                study, frame[(frame.context_length == length) & (frame.class_position == "end")]
            )
            if readings:
                suffix = piece.suffix if init == "random" else f"{piece.suffix}-words"
                parts.append(_part(piece, suffix, str(init), length, readings))
    if not parts:
        raise Missing(
            "no nearest words are stored for a unified CoOp context with the class at the end; run"
            " `fastcoop interpret`"
        )
    return parts


def _one_run_per_dataset(study: Study, frame: pd.DataFrame) -> dict[str, tuple[pd.Series, Readings]]:
    """Per dataset the run of most shots and the first seed that has readings."""
    found: dict[str, tuple[pd.Series, Readings]] = {}
    for _, run in frame.sort_values(["shots", "seed"], ascending=[False, True]).iterrows():
        if run.dataset not in found and (readings := read_words(study.folder, run.key)):
            found[run.dataset] = (run, readings)
    return {name: found[name] for name in frame.dataset.unique() if name in found}


def _part(
    piece: Slice, suffix: str, init: str, length: int, readings: dict[str, tuple[pd.Series, Readings]]
) -> Part:
    start = "a random context" if init == "random" else f"“{init}”"
    table = Table(
        f"Nearest words of contexts learned from {start} ({piece.subtitle})",
        ("#",),
        tuple(readings),
        "dataset",
        unit="",
    )
    if init != "random":
        table.title += ", row by row the vectors of these words"
    for place in range(1, length + 1):
        cells = {}
        for name, (_, found) in readings.items():
            vector = next((v for v in found.vectors if v.position == place), None)
            cells[name] = f"{vector.word} ({vector.distances[0]:.4f})" if vector else ""
        table.add((place,), dict(cells))
    table.add(
        ("mean distance",), {name: f"{found.mean_distance:.4f}" for name, (_, found) in readings.items()}
    )
    chance = {
        name: "" if found.by_chance is None else f"{found.by_chance:.4f}"
        for name, (_, found) in readings.items()
    }
    table.add(("by chance",), dict(chance))
    chosen = ", ".join(
        f"{name}: {shots_text(run.shots)} shots, seed {run.seed}" for name, (run, _) in readings.items()
    )
    table.notes = [
        f"Nearest token of the vocabulary to each of the {length} context vectors, with its Euclidean"
        f" distance; a hyphen ends"
        " a piece of a word. “By chance” is the mean such distance of a random context: readings no nearer"
        " than that say nothing.",
        f"Runs shown: {chosen}.",
    ]
    return Part(suffix, piece.subtitle, None, table)


ITEM = Item(
    "table4",
    "Table 4. Nearest words",
    "What the learned context vectors are closest to in the vocabulary, and how close a random vector would"
    " be.",
    make,
)
