"""Figure 4: CoOp's gain over the hand-written prompt on each dataset, the largest first."""

from __future__ import annotations

from fastcoop.reports import chart, frames
from fastcoop.reports.item import Exhibit, Item, per_slice, sweep_command
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.style import ON_GRID, ONE_COLUMN, fitted, look, name_of, panel_figure, shortened
from fastcoop.reports.table import Cell, Table

XLABEL = "absolute gain in accuracy (percentage points)"
NAME_LENGTH = 28  # characters of a dataset's name beside its bar


def make(study: Study, piece: Slice) -> list[Exhibit]:
    runs = frames.main_runs(piece.runs)
    length, _, shots = frames.main_setting(runs)
    zero = runs[runs.method == "zero_shot"].groupby("dataset").accuracy.mean()
    coop = runs[(runs.series == "coop end") & (runs.shots == shots) & runs.dataset.isin(zero.index)]
    if coop.empty:
        at = frames.in_shots(shots)
        raise frames.Missing(f"no dataset has both zero_shot and CoOp (class at the end) at {at}")
    gains = frames.summarize(coop, ["dataset"])
    gains["zero"] = gains.dataset.map(zero)
    gains["gain"] = gains["mean"] - gains.zero
    gains = gains.sort_values("gain", ascending=False, kind="stable")
    title = f"{name_of('coop end', length)}, {frames.in_shots(shots)}, over zero-shot CLIP"
    table = Table(f"{title} ({piece.subtitle})", ("dataset",), ("zero-shot", "CoOp", "gain"), "number")
    for row in frames.rows_of(gains):
        own, more = Cell(row.mean, row.std, row.runs), Cell(row.gain, row.std, row.runs, signed=True)
        table.add((row.dataset,), {"zero-shot": Cell(row.zero), "CoOp": own, "gain": more})

    figure, (axis,) = panel_figure([""], 1, (ONE_COLUMN, 0.24 * len(gains) + 1.0), piece.subtitle, XLABEL)
    places, gain, spread = range(len(gains)), gains.gain, gains["std"].fillna(0.0)
    axis.barh(places, gain, 0.62, color=look("coop end").color)
    axis.errorbar(gain, places, xerr=spread, fmt="none", color="#333333", linewidth=0.9, capsize=1.5)
    reach = max((gain.abs() + spread).max(), 1e-9)
    for place, mean, std in zip(places, gain, spread, strict=True):
        side = 1 if mean >= 0 else -1
        text = f"{mean:+.1f}".replace("-", "−")  # the sign that axes show
        axis.text(mean + side * (std + 0.02 * reach), place, text, va="center", fontsize=7.5,
                  ha="left" if side > 0 else "right", bbox=ON_GRID)  # fmt: skip
    axis.set_yticks(places, [shortened(name, NAME_LENGTH) for name in gains.dataset])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    low, high = min((gain - spread).min(), 0.0), max((gain + spread).max(), 0.0)
    margin = 0.3 * max(high - low, 1e-9)  # for the number beside the longest bar
    axis.set_xlim(low - margin if (gain < 0).any() else low, high + margin)
    axis.axvline(0, color="#333333", linewidth=0.7)
    axis.grid(visible=False, axis="y")
    axis.set_title(fitted(title, ONE_COLUMN), loc="right")
    rows = frames.rows_of(gains.assign(mean=gains.gain))
    bars = {title: [("coop end", row.dataset, row) for row in rows]}
    drawn = chart.bars(bars, XLABEL, lambda series: name_of(series, length))
    return [Exhibit(piece.suffix, piece.subtitle, figure, table, [drawn])]


ITEM = Item(
    "figure4",
    "Figure 4. Gains over hand-written prompts",
    "Absolute improvement of CoOp over zero-shot CLIP with the dataset's hand-written prompt, the largest first; error"
    " bars are one standard deviation over seeds.",
    per_slice(make),
    sweep_command("fig4"),
)
