"""The benchmark as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop import escape
from fastcoop.files import atomic_write

LEGEND = (
    "Seconds per run and step: (a) the official method, 32 images and prompts of 77 tokens; (b) its text part alone; "
    "(b') its text part with prompts cut to the longest one; (c) fastcoop, with 1 run alone, 8 together, and as many "
    "as fit. `of matmul`: floating-point rate as a share of that of matrix products of the text tower's sizes, "
    "measured right after the step. `runs`: the number of runs with the largest share; the ratios are for it. "
    "`GFLOP`: operations per run and step. `GB`: planned memory of the batch. `scaled`: not all classes fit in memory "
    "in an official step; (a) and (b) were measured on this many of them and scaled to all."
)
GPU_LEGEND = (
    "A step of equal runs with about as many rows as named, recorded and replayed, by CUDA events. (c): milliseconds "
    "per run and step; (a): an official step, 32 images and prompts of 77 tokens; (b): its text part. `of matmul`: "
    "floating-point rate as a share of that of matrix products of the text tower's sizes with as many rows. "
    "`launches`: kernels of a step. `GB`: highest memory in use; `planned GB`: its estimate. `scaled`: not all classes "
    "fit in memory in an official step; (a) and (b) were measured on this many of them and scaled to all."
)
RATES_LEGEND = (
    "The GPU's rates in TFLOP/s: of square products, and of the products of a text block by number of rows; and of "
    "memory copies, reading and writing counted."
)
FIGURE = (
    "Figure 3 in hours. Caching: all images and views that can be drawn, at the rate of cropping and encoding JPEG "
    "files. Probes: 165 searches, the time of one scaled by images x classes. Trainings: operations by the rate of "
    "measured steps. Tests: class features and logits of 660 runs. The report: 836 runs, with their records. Official: "
    "measured steps, one run at a time, which encode their images again; its probes are not measured."
)


@dataclass
class Bench:
    """Measurements, ready for JSON.

    Attributes:
        machine: Device, threads, versions and settings.
        rows: One entry per dataset and layout.
        rates: On a GPU, one entry per precision: the rates of products and copies.
        projection: One entry per part of Figure 3, if it was projected (`fastcoop.bench.figure`).
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    projection: list[dict[Hashable, Any]] = field(default_factory=list)


def table(bench: Bench) -> pd.DataFrame:
    """Return one line per dataset and layout, with the columns that ``LEGEND`` explains."""
    lines = []
    for row in bench.rows:
        ours, per_run, best = row["best_run_step_s"], row["run_step_s"], row["best_runs"]
        text, measured = row["official_text_s"], row["official_measured_classes"]
        whole = row["official_image_s"] + text
        lines.append({
            "dataset": row["dataset"], "layout": row["layout"], "nodes": row["nodes"],
            "fewer tokens": row["official_tokens"] / row["nodes"], "(a) s": whole, "(b) s": text,
            "(b') s": row["official_cut_s"], "(c) 1 s": per_run[1], "(c) 8 s": per_run.get(8, float("nan")),
            "(c) most s": per_run[max(per_run)], "runs": best, "(b)/(c)": text / ours,
            "(b')/(c)": row["official_cut_s"] / ours, "(a)/(c)": whole / ours, "of matmul": row["matmul_share"][best],
            "official GFLOP": row["official_text_flops"] / 1e9, "GFLOP": row["flops_per_run"] / 1e9,
            "GFLOP/s": row["flops_per_s"] / 1e9, "GB": row["bytes_planned"][best] / 1e9,
            "scaled": f"from {measured:,}" if measured < row["classes"] else "",
        })  # fmt: skip
    return pd.DataFrame(lines)


def gpu_table(bench: Bench) -> pd.DataFrame:
    """Return one line per precision, dataset, layout and size of a step, with the columns of ``GPU_LEGEND``."""
    lines = []
    for row in bench.rows:
        ours, text = row["best_run_step_s"], row["official_text_s"]
        whole, measured = row["official_image_s"] + text, row["official_measured_classes"]
        lines.append({
            "precision": row["precision"], "dataset": row["dataset"], "layout": row["layout"], "runs": row["runs"],
            "rows": row["rows"], "step ms": 1e3 * row["step_s"], "(c) ms": 1e3 * ours, "(a) ms": 1e3 * whole,
            "(b) ms": 1e3 * text, "(b)/(c)": text / ours, "(a)/(c)": whole / ours,
            "TFLOP/s": row["flops_per_s"] / 1e12, "of matmul": row["matmul_share"], "launches": row["launches"],
            "GB": row["peak_bytes"] / 1e9, "planned GB": row["planned_bytes"] / 1e9,
            "scaled": f"from {measured:,}" if measured < row["classes"] else "",
        })  # fmt: skip
    return pd.DataFrame(lines)


def rates_table(bench: Bench) -> pd.DataFrame:
    """Return one line per precision: the highest rates of a GPU."""
    lines = []
    for rates in bench.rates:
        products = {f"{rows:,} rows": rate / 1e12 for rows, rate in rates["products_flops_per_s"].items()}
        square, copied = rates["square_flops_per_s"] / 1e12, rates["copy_bytes_per_s"] / 1e12
        lines.append({"precision": rates["precision"], "square": square, **products, "copy TB/s": copied})
    return pd.DataFrame(lines)


def kernels_table(bench: Bench, most: int = 10) -> pd.DataFrame:
    """Return the ``most`` kernels that take the longest in each step that was measured on a GPU."""
    facts = ("precision", "dataset", "layout", "rows")
    lines = [
        {name: row[name] for name in facts}
        | {"kernel": kernel["name"], "launches": kernel["launches"], "ms": 1e3 * kernel["seconds"]}
        for row in bench.rows
        for kernel in row["kernels"][:most]
    ]
    return pd.DataFrame(lines)


def sections(bench: Bench, profile: bool = False) -> list[str]:
    """Return the tables of a benchmark with their legends, in Markdown; ``profile`` adds the kernels of a GPU."""
    if bench.rates:
        parts = [RATES_LEGEND, markdown(rates_table(bench)), GPU_LEGEND, markdown(gpu_table(bench))]
        parts += ["## The longest kernels of each step", markdown(kernels_table(bench))] if profile else []
    else:
        parts = [LEGEND, markdown(table(bench))]
    return parts + ([FIGURE, markdown(pd.DataFrame(bench.projection))] if bench.projection else [])


def write_bench(bench: Bench, folder: Path) -> list[Path]:
    """Write bench.json and bench.md into ``folder``; return their paths."""
    machine = ", ".join(f"{key}: {value}" for key, value in bench.machine.items())
    text = ["# Training steps, measured", machine, *sections(bench, profile=True)]
    content = {"bench.json": json.dumps(asdict(bench), indent=1), "bench.md": "\n\n".join(text) + "\n"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part_text in content.items():
        with atomic_write(folder / name) as part:
            part.write_text(part_text, encoding="utf-8")
    return [folder / name for name in content]


def markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers to three digits, empty where there is none."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[escape.markdown(_shown(value)) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
