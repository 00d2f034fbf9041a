"""Figure 1: hand-written prompts against a learned context on each dataset."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from fastcoop.reports import frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import PAPER_MARK, TWO_COLUMNS, add_legend, fitted, look, new_figure, shortened
from fastcoop.reports.table import Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPT_LENGTH = 56  # characters of a prompt above its bar
OWN = "the dataset's own prompt"
LEARNED = "[V]₁ [V]₂ … [V]ᴍ [CLASS]."


class Bar(NamedTuple):
    """A prompt as shown, its series, its mean in these results, and the number in the paper."""

    prompt: str
    series: str
    cell: Cell
    number: Cell | None


def make(study: Study, piece: Slice) -> list[Exhibit]:
    length, init = frames.main_setting(piece.runs)
    shots = frames.most_shots(piece.runs)
    learned = f"{LEARNED}  (CoOp, M={int(length)}, {frames.in_shots(shots)})"
    found: dict[str, list[Bar]] = {}
    for name, runs in piece.runs.groupby("dataset", sort=False):
        dataset, zero = str(name), runs[runs.method == "zero_shot"]
        own = study.known.get(dataset, {}).get("prompt")
        prompts = zero.groupby(zero.prompt.fillna(OWN), sort=False)
        bars = [_bar(piece, dataset, str(prompt), frame, own) for prompt, frame in prompts]
        main = frames.main_runs(runs) if (runs.method == "coop").any() else runs
        coop = main[(main.series == "coop end") & (main.shots == shots)]
        if len(bars) > 1 and not coop.empty:
            number = printed(
                "figure1", piece.backbone, dataset, "coop", length=length, init=init, shots=shots
            )
            bars.sort(key=lambda bar: bar.cell.mean)
            found[dataset] = [*bars, Bar(learned, "coop end", _cell(coop), number)]
    if not found:
        raise frames.Missing(
            "no dataset has CoOp and zero_shot runs with two or more prompts; list several under `prompts:`"
        )
    table = Table(f"Prompts against CoOp ({piece.subtitle})", ("dataset", "prompt"), ("accuracy",))
    for name, bars in found.items():
        for bar in bars:
            table.add(
                (name, bar.prompt), {"accuracy": bar.cell, **({"paper": bar.number} if bar.number else {})}
            )
    table.mark_best()
    if any(bar.number for bars in found.values() for bar in bars):
        table.columns = ("accuracy", "paper")
        table.notes.append(NOTE.replace(f"Rows “{AS_PRINTED}”", f"Numbers under “paper”, {AS_PRINTED},"))
    return [Exhibit(piece.suffix, piece.subtitle, _figure(found, piece), table)]


def _bar(piece: Slice, dataset: str, prompt: str, runs: pd.DataFrame, own: str | None) -> Bar:
    """Return a prompt's bar; ``own`` is the dataset's prompt if the results record it."""
    words = own.replace("[CLASS]", "{}") if own and prompt == OWN else prompt
    shown = words.replace("{}", "[CLASS]") + ("  (its own)" if prompt == OWN and words != OWN else "")
    number = printed("figure1", piece.backbone, dataset, "zero_shot", prompt=words)
    return Bar(shown, "zero_shot", _cell(runs), number)


def _cell(runs: pd.DataFrame) -> Cell:
    cell = frames.cell_of(frames.summarize(runs, ["dataset"]))
    assert isinstance(cell, Cell)
    return cell


def _figure(found: dict[str, list[Bar]], piece: Slice) -> Figure:
    columns = min(2, len(found))
    lines = math.ceil(len(found) / columns)
    most = max(map(len, found.values()))
    figure = new_figure(TWO_COLUMNS * columns / 2, lines * (0.32 * most + 0.5) + 0.3, piece.subtitle)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, (axis, (name, bars)) in enumerate(zip(axes, found.items(), strict=False)):
        _draw(axis, bars)
        axis.set_title(fitted(name, TWO_COLUMNS / 2 - 0.3))
        if place + columns >= len(found):
            axis.set_xlabel("accuracy (%)")
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    if any(bar.number for bars in found.values() for bar in bars):
        add_legend(figure, [axes[0].scatter([], [], **PAPER_MARK)], [AS_PRINTED], 1)
    return figure


def _draw(axis: Axes, bars: list[Bar]) -> None:
    """Draw a bar per prompt, with its words above it and its accuracy at its left end."""
    spreads = [0.0 if math.isnan(bar.cell.std) else bar.cell.std for bar in bars]
    ends = [bar.cell.mean + spread for bar, spread in zip(bars, spreads, strict=True)]
    top = max(*ends, *(bar.number.mean for bar in bars if bar.number))
    for place, (prompt, series, cell, number) in enumerate(bars):
        axis.barh(place, cell.mean, 0.4, color=look(series).color)
        if not math.isnan(cell.std):
            axis.errorbar(cell.mean, place, xerr=cell.std, color="#555555", linewidth=1, capsize=1.5)
        axis.text(0.004 * top, place - 0.27, shortened(prompt, PROMPT_LENGTH), va="bottom", fontsize=7)
        inside = cell.mean > 0.15 * top  # clear of error bars and of the paper's mark
        x, color = (0.012 * top, "white") if inside else (cell.mean + 0.05 * top, "black")
        axis.text(
            x, place, f"{cell.mean:.1f}", va="center_baseline", fontsize=7.5, fontweight="bold", color=color
        )
        if number:
            axis.scatter(number.mean, place, **PAPER_MARK)
    axis.set_ylim(len(bars) - 0.7, -0.75)
    axis.set_xlim(0, 1.04 * top)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False, axis="y")


ITEM = Item(
    "figure1",
    "Figure 1. Prompt engineering against CoOp",
    "Zero-shot accuracy of hand-written prompts, and of a context learned from a few images per class.",
    per_slice(make),
    sweep_command("fig1"),
)
