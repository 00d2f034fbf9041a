"""Table 3: random initialization against initialization with the embeddings of words."""

from __future__ import annotations

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.paper import add_printed, printed
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Table


def make(study: Study, piece: Slice) -> list[Exhibit]:
    shots = frames.main_setting(piece.runs).shots
    runs = piece.runs[(piece.runs.series == "coop end") & (piece.runs.shots == shots)]
    random = runs.init == "random"
    lengths = sorted(set(runs.context_length[~random]) & set(runs.context_length[random]))
    if not lengths:
        raise frames.Missing(
            'no context length has CoOp runs with both `init: random` and words (`init: "a photo of a"`)'
        )
    columns = {"random": "random", **{init: f"“{init}”" for init in runs.init[~random].unique()}}
    title = f"Random and word initialization at {frames.in_shots(shots)} ({piece.subtitle})"
    table = Table(title, ("dataset", "context"), tuple(columns.values()), "initialization")
    for length in lengths:
        found, notes = frames.panels(runs[runs.context_length == length], ["init"])
        table.notes += [note for note in notes if note not in table.notes]
        context = f"M={int(length)}"
        for name, summary in found.items():
            table.add((name, context), frames.cells_of(summary, "init", columns))
        where = ("table3", piece.backbone, "average of 11 datasets", "coop")
        settings = {column: frames.Setting(length, init, shots) for init, column in columns.items()}
        numbers = {column: printed(*where, setting) for column, setting in settings.items()}
        add_printed(table, ("average of its 11 datasets", context), numbers)
    table.mark_best(group=None)
    return [Exhibit(piece.suffix, piece.subtitle, None, table)]


ITEM = Item(
    "table3",
    "Table 3. Initialization",
    "Contexts of equal length that start from random vectors and from words.",
    per_slice(make),
    sweep_command("table3"),
)
