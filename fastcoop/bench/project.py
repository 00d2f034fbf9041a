"""What Figure 3 of the paper would take, from measured step times: every run's steps times its step time."""

from __future__ import annotations

from typing import Any

from fastcoop.bench.run import Bench
from fastcoop.engine.run import BATCH_SIZE

SHOTS = (1, 2, 4, 8, 16)
SEEDS = 3
ARITHMETIC = (
    "hours = runs x steps per run x seconds per step / 3600. Steps per run = epochs x max(1, images // "
    "32), epochs 50, 100, 100, 200, 200 at 1, 2, 4, 8, 16 shots (always 50 on ImageNet), images = shots x "
    "classes; a variant has 5 shots x 3 seeds, and there are 4 variants (end, mid, each unified and "
    "class-specific). Official: image part + text part at 77 tokens, (a); fastcoop: (c) at the best "
    "number of runs, averaged over the variants. Every dataset's hours are 4 x steps_per_variant x "
    "s_per_step / 3600."
)
EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}
IMAGENET_EPOCHS = 50
VARIANTS = {"end": "end", "mid": "mid", "end+CSC": "class-specific", "mid+CSC": "class-specific"}


def project_figure_3(bench: Bench) -> list[dict[str, Any]]:
    """Return a row per dataset: runs, steps, and hours the official way and ours.

    Hours are steps x seconds per step: the official way's image and text part for each run by itself; ours at the
    best measured number of runs together. The class at mid with class-specific contexts has one node fewer or none
    than at the end, and is counted as the latter.
    """
    rows = []
    by_dataset: dict[str, dict[str, dict[str, Any]]] = {}
    for row in bench.rows:
        by_dataset.setdefault(row["dataset"], {})[row["layout"]] = row
    for dataset, layouts in by_dataset.items():
        classes = layouts["end"]["classes"]
        steps = sum(_steps(dataset, classes, shots) for shots in SHOTS) * SEEDS
        official = layouts["end"]["official_image_s"] + layouts["end"]["official_text_s"]
        ours = sum(layouts[layout]["best_run_step_s"] for layout in VARIANTS.values())
        rows.append(
            {
                "dataset": dataset,
                "runs": len(SHOTS) * SEEDS * len(VARIANTS),
                "steps_per_variant": steps,
                "official_s_per_step": official,
                "fastcoop_s_per_step": ours / len(VARIANTS),
                "official_hours": steps * len(VARIANTS) * official / 3600,
                "fastcoop_hours": steps * ours / 3600,
                "official_exaflop": steps * len(VARIANTS) * layouts["end"]["official_text_flops"] / 1e18,
                "fastcoop_exaflop": steps
                * sum(layouts[v]["flops_per_run"] for v in VARIANTS.values())
                / 1e18,
            }
        )
    return rows


def _steps(dataset: str, classes: int, shots: int) -> int:
    epochs = IMAGENET_EPOCHS if dataset == "imagenet" else EPOCHS[shots]
    return epochs * max(1, shots * classes // BATCH_SIZE)
