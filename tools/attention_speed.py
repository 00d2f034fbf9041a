"""Compare training steps on this CPU with and without its kernel: ``python -m tools.attention_speed``.

Both train as many runs as fit, and alternate in one process of one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import pandas as pd
import torch

from fastcoop.bench import class_lists, random_backbone
from fastcoop.bench.measure import LAYOUTS, FastcoopStep, measure, run_counts
from fastcoop.bench.tables import markdown
from fastcoop.engine.kernels import cpu


def without_kernel(step: FastcoopStep) -> Callable[[], float]:
    """Return the same step with attention prompt by prompt."""

    def seconds() -> float:
        with patch.object(cpu, "library", lambda: None):
            return step()

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B-32")
    parser.add_argument("--datasets", nargs="+", default=["eurosat", "oxford_pets", "imagenet-100"])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if cpu.library() is None:
        raise SystemExit("Expected a C compiler, got none: the kernel cannot be compiled.")
    torch.set_num_threads(1)
    backbone, rows = random_backbone(given.backbone, "cpu"), []
    for name, names in class_lists(given.datasets).items():
        for layout, settings in LAYOUTS.items():
            step = FastcoopStep(backbone, names, settings, max(run_counts(backbone, names, settings)))
            times = measure({"kernel": step, "plain": without_kernel(step)}, given.repeats)
            ratio = median(slow / fast for fast, slow in zip(*times.values(), strict=False))
            rows.append({"dataset": name, "layout": layout, "runs": len(step.runs), "faster": ratio})
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
