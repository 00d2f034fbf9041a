"""What a lower precision brings and costs: a step's time, and the error of features and gradients."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.bench.measure import LAYOUTS, equal_runs, run_counts
from fastcoop.bench.timing import measure
from fastcoop.engine.forest import plant
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees


def compare_precision(
    backbone: Backbone, precision: torch.dtype, name: str, classes: list[str], repeats: int
) -> dict[str, Any]:
    """Steps of as many runs as fit, layout end, in the backbone's precision and in ``precision``, in turn.

    Errors are relative, in norm, for one run's class features and context gradients at random contexts.
    """
    trees, rounded, layout = Trees(backbone), Trees(backbone, precision), LAYOUTS["end"]
    runs = max(run_counts(backbone, classes, layout))
    contenders = {
        which: equal_runs(backbone, which, classes, layout, runs, repeats) for which in (trees, rounded)
    }
    times = measure({which: batch.step for which, batch in contenders.items()}, repeats, backbone.device)
    seconds = {which: statistics.median(values) / runs for which, values in times.items()}
    exact, rough = (_pass(which, classes) for which in (trees, rounded))
    return {
        "dataset": name,
        "layout": "end",
        "runs": runs,
        "precision": str(rounded.tower.dtype).removeprefix("torch."),
        "exact_run_step_s": seconds[trees],
        "run_step_s": seconds[rounded],
        "feature_error": _relative(rough[0], exact[0]),
        "gradient_error": _relative(rough[1], exact[1]),
    }


def _pass(trees: Trees, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Class features and context gradients at contexts and upstream gradients drawn from a fixed seed."""
    tower = trees.tower
    plan, constants = trees[tuple(classes), LAYOUTS["end"]]
    draw = torch.Generator().manual_seed(0)
    contexts = 0.02 * torch.randn(1, plan.slot_count, tower.width, generator=draw)
    upstream = torch.randn(1, len(classes), tower.dim, generator=draw)
    forest_pass = ForestPass(plant(tower, [(plan, constants, 1)]))
    features = forest_pass.forward([contexts.to(tower.device)])[0]
    return features, forest_pass.backward([upstream.to(tower.device)])[0]


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
