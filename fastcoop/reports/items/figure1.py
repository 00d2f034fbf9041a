"""Figure 1: hand-written prompts against a learned context on each dataset."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fastcoop.reports import chart, frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.paper import AS_PRINTED, NOTE, printed
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import PAPER_MARK, TWO_COLUMNS, add_legend, look, name_of, panel_figure, shortened
from fastcoop.reports.table import Cell, Cells, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROMPT_LENGTH = 56  # characters of a prompt above its bar
OWN = "the dataset's own prompt"
LEARNED = "[V]₁ [V]₂ … [V]ᴍ [CLASS]."


class Bar(NamedTuple):
    """A prompt as shown, its series, the summary of its runs, and the number in the paper."""

    prompt: str
    series: str
    summary: Any
    number: Cell | None

    @property
    def cell(self) -> Cell:
        return Cell(float(self.summary.mean), float(self.summary.std), int(self.summary.runs))


def make(study: Study, piece: Slice) -> list[Exhibit]:
    setting = frames.main_setting(piece.runs)
    learned = f"{LEARNED}  (CoOp, M={int(setting.length)}, {frames.in_shots(setting.shots)})"
    found: dict[str, list[Bar]] = {}
    main = frames.main_runs(piece.runs)
    main = main[(main.series == "coop end") & (main.shots == setting.shots)]
    for dataset, runs in piece.runs.groupby("dataset", sort=False):
        name = str(dataset)
        bars = _prompts(piece, runs, setting, study.known.get(name, {}).get("prompt"))
        coop = main[main.dataset == name]
        if len(bars) > 1 and not coop.empty:
            number = printed("figure1", piece.backbone, name, "coop", setting)
            bars.sort(key=lambda bar: bar.cell.mean)
            found[name] = [*bars, Bar(learned, "coop end", _summary(coop), number)]
    if not found:
        raise frames.Missing(
            "no dataset has CoOp and zero_shot runs with two or more prompts; list several under `prompts:`"
        )
    has_numbers = any(bar.number for bars in found.values() for bar in bars)
    columns = ("accuracy", "paper") if has_numbers else ("accuracy",)
    table = Table(f"Prompts against CoOp ({piece.subtitle})", ("dataset", "prompt"), columns)
    for name, bars in found.items():
        for bar in bars:
            cells: Cells = {"accuracy": bar.cell, "paper": bar.number or ""}
            table.add((name, bar.prompt), cells)
    table.mark_best()
    if has_numbers:
        table.notes.append(NOTE.replace(f"Rows “{AS_PRINTED}”", f"Numbers under “paper”, {AS_PRINTED},"))

    columns_drawn = min(2, len(found))
    height = math.ceil(len(found) / columns_drawn) * (0.32 * max(map(len, found.values())) + 0.5) + 0.3
    size = (TWO_COLUMNS * columns_drawn / 2, height)
    figure, axes = panel_figure(found, columns_drawn, size, piece.subtitle, "accuracy (%)")
    for axis, bars in zip(axes, found.values(), strict=True):
        _draw(axis, bars)
    if has_numbers:
        add_legend(figure, [axes[0].scatter([], [], **PAPER_MARK)], [AS_PRINTED], 1)
    prompts = {name: [(bar.series, bar.prompt, bar.summary) for bar in bars] for name, bars in found.items()}
    drawn = chart.bars(prompts, chart.ACCURACY, lambda series: name_of(series, setting.length))
    return [Exhibit(piece.suffix, piece.subtitle, figure, table, [drawn])]


def _prompts(piece: Slice, runs: pd.DataFrame, setting: frames.Setting, own: str | None) -> list[Bar]:
    """Return a bar for each prompt of zero-shot runs; ``own`` is the dataset's prompt if the results record it."""
    zero = runs[runs.method == "zero_shot"]
    bars = []
    for prompt, frame in zero.groupby(zero.prompt.fillna(OWN), sort=False):
        words = own.replace("[CLASS]", "{}") if own and prompt == OWN else str(prompt)
        shown = words.replace("{}", "[CLASS]") + ("  (its own)" if prompt == OWN and words != OWN else "")
        number = printed("figure1", piece.backbone, runs.dataset.iloc[0], "zero_shot", setting, words)
        bars.append(Bar(shown, "zero_shot", _summary(frame), number))
    return bars


def _summary(runs: pd.DataFrame) -> Any:
    (row,) = frames.rows_of(frames.summarize(runs, ["dataset"]))
    return row


def _draw(axis: Axes, bars: list[Bar]) -> None:
    """Draw a bar per prompt, with its words above it and its accuracy at its left end."""
    spreads = [0.0 if math.isnan(bar.cell.std) else bar.cell.std for bar in bars]
    ends = [bar.cell.mean + spread for bar, spread in zip(bars, spreads, strict=True)]
    top = max(*ends, *(bar.number.mean for bar in bars if bar.number))
    for place, bar in enumerate(bars):
        prompt, series, cell, number = bar.prompt, bar.series, bar.cell, bar.number
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
