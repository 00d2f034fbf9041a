"""Time a run's step on the plain path beside the shared one, on the same causal tower: ``python tools/plain_path.py``.

Both paths compute the features of the same contexts and their gradients, alternately, in one process; the median of
the ratios is printed for each number of classes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from fastcoop.backbones import Backbone, PlainTower, PromptPath
from fastcoop.backbones.precision import limit_threads
from fastcoop.bench.benchmark import class_lists, random_backbone
from fastcoop.engine.forest import Trees
from fastcoop.engine.tower import build_pass, new_workspace
from fastcoop.engine.weights import row_rule
from fastcoop.prompts import PromptLayout


def on_plain_path(backbone: Backbone) -> Backbone:
    """Return the backbone with all positions of all prompts computed."""
    other, path = replace(backbone), PromptPath("plain", "the shared path is compared with it")
    other.__dict__.update(
        text=PlainTower.from_model(backbone.model, backbone.text.context_length), prompt_path=path
    )
    return other


class Step:
    """The text side of a training step of ``runs`` runs."""

    def __init__(self, backbone: Backbone, names: list[str], runs: int):
        trees, layout = Trees(backbone), PromptLayout(16)
        self.heads, key = trees.tower.heads, (tuple(names), layout)
        self.forward_backward = build_pass(trees.tower, [(trees[key], runs)], row_rule(trees.tower))
        self.workspace: Any = new_workspace(trees.tower)
        self.vectors = 0.02 * torch.randn(runs * 16, backbone.text.width, device=backbone.device)
        self.rows = trees[key].rows

    def __call__(self) -> float:
        start = time.perf_counter()
        with limit_threads(self.heads):
            features = self.forward_backward.forward(self.vectors, self.workspace)
            self.forward_backward.backward(features, self.workspace)
        if self.vectors.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B-32")
    parser.add_argument("--datasets", nargs="+", default=["eurosat", "oxford_pets", "imagenet-100"])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    backbone = random_backbone(given.backbone)
    for name, names in class_lists(given.datasets).items():
        shared, plain = (Step(one, names, given.runs) for one in (backbone, on_plain_path(backbone)))
        times = [(shared(), plain()) for _ in range(given.repeats + 1)][1:]
        ratio = median(slow / fast for fast, slow in times)
        took = ", ".join(
            f"{what} {1000 * median(column) / given.runs:.0f} ms ({step.rows:,} rows)"
            for what, column, step in zip(
                ("shared", "plain"), zip(*times, strict=True), (shared, plain), strict=True
            )
        )
        print(f"{name} ({len(names)} classes), a run's step: {took}; plain / shared {ratio:.1f}")


if __name__ == "__main__":
    main()
