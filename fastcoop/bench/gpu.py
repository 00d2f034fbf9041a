"""Measure a GPU in one process: its own rates, fastcoop's steps by size and precision, and the official step.

Times are the device's: CUDA events around steps that are recorded and replayed, as in every training.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import Precision, dtype_of, products_in_tf32
from fastcoop.bench.benchmark import describe_machine, random_backbone
from fastcoop.bench.measure import LAYOUTS, FastcoopStep, Matmuls, official_parts, plan_equal_runs
from fastcoop.bench.tables import Bench, write_bench
from fastcoop.progress import progress

ROWS = (4096, 16384, 65536, 131072)
PRECISIONS: Mapping[str, Precision | None] = {"bfloat16": torch.bfloat16, "tf32": "tf32", "float32": None}
SQUARE = 8192  # rows and columns of the products that show a GPU's highest rate
COPIED_BYTES = 2**31
WARM_UP = 3  # calls, and steps before one is recorded
PROFILED = 3  # steps whose kernels are counted


def run_gpu_bench(
    name: str,
    device: str,
    class_lists: Mapping[str, Sequence[str]],
    rows: Sequence[int] = ROWS,
    precisions: Sequence[str] = tuple(PRECISIONS),
    repeats: int = 10,
    out: Path | None = None,
) -> Bench:
    """Measure training steps on a GPU, all in this process.

    Args:
        name: An open_clip model; its weights are random.
        device: The GPU, such as "cuda".
        class_lists: Class names by dataset.
        rows: Sizes of the steps that are measured, in rows of the forest.
        precisions: Among ``PRECISIONS``, of both contenders.
        repeats: Calls that a time is the median of.
        out: Folder that the measurements are written to after each precision (see `write_bench`).
    """
    bench = Bench({})
    with progress("Measuring", len(precisions) * len(class_lists)) as advance:
        for precision in precisions:
            backbone = random_backbone(name, device, dtype_of(PRECISIONS[precision]) or torch.float32)
            with torch.cuda.device(backbone.device), products_in_tf32(precision == "tf32"):
                bench.machine = bench.machine or describe_machine(backbone)
                rates = measure_rates(backbone, rows, repeats)
                bench.rates.append({"precision": precision} | rates)
                for dataset, names in class_lists.items():
                    official = measure_official(backbone, names, repeats)
                    for layout in LAYOUTS:
                        for size in rows:
                            step = measure_step(backbone, names, layout, size, PRECISIONS[precision])
                            share = step["flops_per_s"] / rates["products_flops_per_s"][size]
                            facts = {"dataset": dataset, "layout": layout, "precision": precision}
                            bench.rows.append(facts | official | step | {"matmul_share": share})
                    advance(1, f"{dataset}, {precision}")
            if out is not None:
                write_bench(bench, out)
    return bench


def measure_rates(backbone: Backbone, rows: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return what the GPU reaches at most in the backbone's dtype: the ceilings that steps are compared with.

    Returns:
        "square_flops_per_s" of large square products; "products_flops_per_s", by number of rows, of the products of a
        text block, forward and backward; "copy_bytes_per_s", read and written.
    """
    options: dict[str, Any] = {"dtype": backbone.dtype, "device": backbone.device}
    x, y, result = (torch.randn(SQUARE, SQUARE, **options) for _ in range(3))
    square = 2 * SQUARE**3 / seconds(functools.partial(torch.mm, x, y, out=result), repeats)
    source, target = (torch.empty(COPIED_BYTES, dtype=torch.uint8, device=backbone.device) for _ in range(2))
    copied = 2 * COPIED_BYTES / seconds(functools.partial(target.copy_, source), repeats)
    products = {}
    for size in rows:
        matmuls = Matmuls(backbone, size)
        products[size] = matmuls.flops / seconds(matmuls, repeats)
    return {"square_flops_per_s": square, "copy_bytes_per_s": copied, "products_flops_per_s": products}


def measure_step(
    backbone: Backbone, class_names: Sequence[str], layout: str, rows: int, precision: Precision | None
) -> dict[str, Any]:
    """Return the time of a recorded step of equal runs, together about ``rows`` rows, its kernels and its memory."""
    tree = plan_equal_runs(backbone, class_names, LAYOUTS[layout], 1).runs[0].tree
    runs = max(1, round(rows / tree.rows))
    step = FastcoopStep(backbone, class_names, LAYOUTS[layout], runs, precision=precision)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    took = median(_recorded_seconds(step))
    peak = torch.cuda.max_memory_allocated()
    kernels = _kernels(step)
    return {
        "classes": len(class_names), "runs": runs, "rows": runs * tree.rows, "step_s": took,
        "best_run_step_s": took / runs, "flops_per_s": step.flops / took,
        "launches": sum(kernel["launches"] for kernel in kernels), "kernels": kernels,
        "peak_bytes": peak, "planned_bytes": step.plan.bytes_of(range(runs)),
    }  # fmt: skip


def measure_official(backbone: Backbone, class_names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Return the times of the official step's image part and of its text part at the tower's full length."""
    parts, measured = official_parts(backbone, class_names)
    image_s, text_s = (seconds(parts[name], repeats) for name in ("image", "text"))
    return {
        "official_image_s": image_s, "official_text_s": text_s * len(class_names) / measured,
        "official_measured_classes": measured,
    }  # fmt: skip


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time that the current GPU takes for a call, after a few that warm it up."""
    for _ in range(WARM_UP):
        function()
    events = [_event()]
    for _ in range(repeats):
        function()
        events.append(_event())
    return median(_between(events))


def _recorded_seconds(step: FastcoopStep) -> list[float]:
    """Train, and return the times of the steps that were replayed from a recording."""
    events: list[torch.cuda.Event] = []
    step.train(lambda _: events.append(_event()))
    return _between(events)[WARM_UP + 1 :]


def _kernels(step: FastcoopStep) -> list[dict[str, Any]]:
    """Train, and return the kernels of a recorded step with their launches and seconds, the longest first."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    steps: list[None] = []

    def on_step(_: object) -> None:
        steps.append(None)
        if len(steps) == WARM_UP + 2:
            torch.cuda.synchronize()
            profiler.start()
        elif len(steps) == WARM_UP + 2 + PROFILED:
            torch.cuda.synchronize()
            profiler.stop()

    step.train(on_step)
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events() or ():
        totals[event.name][0] += 1 / PROFILED
        totals[event.name][1] += 1e-6 * event.self_device_time_total / PROFILED
    found = [{"name": name, "launches": count, "seconds": took} for name, (count, took) in totals.items()]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(events: Sequence[torch.cuda.Event]) -> list[float]:
    """Return the seconds from each event to the next."""
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in pairwise(events)]
