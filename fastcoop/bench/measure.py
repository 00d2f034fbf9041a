"""The measurements: every contender in turn, again and again, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

import fastcoop
from fastcoop.backbones import Backbone
from fastcoop.bench.official import OfficialStep, longest_prompt
from fastcoop.engine.flops import forest_flops, official_text_flops
from fastcoop.engine.memory import CPU_ROWS, RoomFor
from fastcoop.engine.run import BATCH_SIZE, Run
from fastcoop.engine.training import Active, Batch
from fastcoop.engine.trees import Trees
from fastcoop.progress import progress
from fastcoop.prompts import PromptLayout

CONTEXT_LENGTH = 16
LAYOUTS = {
    "end": PromptLayout(CONTEXT_LENGTH, "end"),
    "mid": PromptLayout(CONTEXT_LENGTH, "mid"),
    "class-specific": PromptLayout(CONTEXT_LENGTH, "end", class_specific=True),
}
OFFICIAL_CLASSES = 200  # more than this at 77 tokens does not fit 24 GB; measured on these, scaled, marked
GROWTH_RUNS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Bench:
    """What was measured, ready for JSON: ``machine``, ``rows`` (a dict per dataset and layout), ``growth``."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)


def run_bench(backbone: Backbone, class_lists: Mapping[str, Sequence[str]], repeats: int = 3) -> Bench:
    """Measure training steps on each list of class names.

    Times are medians of ``repeats`` after one warm-up, the contenders of a dataset in turn within each repeat:
    the official way's image part and text part, the text part cut to the longest prompt, and fastcoop's whole step
    (its images are features already) for 1, 8 and as many runs as fit, in three layouts.
    """
    bench = Bench(_machine(backbone))
    trees = Trees(backbone)
    images = torch.randn(BATCH_SIZE, 3, backbone.image_size, backbone.image_size).to(
        backbone.device, backbone.dtype
    )
    with progress("Measuring", len(class_lists) + 1) as advance:
        for name, classes in class_lists.items():
            bench.rows += _measure_dataset(backbone, trees, images, name, list(classes), repeats)
            advance(1, name)
        smallest = min(class_lists, key=lambda name: len(class_lists[name]))
        bench.growth = _measure_growth(backbone, trees, smallest, class_lists[smallest], repeats)
        advance(1, "growth")
    return bench


def _measure_dataset(
    backbone: Backbone, trees: Trees, images: torch.Tensor, name: str, classes: list[str], repeats: int
) -> list[dict[str, Any]]:
    part = classes[:OFFICIAL_CLASSES]
    scale = len(classes) / len(part)
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
    batches: dict[tuple[str, int], Batch] = {}
    for layout in LAYOUTS:
        for runs in _run_counts(trees, classes, LAYOUTS[layout]):
            batches[layout, runs] = _batch(backbone, trees, classes, LAYOUTS[layout], runs, repeats + 2)
            contenders[layout, runs] = batches[layout, runs].step
    contenders["matmul"] = _matmul(trees)
    times = _medians(contenders, repeats, backbone.device)

    tower = trees.tower
    shape = (tower.width, tower.hidden, len(tower.blocks), tower.dim)
    rate = _matmul_flops(trees) / times["matmul"]
    rows = []
    for layout, settings in LAYOUTS.items():
        plan = trees[tuple(classes), settings][0]
        counts = [runs for key, runs in batches if key == layout]
        per_run = {runs: times[layout, runs] / runs for runs in counts}
        best = min(per_run, key=lambda runs: per_run[runs])
        flops = {runs: forest_flops(batches[layout, runs].forest) for runs in counts}
        rows.append(
            {
                "dataset": name,
                "classes": len(classes),
                "layout": layout,
                "nodes": plan.tree.nodes,
                "official_tokens": len(classes) * backbone.text.context_length,
                "official_image_s": times["image"],
                "official_text_s": times["text"] * scale,
                "official_cut_s": times["cut"] * scale,
                "official_tokens_cut": longest,
                "official_measured_classes": len(part),
                "official_text_flops": official_text_flops(
                    len(classes), backbone.text.context_length, *shape
                ),
                "run_step_s": per_run,
                "best_runs": best,
                "best_run_step_s": per_run[best],
                "flops_per_run": flops[best] / best,
                "flops_per_s": flops[best] / best / per_run[best],
                "matmul_flops_per_s": rate,
                "peak_bytes": {runs: batches[layout, runs].forest_pass.buffer.nbytes for runs in counts},
            }
        )
    return rows


