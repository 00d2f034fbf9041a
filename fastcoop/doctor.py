"""What is on this machine, for bug reports: versions, devices, folders, weights, and what is slow or missing.

Nothing is imported before it is looked at, so that a broken installation is described, too.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastcoop

PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "timm", "numpy", "scipy", "pandas", "scikit-learn", "h5py", "pillow",
    "matplotlib",
)  # fmt: skip
EXTRAS = {  # by package: the extra of fastcoop that has it, and what needs it
    "qtawesome": ("demo", "The demo"),
    "pyarrow": ("parquet", "Writing Parquet"),
    "distributed": ("cluster", "A sweep on a cluster"),
}
FOLDERS = {"data": "FASTCOOP_DATA_ROOT", "cache": "FASTCOOP_CACHE", "results": None, "reports": None}
VARIABLES = (
    "FASTCOOP_DATA_ROOT", "FASTCOOP_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME",
    "HF_HUB_OFFLINE", "NO_COLOR",
)  # fmt: skip
NVIDIA = Path("/proc/driver/nvidia/version")  # of a driver on Linux
LITTLE_MEMORY_GB, LITTLE_DISK_GB = 4.0, 2.0
SIDE = 1024  # of the square matrices whose product is timed

Found = dict[str, Any]


def examine() -> Found:
    """Return what is found, by topic. Where something cannot be found out, its value is the error's text.

    The topics are ``versions``, ``extras``, ``devices``, ``memory``, ``folders``, ``variables``, ``weights``, and
    ``advice``: a list of sentences on what is slow or missing.
    """
    topics: dict[str, Callable[[], Any]] = {
        "versions": _versions, "extras": _extras, "devices": _devices, "memory": _memory, "folders": _folders,
        "variables": lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ}, "weights": _weights,
    }  # fmt: skip
    found = {name: _safely(look) for name, look in topics.items()}
    found["advice"] = _safely(lambda: list(advice(found)))
    return found


def lines(found: Found) -> Iterator[str]:
    """Yield the lines that show what `examine` found."""
    for topic, value in found.items():
        yield topic
        entries = value.items() if isinstance(value, Mapping) else [("", one) for one in _listed(value)]
        for name, one in entries:
            parts = (
                [f"{key} {part}" for key, part in one.items()] if isinstance(one, Mapping) else _listed(one)
            )
            yield f"  {name:<18} {', '.join(parts)}" if name else f"  {parts[0]}"


def _listed(value: Any) -> list[str]:
    texts = list(map(str, value)) if isinstance(value, list) else [str(value)] if value is not None else []
    return texts or ["none"]


def _safely(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:  # a broken package may raise any exception
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _versions() -> Found:
    own = {"fastcoop": fastcoop.__version__, "python": sys.version.split()[0], "system": platform.platform()}
    return own | {name: _version(name) for name in PACKAGES}


def _extras() -> Found:
    return {name: _version(name) for name in EXTRAS}


def _devices() -> Found:
    """Return the processors, the device that "auto" is, and the rate of large float32 products on the CPU."""
    import torch

    from fastcoop.backbones.load import resolve_device
    from fastcoop.sweeps.workers import available_cores

    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    facts = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(": ")[2] for line in facts if line.startswith("model name")]
    found: Found = {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "cores allowed": available_cores(),
        "threads of torch": torch.get_num_threads(),
        "float32 GFLOP/s": round(_gflops(torch)),
        "cuda of torch": torch.version.cuda or "none (a build for CPUs)",
        "device auto": resolve_device("auto"),
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, sm_{gpu.major}{gpu.minor}"
    return found


def _gflops(torch: Any) -> float:
    one, best = torch.ones(SIDE, SIDE), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best / 1e9


def _memory() -> Found:
    import psutil

    memory = psutil.virtual_memory()
    return {"total GB": _gigabytes(memory.total), "available GB": _gigabytes(memory.available)}


def _gigabytes(count: float) -> float:
    return round(count / 1e9, 1)


def _folders() -> Found:
    """Return the folders that commands use by default, and the free space of their disks."""
    found = {}
    for name, variable in FOLDERS.items():
        path = Path((variable and os.environ.get(variable)) or name).expanduser().absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        free = _gigabytes(shutil.disk_usage(there).free)
        found[name] = {"path": str(path), "exists": path.is_dir(), "free GB": free}
    return found


def _weights() -> Found:
    """Return the backbones whose weights need no download: included ones, and others."""
    from fastcoop.backbones.catalog import EMBEDDED_WEIGHTS, list_backbones

    found: Found = {"included": [], "downloaded": []}
    for one in list_backbones():
        is_included = (EMBEDDED_WEIGHTS / f"{one.name}.safetensors").is_file()
        found["included" if is_included else "downloaded"] += [weights.backbone for weights in one.at_hand]
    return found


def advice(found: Found) -> Iterator[str]:
    """Yield what is slow or missing in what `examine` found, and what to do."""
    known = {name: one if isinstance(one, Mapping) else {} for name, one in found.items()}
    for name, one in known["versions"].items():
        if one == "not installed":
            yield f"{name} is missing: reinstall fastcoop with pip."
    for name, (extra, use) in EXTRAS.items():
        if known["extras"].get(name) == "not installed":
            yield f'{use} needs {name}; install it with `pip install "fastcoop[{extra}]"`.'
    devices = known["devices"]
    if not devices:
        yield f"torch does not work, {found['devices']}: install it as pytorch.org says for this system."
    elif devices["device auto"] == "cpu":
        if "cuda:0" in devices:
            yield "The GPU does not answer, so the CPU is used: restart its driver, or this machine."
        elif NVIDIA.exists():
            yield "There is an NVIDIA driver, but torch finds no GPU: install torch's build for CUDA (pytorch.org)."
        if (threads := devices["threads of torch"]) < (cores := devices["cores allowed"]):
            yield f"torch uses {threads} of {cores} cores: unset OMP_NUM_THREADS where no other program needs them."
    if (free := known["memory"].get("available GB", LITTLE_MEMORY_GB)) < LITTLE_MEMORY_GB:
        yield f"Only {free} GB of memory are free: close other programs."
    for name, folder in known["folders"].items():
        if folder["free GB"] < LITTLE_DISK_GB:
            yield f"Only {folder['free GB']} GB are free for {name}: delete files there, or choose another folder."
    if known["weights"].get("downloaded") == []:
        yield "No pretrained weights are on this machine; a name such as RN50 downloads them once."
