"""The benchmark as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop import escape
from fastcoop.bench.project import ARITHMETIC, project_figure_3
from fastcoop.bench.run import Bench

COLORS = {"end": "#0072B2", "mid": "#D55E00", "class-specific": "#009E73"}
LEGEND = (
    "Seconds per run-step: (a) the official way, 32 images and 77-token prompts; (b) its text part alone; "
    "(b') the text part cut to the longest prompt; (c) fastcoop, one run alone, 8 together, as many as "
    "fit. `of matmul`: floating-point rate as a share of matrix products at the tower's own shapes, as much work "
    "of them, in turn with its layers. `runs`: the number of runs where that share is greatest, and so, on a machine "
    "of steady speed, the time per run least; the ratios are of it. GB: what the batch holds. "
    "`scaled`: all classes did not fit in memory the official way; (a) and (b) were measured on so many of them and "
    "scaled to all."
)


def table(bench: Bench) -> pd.DataFrame:
    """One line per dataset and layout, the columns named as the README explains them."""
    lines = []
    for row in bench.rows:
        ours = row["best_run_step_s"]
        whole = row["official_image_s"] + row["official_text_s"]
        measured = row["official_measured_classes"]
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
                "of matmul": row["matmul_share"][row["best_runs"]],
                "GB": row["bytes_held"][row["best_runs"]] / 1e9,
                "scaled": f"from {measured:,}" if measured < row["classes"] else "",
            }
        )
    return pd.DataFrame(lines)


def work(bench: Bench) -> pd.DataFrame:
    """Operations per run-step, the official way's and those our trees need, and the rates they were done at."""
    return pd.DataFrame(
        {
            "dataset": row["dataset"],
            "layout": row["layout"],
            "official tokens": row["official_tokens"],
            "nodes": row["nodes"],
            "official GFLOP": row["official_text_flops"] / 1e9,
            "GFLOP": row["flops_per_run"] / 1e9,
            "GFLOP/s": row["flops_per_s"] / 1e9,
            "matmul GFLOP/s": row["matmul_flops_per_s"] / 1e9,
            "GB held": row["bytes_held"][row["best_runs"]] / 1e9,
            "GB estimated": row["bytes_estimated"][row["best_runs"]] / 1e9,
        }
        for row in bench.rows
    )


def precision_table(bench: Bench) -> pd.DataFrame:
    """A second precision beside the backbone's: seconds per run-step, and relative errors."""
    frame = pd.DataFrame(bench.precision)
    return frame.assign(faster=frame["exact_run_step_s"] / frame["run_step_s"])


def projection(bench: Bench) -> pd.DataFrame:
    """Figure 3's 660 trainings from the measured step times, a line per dataset and their sum."""
    frame = pd.DataFrame(project_figure_3(bench))
    sums = ["runs", "official_hours", "fastcoop_hours", "official_exaflop", "fastcoop_exaflop"]
    total = frame[sums].sum().to_frame().T
    return pd.concat([frame, total.assign(dataset="all")], ignore_index=True)


def write_json(bench: Bench, folder: Path) -> None:
    """Write bench.json into ``folder``: also what is measured so far, so that half an hour is never lost."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "bench.json", json.dumps(asdict(bench), indent=1))


def write_bench(bench: Bench, folder: Path) -> list[Path]:
    """Write bench.json, bench.md and bench.png into ``folder``; return their paths."""
    text = [
        "# Training steps, measured",
        "",
        ", ".join(f"{key}: {value}" for key, value in bench.machine.items()),
        "",
        LEGEND,
        "",
        markdown(table(bench)),
        "",
        "## Work",
        "",
        markdown(work(bench)),
        "",
        "## Growth",
        "",
        markdown(pd.DataFrame(bench.growth)),
        "",
        "## Figure 3 of the paper, projected",
        "",
        ARITHMETIC,
        "",
        markdown(projection(bench)),
    ]
    if bench.precision:
        text += ["", "## A lower precision", "", markdown(precision_table(bench))]
    write_json(bench, folder)
    _write(folder / "bench.md", "\n".join(text) + "\n")
    draw(bench, folder / "bench.png")
    return [folder / name for name in ("bench.json", "bench.md", "bench.png")]


def markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table, numbers to three figures."""
    frame = frame.astype(object).where(frame.notna(), "")
    shown = frame.map(lambda v: f"{v:.3g}" if isinstance(v, float) and abs(v) < 999.5 else _plain(v))
    rows = [list(map(str, shown.columns)), *shown.astype(str).to_numpy().tolist()]
    lines = [[escape.markdown(text) for text in row] for row in rows]
    lines.insert(1, ["---"] * len(shown.columns))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(bench: Bench, path: Path) -> None:
    """Draw the speed-up of a step per dataset: the text part against its node ratio, and the whole step."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is a $
        _draw(bench, path)


def _draw(bench: Bench, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    frame = table(bench)
    datasets = list(dict.fromkeys(frame["dataset"]))
    fig, axes = plt.subplots(1, 2, figsize=(9, 0.42 * len(datasets) + 1.7), sharey=True, layout="constrained")
    for i, (layout, color) in enumerate(COLORS.items()):
        rows = frame[frame["layout"] == layout].set_index("dataset").loc[datasets]
        y = [k + 0.26 * (i - 1) for k in range(len(datasets))]
        axes[0].barh(y, rows["(b)/(c)"], 0.24, color=color, label=layout)
        axes[0].plot(rows["fewer tokens"], y, "k|", markersize=7, label="node ratio" if not i else None)
        axes[1].barh(y, rows["(a)/(c)"], 0.24, color=color)
    axes[0].set_yticks(range(len(datasets)), map(escape.visible, datasets))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("text part: official time / ours, per run")
    axes[1].set_xlabel("whole step, images included: official time / ours")
    axes[1].set_xscale("log")
    axes[1].set_xlim(left=1)
    axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter("{x:g}x")
    axes[1].xaxis.set_minor_locator(NullLocator())
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=len(labels))
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
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