def _run_counts(trees: Trees, classes: Sequence[str], layout: PromptLayout) -> list[int]:
    """1, 8 and as many runs as a batch takes; 8 only where it does not mean minutes."""
    plan = trees[tuple(classes), layout][0]
    room = RoomFor(trees.tower)
    while room.take(plan):
        pass
    few = {1, room.runs} | ({8} if plan.rows * 8 <= 2 * CPU_ROWS or room.rows_limit is None else set())
    return sorted(few)


def _batch(
    backbone: Backbone, trees: Trees, classes: Sequence[str], layout: PromptLayout, runs: int, steps: int
) -> Batch:
    """A batch of equal runs with random features, good for ``steps`` steps."""
    tower = trees.tower
    active = []
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        contexts = 0.02 * torch.randn(layout.shape(len(classes), tower.width), generator=draw)
        features = torch.randn(BATCH_SIZE, 1, tower.dim, generator=draw)
        labels = torch.randint(len(classes), (BATCH_SIZE,), generator=draw)
        run = Run(classes, layout, contexts, features, labels, steps, seed)
        active.append(Active.start(seed, run, torch.float32, tower.device))
    return Batch(trees, active, backbone.logit_scale)


def _measure_growth(
    backbone: Backbone, trees: Trees, name: str, classes: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    layout = LAYOUTS["end"]
    batches = {runs: _batch(backbone, trees, classes, layout, runs, repeats + 2) for runs in GROWTH_RUNS}
    times = _medians({runs: batch.step for runs, batch in batches.items()}, repeats, backbone.device)
    return [
        {
            "dataset": name,
            "layout": "end",
            "runs": runs,
            "nodes": batches[runs].forest.nodes,
            "step_s": times[runs],
        }
        for runs in GROWTH_RUNS
    ]


def _medians(
    contenders: Mapping[Any, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[Any, float]:
    """Median seconds of each contender, called in turn; the first round warms up."""
    times: dict[Any, list[float]] = {key: [] for key in contenders}
    for _ in range(repeats + 1):
        for key, contender in contenders.items():
            _wait(device)
            start = time.perf_counter()
            contender()
            _wait(device)
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values[1:]) for key, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


MATMUL_ROWS = 2048


def _matmul(trees: Trees) -> Callable[[], None]:
    """The tower's four products forward and backward on MATMUL_ROWS rows, results into memory kept ready."""
    block = trees.tower.blocks[0]
    products = []
    for weight in (block.qkv, block.out, block.fc, block.proj):
        for w in (weight, weight.t()):
            x = torch.randn(MATMUL_ROWS, w.shape[0], dtype=w.dtype, device=w.device)
            products.append((x, w, torch.empty(MATMUL_ROWS, w.shape[1], dtype=w.dtype, device=w.device)))

    def multiply() -> None:
        for x, w, out in products:
            torch.mm(x, w, out=out)

    return multiply


def _matmul_flops(trees: Trees) -> float:
    block = trees.tower.blocks[0]
    return 2 * 2 * MATMUL_ROWS * sum(w.numel() for w in (block.qkv, block.out, block.fc, block.proj))


def _machine(backbone: Backbone) -> dict[str, Any]:
    on_gpu = backbone.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(backbone.device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastcoop": fastcoop.__version__,
        "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "context_length": CONTEXT_LENGTH,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
