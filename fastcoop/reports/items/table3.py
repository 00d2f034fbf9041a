"""Table 3: random initialisation against initialisation with the embeddings of words."""

from __future__ import annotations

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import Missing, Slice, Study, in_shots, most_shots, panels, per_slice
from fastcoop.reports.table import Cell, Table, cell_of


def make(study: Study) -> list[Part]:
    return per_slice(study, _parts)


def _parts(piece: Slice) -> list[Part]:
    shots = most_shots(piece.runs)
    runs = piece.runs[(piece.runs.series == "coop end") & (piece.runs.shots == shots)]
    runs = runs.assign(init=runs.init.fillna("random"))
    worded = sorted(runs.context_length[runs.init != "random"].unique())
    lengths = [
        length for length in worded if ((runs.context_length == length) & (runs.init == "random")).any()
    ]
    if not lengths:
        raise Missing(
            'no context length has CoOp runs with both `init: random` and words (`init: "a photo of a"`)'
        )
    inits = ["random", *(init for init in runs.init.unique() if init != "random")]
    columns = {init: "random" if init == "random" else f"“{init}”" for init in inits}
    title = f"Random and word initialisation at {in_shots(shots)} ({piece.subtitle})"
    table = Table(title, ("dataset", "context"), tuple(columns.values()), "initialisation")
    for length in lengths:
        found, notes = panels(runs[runs.context_length == length], ["init"])
        table.notes += [note for note in notes if note not in table.notes]
        for name, summary in found.items():
            cells: dict[str, Cell | str] = {
                text: cell_of(summary, init=init) for init, text in columns.items()
            }
            table.add((name, f"M={int(length)}"), cells)
        numbers = {
            text: printed(
                "table3",
                piece.backbone,
                "average of 11 datasets",
                "coop",
                length=length,
                init=init,
                shots=shots,
            )
            for init, text in columns.items()
        }
        if any(numbers.values()):
            table.add(
                ("average of its 11 datasets", f"M={int(length)}, {AS_PRINTED}"),
                {t: n or "" for t, n in numbers.items()},
            )
            table.notes.append(NOTE)
    table.mark_best_in_row()
    return [Part(piece.suffix, piece.subtitle, None, table)]


ITEM = Item(
    "table3",
    "Table 3. Initialisation",
    "Contexts started from random vectors and from words, of equal length.",
    make,
    sweep_of("table3"),
)
