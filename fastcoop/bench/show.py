"""The benchmark as tables and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop import escape
from fastcoop.bench.benchmark import Bench
from fastcoop.bench.project import ARITHMETIC, project_figure_3
from fastcoop.files import atomic_write

LEGEND = (
    "Seconds per run and step: (a) the official method, 32 images and prompts of 77 tokens; (b) its text part alone; "
    "(b') its text part with prompts cut to the longest one; (c) fastcoop, with 1 run alone, 8 together, and as many "
    "as fit. `of matmul`: floating-point rate as a share of that of matrix products of the text tower's sizes, "
    "measured right after the step. `runs`: the number of runs with the largest share; the ratios are for it. "
    "`GFLOP`: operations per run and step. `GB`: planned memory of the batch. `scaled`: not all classes fit in memory "
    "in an official step; (a) and (b) were measured on this many of them and scaled to all."
)


def table(bench: Bench) -> pd.DataFrame:
    """Return one line per dataset and layout, with the columns that ``LEGEND`` explains."""
    lines = []
    for row in bench.rows:
        ours, per_run, best = row["best_run_step_s"], row["run_step_s"], row["best_runs"]
        whole, measured = row["official_image_s"] + row["official_text_s"], row["official_measured_classes"]
        lines.append({
            "dataset": row["dataset"],
            "layout": row["layout"],
            "nodes": row["nodes"],
            "fewer tokens": row["official_tokens"] / row["nodes"],
            "(a) s": whole,
            "(b) s": row["official_text_s"],
            "(b') s": row["official_cut_s"],
            "(c) 1 s": per_run[1],
            "(c) 8 s": per_run.get(8, float("nan")),
            "(c) most s": per_run[max(per_run)],
            "runs": best,
            "(b)/(c)": row["official_text_s"] / ours,
            "(b')/(c)": row["official_cut_s"] / ours,
            "(a)/(c)": whole / ours,
            "of matmul": row["matmul_share"][best],
            "official GFLOP": row["official_text_flops"] / 1e9,
            "GFLOP": row["flops_per_run"] / 1e9,
            "GFLOP/s": row["flops_per_s"] / 1e9,
            "GB": row["bytes_planned"][best] / 1e9,
            "scaled": f"from {measured:,}" if measured < row["classes"] else "",
        })  # fmt: skip
    return pd.DataFrame(lines)


def precision_table(bench: Bench) -> pd.DataFrame:
    """Return a second precision beside the backbone's: seconds per run and step, and relative errors."""
    frame = pd.DataFrame(bench.precision)
    return frame.assign(faster=frame["exact_run_step_s"] / frame["run_step_s"])


def projection(bench: Bench) -> pd.DataFrame:
    """Return the estimated hours of Figure 3's 660 trainings, a line per dataset and their sum."""
    frame = pd.DataFrame(project_figure_3(bench))
    total = frame[["runs", "official_hours", "fastcoop_hours"]].sum().to_frame().T
    return pd.concat([frame, total.assign(dataset="all")], ignore_index=True)


def write_json(bench: Bench, folder: Path) -> None:
    """Write bench.json into ``folder``."""
    with atomic_write(folder / "bench.json") as part:
        part.write_text(json.dumps(asdict(bench), indent=1), encoding="utf-8")


def write_bench(bench: Bench, folder: Path) -> list[Path]:
    """Write bench.json and bench.md into ``folder``; return their paths."""
    machine = ", ".join(f"{key}: {value}" for key, value in bench.machine.items())
    text = ["# Training steps, measured", machine, LEGEND, markdown(table(bench))]
    text += ["## Figure 3 of the paper, projected", ARITHMETIC, markdown(projection(bench))]
    if bench.precision:
        text += ["## A lower precision", markdown(precision_table(bench))]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(bench, folder)
    with atomic_write(folder / "bench.md") as part:
        part.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return [folder / "bench.json", folder / "bench.md"]


def markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers to three digits, empty where there is none."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[escape.markdown(_shown(value)) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
