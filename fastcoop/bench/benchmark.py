"""The whole benchmark: its inputs, every list of class names in a fresh process, and the machine that it ran on."""

from __future__ import annotations

import json
import logging
import os
import pickle
import platform
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

import fastcoop
from fastcoop.backbones import Backbone, load_backbone
from fastcoop.bench.measure import CONTEXT_LENGTH, compare_precision, measure_dataset
from fastcoop.bench.tables import Bench, write_bench
from fastcoop.datasets.official import paper_class_names
from fastcoop.engine.weights import warn_if_dtype_is_slow
from fastcoop.errors import MissingFile, UserError, unknown, writing
from fastcoop.processes import ProcessPoolExecutor, exit_with_parent
from fastcoop.progress import progress

IMAGENET = {"imagenet-10": 10, "imagenet-100": 100, "imagenet": None}  # the first classes, None: all
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Result = TypeVar("Result")

log = logging.getLogger("fastcoop")


def class_lists(only: Sequence[str] = (), folder: Path | None = None) -> dict[str, list[str]]:
    """Return class names by dataset, the shortest list first.

    Args:
        only: Datasets of the paper, or "imagenet-10" and "imagenet-100", ImageNet's first classes; none of them for
            ImageNet's three lists, or for all lists of ``folder``.
        folder: Holds one JSON list of names per dataset, in place of the paper's.

    Raises:
        UserError: There is no list of that name, or a file is no list of names.
    """
    if folder is None:
        lists = paper_class_names()
        lists |= {name: lists["imagenet"][:count] for name, count in IMAGENET.items()}
        only = only or tuple(IMAGENET)
    else:
        lists = {file.stem: _read_names(file) for file in sorted(folder.glob("*.json"))}
        if not lists:
            raise MissingFile(f"{folder} holds no *.json; put one list of class names per dataset there.")
    for name in only:
        if name not in lists:
            raise unknown("list of class names", name, lists)
    return dict(sorted(((name, lists[name]) for name in only or lists), key=lambda item: len(item[1])))


def _read_names(file: Path) -> list[str]:
    with suppress(ValueError):
        names = json.loads(file.read_text(encoding="utf-8"))
        if names and isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise UserError(f"Expected {file} to be a JSON list of class names, at least one.")


def torch_dtype(name: str) -> torch.dtype:
    """Return a precision by name. Raises UserError for one that the benchmark does not offer."""
    if name not in DTYPES:
        raise UserError(f'Expected a precision among {", ".join(DTYPES)}, got "{name}".')
    return DTYPES[name]


def random_backbone(name: str, device: str = "auto", dtype: str = "float32") -> Backbone:
    """Return a backbone of real sizes with random weights. Raises UserError for an unknown model or precision."""
    return load_backbone(name, None, device=device, dtype=torch_dtype(dtype), force_quick_gelu=True)


def run_bench(
    backbone: Backbone,
    class_lists: Mapping[str, Sequence[str]],
    repeats: int = 5,
    precision: torch.dtype | None = None,
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
        precision: If given, also compare fastcoop's steps in it and in the backbone's own precision. One that is far
            slower on this device is left out with a warning.
        out: Folder that the measurements are written to after each list (see `write_bench`).

    Raises:
        UserError: ``out`` cannot be written to, or memory ran out.
    """
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    warn_if_dtype_is_slow(backbone.dtype, backbone.device.type)
    if precision is not None and warn_if_dtype_is_slow(precision, backbone.device.type):
        name = str(precision).removeprefix("torch.")
        log.warning("Measuring it would take hours; going on without --precision %s.", name)
        precision = None
    bench = Bench(describe_machine(backbone))
    with progress("Measuring", len(class_lists)) as advance:
        for name, names in class_lists.items():
            bench.rows += run_in_fresh_process(measure_dataset, backbone, name, list(names), repeats)
            if precision is not None:
                arguments = (backbone, precision, name, list(names), repeats)
                bench.precision.append(run_in_fresh_process(compare_precision, *arguments))
            if out is not None:
                write_bench(bench, out)
            advance(1, name)
    return bench


def describe_machine(backbone: Backbone) -> dict[str, Any]:
    """Return the device, the versions and the settings that the times belong to."""
    on_gpu = backbone.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(backbone.device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(), "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__,
        "fastcoop": fastcoop.__version__, "backbone": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."), "context_length": CONTEXT_LENGTH,
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent(parent)
    torch.set_num_threads(threads)
    function, args = pickle.loads(pickled)
    return function(*args)
