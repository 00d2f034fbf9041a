"""Estimate what Figure 3 of the paper takes from measured step times: every run's steps times the time of its step."""

from __future__ import annotations

from typing import Any

from fastcoop.bench.benchmark import Bench
from fastcoop.engine.runs import BATCH_SIZE

SEEDS = 3
EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}  # by shots
IMAGENET_EPOCHS = 50
# The class in the middle with class-specific contexts has at most one node less than at the end, and counts the same.
VARIANTS = {"end": "end", "mid": "mid", "end+CSC": "class-specific", "mid+CSC": "class-specific"}
ARITHMETIC = (
    "hours = runs x steps per run x seconds per step / 3600. Steps per run = epochs x max(1, images // 32), with 50, "
    "100, 100, 200, 200 epochs at 1, 2, 4, 8, 16 shots (always 50 on ImageNet) and images = shots x classes. There are "
    "4 variants (end, mid, each unified and class-specific) of 5 shots x 3 seeds. Official: image part + text part at "
    "77 tokens, (a). fastcoop: (c) at the best number of runs, averaged over the variants. A dataset's hours are "
    "4 x steps_per_variant x s_per_step / 3600."
)


def project_figure_3(bench: Bench) -> list[dict[str, Any]]:
    """Return a row per dataset: number of runs, steps, and hours by the official method and by fastcoop."""
    rows = []
    for dataset in dict.fromkeys(row["dataset"] for row in bench.rows):
        layouts = {row["layout"]: row for row in bench.rows if row["dataset"] == dataset}
        end = layouts["end"]
        steps = SEEDS * sum(_steps(dataset, end["classes"], shots) for shots in EPOCHS)
        official = end["official_image_s"] + end["official_text_s"]
        ours = sum(layouts[layout]["best_run_step_s"] for layout in VARIANTS.values())
        rows.append({
            "dataset": dataset,
            "runs": len(EPOCHS) * SEEDS * len(VARIANTS),
            "steps_per_variant": steps,
            "official_s_per_step": official,
            "fastcoop_s_per_step": ours / len(VARIANTS),
            "official_hours": steps * len(VARIANTS) * official / 3600,
            "fastcoop_hours": steps * ours / 3600,
        })  # fmt: skip
    return rows


def _steps(dataset: str, classes: int, shots: int) -> int:
    epochs = IMAGENET_EPOCHS if dataset == "imagenet" else EPOCHS[shots]
    return epochs * max(1, shots * classes // BATCH_SIZE)
