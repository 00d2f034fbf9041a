"""The benchmark as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop.bench.measure import Bench
from fastcoop.bench.project import project_figure_3

COLORS = {"end": "#0072B2", "mid": "#D55E00", "class-specific": "#009E73"}


def table(bench: Bench) -> pd.DataFrame:
    """One line per dataset and layout, the columns named as the README explains them."""
    lines = []
    for row in bench.rows:
        ours = row["best_run_step_s"]
        whole = row["official_image_s"] + row["official_text_s"]
        partial = row["official_measured_classes"] < row["classes"]
        lines.append(
            {
                "dataset": row["dataset"],
                "layout": row["layout"],
                "nodes": row["nodes"],
                "fewer tokens": row["official_tokens"] / row["nodes"],
                "(a) s": whole,
                "(b) s": row["official_text_s"],
                "(b') s": row["official_cut_s"],
                **{f"(c) {runs} s": seconds for runs, seconds in _named_runs(row).items()},
                "runs": row["best_runs"],
                "(b)/(c)": row["official_text_s"] / ours,
                "(b')/(c)": row["official_cut_s"] / ours,
                "(a)/(c)": whole / ours,
                "of matmul": row["flops_per_s"] / row["matmul_flops_per_s"],
                "GB": row["peak_bytes"][row["best_runs"]] / 1e9,
                "scaled": "scaled" if partial else "",
            }
        )
    return pd.DataFrame(lines)


def projection(bench: Bench) -> pd.DataFrame:
    """Figure 3's 660 trainings from the measured step times, a line per dataset and their sum."""
    frame = pd.DataFrame(project_figure_3(bench))
    total = frame.drop(columns="dataset").sum().to_frame().T
    return pd.concat([frame, total.assign(dataset="all")], ignore_index=True)


def write_bench(bench: Bench, folder: Path) -> list[Path]:
    """Write bench.json, bench.md and bench.png into ``folder``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# Training steps, measured",
        "",
        ", ".join(f"{key}: {value}" for key, value in bench.machine.items()),
        "",
        markdown(table(bench)),
        "",
        "## Growth",
        "",
        markdown(pd.DataFrame(bench.growth)),
        "",
        "## Figure 3 of the paper, projected",
        "",
        markdown(projection(bench)),
    ]
    _write(folder / "bench.json", json.dumps(asdict(bench), indent=1))
    _write(folder / "bench.md", "\n".join(text) + "\n")
    draw(bench, folder / "bench.png")
    return [folder / name for name in ("bench.json", "bench.md", "bench.png")]


def markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table, numbers to three figures."""
    shown = frame.map(lambda v: f"{v:.3g}" if isinstance(v, float) and abs(v) < 1000 else _plain(v))
    lines = [
        list(map(str, shown.columns)),
        ["---"] * len(shown.columns),
        *shown.astype(str).to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(bench: Bench, path: Path) -> None:
    """Speed-up of a step per dataset: the text part against its node ratio, and the whole step."""
    import matplotlib.pyplot as plt

    frame = table(bench)
    datasets = list(dict.fromkeys(frame["dataset"]))
    fig, axes = plt.subplots(1, 2, figsize=(9, 0.42 * len(datasets) + 1.4), sharey=True, layout="constrained")
    for i, (layout, color) in enumerate(COLORS.items()):
        rows = frame[frame["layout"] == layout].set_index("dataset").loc[datasets]
        y = [k + 0.26 * (i - 1) for k in range(len(datasets))]
        axes[0].barh(y, rows["(b)/(c)"], 0.24, color=color, label=layout)
        axes[0].plot(rows["fewer tokens"], y, "k|", markersize=7, label="node ratio" if not i else None)
        axes[1].barh(y, rows["(a)/(c)"], 0.24, color=color)
    axes[0].set_yticks(range(len(datasets)), datasets)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("text part: official time / ours, per run")
    axes[1].set_xlabel("whole step, images included: official time / ours")
    axes[1].set_xscale("log")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    fig.suptitle(
        f"{bench.machine['device']}, {bench.machine['threads']} threads, {bench.machine['dtype']}", fontsize=9
    )
    fig.savefig(path, dpi=160)
    plt.close(fig)


def _named_runs(row: dict[str, Any]) -> dict[str, float]:
    """Seconds per run-step for 1, 8 and the most runs together."""
    per_run = row["run_step_s"]
    return {"1": per_run[1], "8": per_run.get(8, float("nan")), "most": per_run[max(per_run)]}


def _plain(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
