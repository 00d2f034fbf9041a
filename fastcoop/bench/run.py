"""The whole benchmark: every dataset, growth with the number of runs, and where it was measured."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

import fastcoop
from fastcoop.backbones import Backbone
from fastcoop.bench.apart import apart
from fastcoop.bench.measure import CONTEXT_LENGTH, measure_dataset, measure_growth
from fastcoop.bench.precision import compare_precision
from fastcoop.progress import progress


@dataclass
class Bench:
    """What was measured, ready for JSON: ``machine``, ``rows`` (a dict per dataset and layout), ``growth``, and
    ``precision`` (a dict per dataset, where a second precision was asked for)."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)
    precision: list[dict[str, Any]] = field(default_factory=list)


def run_bench(
    backbone: Backbone,
    class_lists: Mapping[str, Sequence[str]],
    repeats: int = 5,
    precision: torch.dtype | None = None,
    on_dataset: Callable[[Bench], None] | None = None,
) -> Bench:
    """Measure training steps on each list of class names, each list in a process of its own.

    Times are medians of up to ``repeats`` (at least two; fewer the longer a step takes) after one warm-up, the
    contenders of a dataset in turn within each repeat, matrix products between a step's layers: the official way's
    image part and text part, the text part cut to the longest prompt, and fastcoop's whole step (its images are
    features already) for 1, 8 and as many runs as fit, in three layouts. ``precision``: also compare steps in
    it with the backbone's own. ``on_dataset`` is given what was measured so far, after each list.
    """
    bench = Bench(_machine(backbone))
    with progress("Measuring", len(class_lists) + 1) as advance:
        for name, classes in class_lists.items():
            bench.rows += apart(measure_dataset, backbone, name, list(classes), repeats)
            if precision is not None:
                bench.precision.append(
                    apart(compare_precision, backbone, precision, name, list(classes), repeats)
                )
            if on_dataset is not None:
                on_dataset(bench)
            advance(1, name)
        smallest = min(class_lists, key=lambda name: len(class_lists[name]))
        bench.growth = apart(measure_growth, backbone, smallest, list(class_lists[smallest]), repeats)
        advance(1, "growth")
    return bench


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
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
