"""Figure 1: hand-written prompts against a learned context, dataset by dataset."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from fastcoop.reports.item import Item, Part, sweep_of
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    in_shots,
    main_runs,
    main_setting,
    most_shots,
    per_slice,
    read_datasets,
    summarise,
)
from fastcoop.reports.style import PAPER_MARK, TWO_COLUMNS, add_legend, fitted, look, new_figure, shortened
from fastcoop.reports.table import Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPT_LENGTH = 56  # characters of a prompt above its bar
OWN = "the dataset's own prompt"
LEARNED = "[V]₁ [V]₂ … [V]ᴍ [CLASS]."
Row = tuple[str, str, Cell, Cell | None]  # prompt as shown, series, the mean here, the paper's number


def make(study: Study) -> list[Part]:
    return per_slice(study, partial(_parts, study))


def _parts(study: Study, piece: Slice) -> list[Part]:
    length, init = main_setting(piece.runs)
    shots = most_shots(piece.runs)
    learned = f"{LEARNED}  (CoOp, M={int(length)}, {in_shots(shots)})"
    known = read_datasets(study.folder)
    found: dict[str, list[Row]] = {}
    for name, runs in piece.runs.groupby("dataset", sort=False):
        zero = runs[(runs.method == "zero_shot")]
        own = known.get(str(name), {}).get("prompt")
        rows = [
            _row(piece, str(name), str(prompt), frame, own)
            for prompt, frame in zero.groupby(zero.prompt.fillna(OWN), sort=False)
        ]
        rows.sort(key=lambda row: row[2].mean)
        main = main_runs(runs) if (runs.method == "coop").any() else runs
        coop = main[(main.series == "coop end") & (main.shots == shots)]
        if len(rows) < 2 or coop.empty:
            continue
        number = printed("figure1", piece.backbone, str(name), "coop", length=length, init=init, shots=shots)
        found[str(name)] = [*rows, (learned, "coop end", _cell(coop), number)]
    if not found:
        raise Missing(
            "no dataset has CoOp and zero_shot runs with two or more prompts; list several under `prompts:`"
        )
    return [Part(piece.suffix, piece.subtitle, _figure(found, piece), _table(found, piece))]


def _row(piece: Slice, dataset: str, prompt: str, runs: pd.DataFrame, own: str | None) -> Row:
    """A prompt's bar; ``own`` is the dataset's prompt in words, where the results know it."""
    words = own.replace("[CLASS]", "{}") if own and prompt == OWN else prompt
    number = printed("figure1", piece.backbone, dataset, "zero_shot", prompt=words)
    shown = words.replace("{}", "[CLASS]")
    return (
        f"{shown}  (its own)" if prompt == OWN and words != OWN else shown,
        "zero_shot",
        _cell(runs),
        number,
    )


def _cell(runs: pd.DataFrame) -> Cell:
    row = summarise(runs, ["dataset"]).iloc[0]
    return Cell(float(row["mean"]), float(row["std"]), int(row["runs"]))


def _figure(found: dict[str, list[Row]], piece: Slice) -> Figure:
    columns = min(2, len(found))
    lines = math.ceil(len(found) / columns)
    most = max(len(rows) for rows in found.values())
    figure = new_figure(TWO_COLUMNS * columns / 2, lines * (0.32 * most + 0.5) + 0.3, piece.subtitle)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, (name, rows) in enumerate(found.items()):
        _draw(axes[place], rows)
        axes[place].set_title(fitted(name, TWO_COLUMNS / 2 - 0.3))
        if place + columns >= len(found):
            axes[place].set_xlabel("accuracy (%)")
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    if any(row[3] for rows in found.values() for row in rows):
        add_legend(figure, [axes[0].scatter([], [], **PAPER_MARK)], [AS_PRINTED], 1)
    return figure


def _draw(axis: Axes, rows: list[Row]) -> None:
    """A bar per prompt with the prompt's words above it and its accuracy at the foot of it."""
    whiskers = [cell.mean + (0.0 if math.isnan(cell.std) else cell.std) for _, _, cell, _ in rows]
    top = max(*whiskers, *(number.mean for *_, number in rows if number))
    for place, (prompt, series, cell, number) in enumerate(rows):
        axis.barh(place, cell.mean, 0.4, color=look(series).color)
        if not math.isnan(cell.std):
            axis.errorbar(cell.mean, place, xerr=cell.std, color="#555555", linewidth=1, capsize=1.5)
        axis.text(0.004 * top, place - 0.27, shortened(prompt, PROMPT_LENGTH), va="bottom", fontsize=7)
        inside = cell.mean > 0.15 * top  # where no whisker or mark of the paper's stands
        x, color = (0.012 * top, "white") if inside else (cell.mean + 0.05 * top, "black")
        axis.text(
            x, place, f"{cell.mean:.1f}", va="center_baseline", fontsize=7.5, fontweight="bold", color=color
        )
        if number:
            axis.scatter(number.mean, place, **PAPER_MARK)
    axis.set_ylim(len(rows) - 0.7, -0.75)
    axis.set_xlim(0, 1.04 * top)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False, axis="y")


def _table(found: dict[str, list[Row]], piece: Slice) -> Table:
    table = Table(f"Prompts against CoOp ({piece.subtitle})", ("dataset", "prompt"), ("accuracy", "paper"))
    for name, rows in found.items():
        for prompt, _, cell, number in rows:
            table.add((name, prompt), {"accuracy": cell, **({"paper": number} if number else {})})
    table.mark_best()
    if any(row[3] for rows in found.values() for row in rows):
        table.notes.append(
            NOTE.replace("Rows", "Numbers under “paper”, ", 1).replace(f" “{AS_PRINTED}”", AS_PRINTED + ",")
        )
    else:
        table.columns = ("accuracy",)
    return table


ITEM = Item(
    "figure1",
    "Figure 1. Prompt engineering against CoOp",
    "Zero-shot accuracy of hand-written prompts, and of a context learned from a few images per class.",
    make,
    sweep_of("fig1"),
)
