"""A dataset's contenders: the official way, in parts, and fastcoop with 1, 8 and as many runs as fit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastcoop.backbones import Backbone
from fastcoop.bench.beside import BesideProducts
from fastcoop.bench.official import OfficialStep, classes_that_fit, longest_prompt, official_text_flops
from fastcoop.bench.timing import matmul, matmul_flops, measure, share_of, warm_ups
from fastcoop.engine.batch import Active, Batch
from fastcoop.engine.buffers import Buffers
from fastcoop.engine.fit import RunShape, TrainingPlan, plan_training
from fastcoop.engine.graph import WORTH_IT
from fastcoop.engine.run import BATCH_SIZE, Run
from fastcoop.engine.trees import Trees
from fastcoop.prompts import PromptLayout

CONTEXT_LENGTH = 16
LAYOUTS = {
    "end": PromptLayout(CONTEXT_LENGTH, "end"),
    "mid": PromptLayout(CONTEXT_LENGTH, "mid"),
    "class-specific": PromptLayout(CONTEXT_LENGTH, "end", class_specific=True),
}
GROWTH_RUNS = (1, 2, 4, 8, 16, 32, 64)


def measure_dataset(backbone: Backbone, name: str, classes: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row per layout of everything measured on these class names, ready for JSON."""
    trees = Trees(backbone)
    # Where memory does not take them all, the official way is measured on some, scaled, and marked so.
    part = classes[: classes_that_fit(trees.tower, backbone.text.context_length)]
    scale = len(classes) / len(part)
    images = torch.randn(BATCH_SIZE, 3, backbone.image_size, backbone.image_size)
    images = images.to(backbone.device, backbone.dtype)
    labels = torch.arange(BATCH_SIZE, device=backbone.device) % len(part)
    longest = longest_prompt(backbone, classes, CONTEXT_LENGTH)
    whole = OfficialStep(backbone, part, CONTEXT_LENGTH, backbone.text.context_length)
    cut = OfficialStep(backbone, part, CONTEXT_LENGTH, longest)
    features = whole.encode_images(images)

    contenders: dict[Any, Callable[[], Any]] = {
        "image": lambda: whole.encode_images(images),
        "text": lambda: whole.learn(features, labels),
        "cut": lambda: cut.learn(features, labels),
    }
    buffers = Buffers(trees.tower.dtype, trees.tower.device)  # one after another, they share their memory
    held: dict[tuple[str, int], int] = {}
    flops: dict[tuple[str, int], float] = {}
    beside: dict[tuple[str, int], BesideProducts] = {}
    multiply = matmul(trees)
    for layout in LAYOUTS:
        for runs in run_counts(backbone, classes, LAYOUTS[layout]):
            key = (layout, runs)
            batch = equal_runs(backbone, trees, classes, LAYOUTS[layout], runs, repeats, buffers)
            flops[key] = runs * plan_of(backbone, classes, LAYOUTS[layout]).runs[0].tree.flops
            count = max(1, round(flops[key] / matmul_flops(trees)))  # as much work as the step
            beside[key] = BesideProducts(batch, multiply, count)
            contenders[key] = _counting(beside[key], held, key)
    times = measure(contenders, repeats, backbone.device)
    warm = warm_ups(backbone.device)

    tower = trees.tower
    shape = (tower.width, tower.hidden, len(tower.blocks), tower.dim)
    products = {key: both.products[warm:] for key, both in beside.items()}
    product_flops = {key: both.count * matmul_flops(trees) for key, both in beside.items()}
    times |= {key: both.steps[warm:] for key, both in beside.items()}
    median = {key: statistics.median(values) for key, values in times.items()}
    share = {key: share_of(flops[key], times[key], product_flops[key], products[key]) for key in beside}
    rows = []
    for layout, settings in LAYOUTS.items():
        plan = plan_of(backbone, classes, settings)
        counts = [runs for key, runs in beside if key == layout]
        per_run = {runs: median[layout, runs] / runs for runs in counts}
        # The least time per run, told by the share: the minutes' speed, which changes, is in both its parts.
        best = max(counts, key=lambda runs: share[layout, runs])
        rows.append(
            {
                "dataset": name,
                "classes": len(classes),
                "layout": layout,
                "nodes": plan.runs[0].tree.nodes,
                "official_tokens": len(classes) * backbone.text.context_length,
                "official_image_s": median["image"],
                "official_text_s": median["text"] * scale,
                "official_cut_s": median["cut"] * scale,
                "official_tokens_cut": longest,
                "official_measured_classes": len(part),
                "official_text_flops": official_text_flops(
                    len(classes), backbone.text.context_length, *shape
                ),
                "run_step_s": per_run,
                "best_runs": best,
                "best_run_step_s": per_run[best],
                "flops_per_run": flops[layout, best] / best,
                "flops_per_s": flops[layout, best] / median[layout, best],
                "matmul_flops_per_s": product_flops[layout, best] / statistics.median(products[layout, best]),
                "matmul_share": {runs: share[layout, runs] for runs in counts},
                "bytes_held": {runs: held[layout, runs] for runs in counts},
                "bytes_estimated": {
                    runs: plan.scratch_bytes + runs * plan.runs[0].tree.activation_bytes for runs in counts
                },
                "measurements": {runs: len(times[layout, runs]) for runs in counts},
            }
        )
    return rows


