"""Copy the committed benchmark into the documents: ``python -m tools.quote``.

Rewrites the README's table and ``reports/bench/bench.png`` from ``reports/bench/bench.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench: written by python -m tools.quote -->", "<!-- /bench -->"
LAYOUTS = {"end": "#0072B2", "mid": "#D55E00", "class-specific": "#009E73"}


def quote(bench: Mapping[str, Any]) -> str:
    """Return a Markdown table of a ``bench.json``: per dataset, the seconds of an official step and of fastcoop's."""
    machine, rows = bench["machine"], bench["rows"]
    lines = [
        "| dataset (classes) | official | " + " | ".join(f"fastcoop, {layout}" for layout in LAYOUTS) + " |",
        "|" + " --- |" * (2 + len(LAYOUTS)),
    ]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        of_dataset = {row["layout"]: row for row in rows if row["dataset"] == name}
        first = next(iter(of_dataset.values()))
        official = first["official_image_s"] + first["official_text_s"]
        scaled = ", scaled" * (first["official_measured_classes"] < first["classes"])
        cells = [f"{name} ({first['classes']:,})", f"{official:.3g} s{scaled}"]
        for layout in LAYOUTS:
            ours = of_dataset[layout]["best_run_step_s"] if layout in of_dataset else None
            cells.append(f"{ours:.2g} s, {official / ours:.0f}x" if ours else "")
        lines.append("| " + " | ".join(cells) + " |")
    where = f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}, {machine['backbone']}"
    note = (
        f"*{where}, M = {machine['context_length']}; seconds per run and step. Scaled: from part of the classes. "
        f"Without images, layout end is {_span(_of_text(rows), '.0f')} times as fast as the official text part; "
        f"all layouts reach {_span(_of_products(rows), '.2f')} of the rate of matrix products at the tower's shapes.*"
    )
    return "\n".join([*lines, "", note])


def _of_text(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["official_text_s"] / row["best_run_step_s"] for row in rows if row["layout"] == "end"]


def _of_products(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["matmul_share"][str(row["best_runs"])] for row in rows]


def _span(numbers: Sequence[float], digits: str) -> str:
    return f"{min(numbers):{digits}} to {max(numbers):{digits}}"


def requote(page: str, bench: Mapping[str, Any]) -> str:
    """Return ``page`` with the text between the two marks replaced by the table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{quote(bench)}\n{END}{after}"


def draw(bench: Mapping[str, Any], path: Path) -> None:
    """Draw how much faster a step is on each dataset: the text part beside its node ratio, and the whole step."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    rows, machine = bench["rows"], bench["machine"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    fig, (text, whole) = plt.subplots(
        1, 2, figsize=(9, 0.42 * len(datasets) + 1.7), sharey=True, layout="constrained"
    )
    for i, (layout, color) in enumerate(LAYOUTS.items()):
        of_layout = {row["dataset"]: row for row in rows if row["layout"] == layout}
        ordered = [of_layout[name] for name in datasets]
        y = [place + 0.26 * (i - 1) for place in range(len(datasets))]
        times = [row["official_text_s"] / row["best_run_step_s"] for row in ordered]
        text.barh(y, times, 0.24, color=color, label=layout)
        ratios = [row["official_tokens"] / row["nodes"] for row in ordered]
        text.plot(ratios, y, "k|", markersize=7, label="node ratio" if not i else None)
        official = [row["official_image_s"] + row["official_text_s"] for row in ordered]
        times = [one / row["best_run_step_s"] for one, row in zip(official, ordered, strict=True)]
        whole.barh(y, times, 0.24, color=color)
    text.set_yticks(range(len(datasets)), datasets)
    text.invert_yaxis()
    text.set_xlabel("text part: official time / fastcoop's, per run")
    whole.set_xlabel("whole step, images included: official time / fastcoop's")
    whole.set_xscale("log")
    whole.set_xlim(left=1)
    whole.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    whole.xaxis.set_major_formatter("{x:g}x")
    whole.xaxis.set_minor_locator(NullLocator())
    for axis in (text, whole):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    handles, labels = text.get_legend_handles_labels()
    fig.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=len(labels))
    fig.suptitle(f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}", fontsize=9)
    fig.savefig(path, dpi=160)


def main(readme: str = "README.md", bench: str = "reports/bench/bench.json") -> None:
    """Rewrite the README and the figure in place."""
    path = Path(readme)
    measured = json.loads(Path(bench).read_text(encoding="utf-8"))
    path.write_text(requote(path.read_text(encoding="utf-8"), measured), encoding="utf-8")
    draw(measured, Path(bench).with_suffix(".png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
