"""Compare training steps in bfloat16 with float32 on this CPU: ``python -m tools.precision_speed``.

As many runs train together as fit, with the class token at the end. Steps in both precisions alternate in one process.
Errors are relative, in norm, of one run's class features and context gradients at random contexts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.bench import class_lists, random_backbone
from fastcoop.bench.measure import CONTEXT_LENGTH, LAYOUTS, FastcoopStep, measure, run_counts
from fastcoop.bench.tables import markdown
from fastcoop.engine import encode_prompts
from fastcoop.engine.forest import Trees


def compare_precision(
    backbone: Backbone, precision: torch.dtype, class_names: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Return the seconds of a run's step in the backbone's precision and in ``precision``, and the errors."""
    layout, both = LAYOUTS["end"], (None, precision)
    runs = max(run_counts(backbone, class_names, layout))
    steps = {one: FastcoopStep(backbone, class_names, layout, runs, precision=one) for one in both}
    exact_s, rough_s = (median(times) / runs for times in measure(steps, repeats).values())
    exact, rough = (features_and_gradients(backbone, class_names, one) for one in both)
    feature_error, gradient_error = (
        float((value.double() - reference.double()).norm() / reference.double().norm())
        for value, reference in zip(rough, exact, strict=True)
    )
    return {
        "runs": runs, "exact_run_step_s": exact_s, "run_step_s": rough_s, "faster": exact_s / rough_s,
        "feature_error": feature_error, "gradient_error": gradient_error,
    }  # fmt: skip


def features_and_gradients(
    backbone: Backbone, class_names: Sequence[str], precision: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return class features and context gradients at contexts and upstream gradients drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    contexts = 0.02 * torch.randn(CONTEXT_LENGTH, backbone.text.width, generator=draw)
    contexts = contexts.to(backbone.device).requires_grad_()
    (features,) = encode_prompts(
        backbone, [(class_names, LAYOUTS["end"], contexts)], Trees(backbone, precision)
    )
    upstream = torch.randn(features.shape, generator=draw).to(features)
    (gradients,) = torch.autograd.grad(features, contexts, upstream)
    return features.detach(), gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="RN50")
    parser.add_argument("--datasets", nargs="+", default=["eurosat", "oxford_pets", "imagenet-100"])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    backbone = random_backbone(given.backbone, "cpu")
    rows = [
        {"dataset": name} | compare_precision(backbone, torch.bfloat16, names, given.repeats)
        for name, names in class_lists(given.datasets).items()
    ]
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