def plan_of(backbone: Backbone, classes: Sequence[str], layout: PromptLayout) -> TrainingPlan:
    """What a run of these class names and this layout takes."""
    return plan_training(backbone, [RunShape(tuple(classes), layout, 1)])


def run_counts(backbone: Backbone, classes: Sequence[str], layout: PromptLayout) -> list[int]:
    """1, 8 and as many runs as a batch takes; 8 only where it does not mean minutes."""
    plan = plan_of(backbone, classes, layout)
    budget = plan.budget()
    while budget.try_add(plan.runs[0]):
        pass
    few = {1, budget.runs} | ({8} if plan.runs[0].tree.rows * 8 <= 2 * plan.max_rows else set())
    return sorted(few)


def equal_runs(
    backbone: Backbone,
    trees: Trees,
    classes: Sequence[str],
    layout: PromptLayout,
    runs: int,
    repeats: int,
    buffers: Buffers | None = None,
) -> Batch:
    """A batch of equal runs with random features, good for warming up and ``repeats`` steps."""
    tower = trees.tower
    steps = max(warm_ups(tower.device) + repeats + 1, WORTH_IT)  # fewer would not be recorded on a GPU
    active = []
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        contexts = 0.02 * torch.randn(layout.shape(len(classes), tower.width), generator=draw)
        features = torch.randn(BATCH_SIZE, 1, tower.dim, generator=draw)
        labels = torch.randint(len(classes), (BATCH_SIZE,), generator=draw)
        run = Run(classes, layout, contexts, features, labels, steps, seed)
        active.append(Active.start(seed, run, torch.float32, tower.device))
    return Batch(trees, active, backbone.logit_scale, buffers)


def _counting(beside: BesideProducts, held: dict[Any, int], key: Any) -> Callable[[], None]:
    """A step; the first one notes the bytes it holds."""
    forest_pass = beside.batch.forest_pass

    def step() -> None:
        if key in held:
            return beside()
        forest_pass.buffer.begin()
        beside()
        held[key] = forest_pass.nbytes

    return step


def growth_counts(backbone: Backbone, classes: Sequence[str], layout: PromptLayout) -> list[int]:
    """1 to 64 runs, as far as these batches fit in memory side by side."""
    plan = plan_of(backbone, classes, layout)
    held = itertools.accumulate(runs * plan.runs[0].tree.activation_bytes for runs in GROWTH_RUNS)
    fit = zip(GROWTH_RUNS, held, strict=True)
    return [runs for runs, size in fit if runs == 1 or size <= plan.memory_bytes]


def measure_growth(backbone: Backbone, name: str, classes: list[str], repeats: int) -> list[dict[str, Any]]:
    """Steps of more and more runs, layout end."""
    trees, layout = Trees(backbone), LAYOUTS["end"]
    buffers = Buffers(trees.tower.dtype, trees.tower.device)
    counts = growth_counts(backbone, classes, layout)
    batches = {runs: equal_runs(backbone, trees, classes, layout, runs, repeats, buffers) for runs in counts}
    times = {
        runs: statistics.median(values)
        for runs, values in measure(
            {runs: batch.step for runs, batch in batches.items()}, repeats, backbone.device
        ).items()
    }
    return [
        {
            "dataset": name,
            "layout": "end",
            "runs": runs,
            "nodes": batches[runs].forest.nodes,
            "step_s": times[runs],
            "per_run_s": times[runs] / runs,
        }
        for runs in counts
    ]
