"""The whole benchmark: every list of class names, and the machine that it ran on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

import fastcoop
from fastcoop.backbones import Backbone
from fastcoop.bench.fresh_process import run_in_fresh_process
from fastcoop.bench.measure import CONTEXT_LENGTH, compare_precision, measure_dataset
from fastcoop.progress import progress


@dataclass
class Bench:
    """Measurements, ready for JSON.

    Attributes:
        machine: Device, threads, versions and settings.
        rows: One entry per dataset and layout.
        precision: One entry per dataset, if a second precision was measured.
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    precision: list[dict[str, Any]] = field(default_factory=list)


def run_bench(
    backbone: Backbone,
    class_lists: Mapping[str, Sequence[str]],
    repeats: int = 5,
    precision: torch.dtype | None = None,
    on_dataset: Callable[[Bench], None] | None = None,
) -> Bench:
    """Measure training steps on each list of class names, each list in a fresh process.

    Times are medians of up to ``repeats`` calls after one warm-up. All contenders of a dataset run in turn within each
    repeat: the image part and the text part of an official step, its text part cut to the longest prompt, and a whole
    step of fastcoop (whose image features are cached) with 1, 8 and as many runs as fit, in three layouts.

    Args:
        backbone: Its weights may be random.
        class_lists: Class names by dataset.
        repeats: Measurements of each contender at most.
        precision: If given, also compare fastcoop's steps in it and in the backbone's own precision.
        on_dataset: Called with the measurements so far after each list.
    """
    bench = Bench(_machine(backbone))
    with progress("Measuring", len(class_lists)) as advance:
        for name, names in class_lists.items():
            bench.rows += run_in_fresh_process(measure_dataset, backbone, name, list(names), repeats)
            if precision is not None:
                arguments = (backbone, precision, name, list(names), repeats)
                bench.precision.append(run_in_fresh_process(compare_precision, *arguments))
            if on_dataset is not None:
                on_dataset(bench)
            advance(1, name)
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
