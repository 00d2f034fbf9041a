"""The README's comparison with the official way, written from the committed benchmark:

python -m tools.quote
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench: written by python -m tools.quote -->", "<!-- /bench -->"
LAYOUTS = ("end", "mid", "class-specific")


def quote(bench: Mapping[str, Any]) -> str:
    """A Markdown table of a ``bench.json``: a line per dataset, a step the official way and ours, per run."""
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
    """``page`` with what stands between the two marks replaced by the quote."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{quote(bench)}\n{END}{after}"


def main(readme: str = "README.md", bench: str = "reports/bench/bench.json") -> None:
    """Rewrite the README in place."""
    path = Path(readme)
    measured = json.loads(Path(bench).read_text(encoding="utf-8"))
    path.write_text(requote(path.read_text(encoding="utf-8"), measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
