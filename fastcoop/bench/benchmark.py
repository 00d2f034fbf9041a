"""The whole benchmark: its inputs, every list of class names in a fresh process, and the machine that it ran on."""

from __future__ import annotations

import logging
import os
import pickle
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

import fastcoop
from fastcoop.backbones import Backbone, load_backbone
from fastcoop.bench.measure import CONTEXT_LENGTH, measure_dataset
from fastcoop.bench.tables import Bench, write_bench
from fastcoop.datasets.official import paper_class_names
from fastcoop.errors import UserError, unknown, writing
from fastcoop.processes import ProcessPoolExecutor, cpu_name, exit_with_parent
from fastcoop.progress import progress

IMAGENET = {"imagenet-10": 10, "imagenet-100": 100, "imagenet": None}  # the first classes, None: all

Result = TypeVar("Result")


def class_lists(only: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return class names by dataset, the shortest list first.

    Args:
        only: Datasets of the paper, or "imagenet-10" and "imagenet-100", ImageNet's first classes; none of them for
            ImageNet's three lists.

    Raises:
        UserError: There is no list of that name.
    """
    lists = paper_class_names()
    lists |= {name: lists["imagenet"][:count] for name, count in IMAGENET.items()}
    for name in only:
        if name not in lists:
            raise unknown("list of class names", name, lists)
    return dict(sorted(((name, lists[name]) for name in only or IMAGENET), key=lambda item: len(item[1])))


def random_backbone(name: str, device: str = "auto", dtype: torch.dtype = torch.float32) -> Backbone:
    """Return a backbone of real sizes with random weights. Raises UserError for an unknown model."""
    return load_backbone(name, None, device=device, dtype=dtype, force_quick_gelu=True)


def run_bench(
    backbone: Backbone,
    class_lists: Mapping[str, Sequence[str]],
    repeats: int = 5,
    out: Path | None = None,
) -> Bench:
    """Measure training steps on each list of class names, each list in a fresh process.

    Times are medians of up to ``repeats`` calls after one warm-up. All contenders of a dataset run in turn within each
    repeat: the image part and the text part of an official step, its text part cut to the longest prompt, and a whole
    step of fastcoop (whose image features are cached) with 1, 8 and as many runs as fit, in three layouts.

    Args:
        backbone: Its weights may be random.
        class_lists: Class names by dataset.
        repeats: Measurements of each contender at most.
        out: Folder that the measurements are written to after each list (see `write_bench`).

    Raises:
        UserError: ``out`` cannot be written to, or memory ran out.
    """
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    bench = Bench(describe_machine(backbone))
    with progress("Measuring", len(class_lists)) as advance:
        for name, names in class_lists.items():
            bench.rows += run_in_fresh_process(measure_dataset, backbone, name, list(names), repeats)
            if out is not None:
                write_bench(bench, out)
            advance(1, name)
    return bench


def describe_machine(backbone: Backbone) -> dict[str, Any]:
    """Return the device, the versions and the settings that the times belong to."""
    on_gpu = backbone.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(backbone.device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(), "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__,
        "fastcoop": fastcoop.__version__, "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."), "context_length": CONTEXT_LENGTH,
    }  # fmt: skip


def run_in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """Return ``function(*args)``, computed in a new process with as many threads as this one.

    A process that has measured other datasets for an hour holds gigabytes of freed memory in fragments. In such a
    process the official method was faster, fastcoop slower, and fewer classes fitted than in a fresh one.

    Raises:
        UserError: the system ended the process, as it does when memory runs out.
    """
    pool = ProcessPoolExecutor(1)
    try:
        # Pickled here, because tensors sent between processes use shared memory, which may be small.
        call = pickle.dumps((function, args))
        threads, log_level = torch.get_num_threads(), logging.root.manager.disable
        return pool.submit(_call, os.getpid(), threads, log_level, call).result()
    except BrokenExecutor:
        raise UserError(
            "The system ended the process that measured, as it does when memory runs out; "
            "measure fewer or smaller lists of class names (--datasets)."
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _call(parent: int, threads: int, log_level: int, pickled: bytes) -> Any:
    logging.disable(log_level)
    exit_with_parent(parent)
    torch.set_num_threads(threads)
    function, args = pickle.loads(pickled)
    return function(*args)
