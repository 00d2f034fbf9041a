"""What is on this machine, for bug reports: versions, devices, folders, weights, and what is slow or missing.

Nothing is imported before it is looked at, so that a broken installation is described, too.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
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
FOLDERS = {"data": "FASTCOOP_DATA_ROOT", "cache": "FASTCOOP_CACHE", "results": "", "reports": ""}
VARIABLES = (
    "FASTCOOP_DATA_ROOT", "FASTCOOP_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME",
    "HF_HUB_OFFLINE", "NO_COLOR",
)  # fmt: skip
NVIDIA = Path("/proc/driver/nvidia/version")  # of a driver on Linux
LITTLE_MEMORY_GB, LITTLE_DISK_GB = 4.0, 2.0

Found = dict[str, Any]


def examine() -> Found:
    """Return what is found, by topic. Where something cannot be found out, its value is the error's text.

    The topics are ``versions``, ``devices``, ``memory``, ``folders``, ``variables``, ``weights``, and ``advice``: a
    list of sentences on what is slow or missing.
    """
    topics: dict[str, Callable[[], Any]] = {
        "versions": _versions, "devices": _devices, "memory": _memory, "folders": _folders,
        "variables": lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ}, "weights": _weights,
    }  # fmt: skip
    found: Found = {}
    for topic, look in topics.items():
        try:
            found[topic] = look()
        except Exception as error:  # a broken package may raise any exception
            found[topic] = f"unknown ({type(error).__name__}: {error})"
    return found | {"advice": list(advice(found))}


def lines(found: Found) -> Iterator[str]:
    """Yield the lines that show what `examine` found."""
    for topic, value in found.items():
        yield topic
        if isinstance(value, Mapping):
            yield from (f"  {name:<18} {_text(one)}" for name, one in value.items())
        else:
            yield from (f"  {one}" for one in (value if isinstance(value, list) else [value]))
        if not value:
            yield "  none"


def _text(value: Any) -> str:
    pairs = [f"{name} {part}" for name, part in value.items()] if isinstance(value, Mapping) else value
    return (", ".join(pairs) or "none") if isinstance(pairs, list) else str(value)


def _versions() -> Found:
    found = {
        "fastcoop": fastcoop.__version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
    }
    for package in (*PACKAGES, *EXTRAS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> Found:
    """Return the processors, and the device that "auto" is."""
    import torch

    from fastcoop.backbones.devices import resolve_device
    from fastcoop.processes import available_cores, cpu_name

    found: Found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cores allowed": available_cores(),
        "threads of torch": torch.get_num_threads(),
        "C compiler": shutil.which(os.environ.get("CC") or "cc") or "none",
        "cuda of torch": torch.version.cuda or "none (a build for CPUs)",
        "device auto": resolve_device("auto"),
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, sm_{gpu.major}{gpu.minor}"
    return found


def _memory() -> Found:
    import psutil

    memory = psutil.virtual_memory()
    return {"total GB": round(memory.total / 1e9, 1), "available GB": round(memory.available / 1e9, 1)}


def _folders() -> Found:
    """Return the folders that commands use by default, and the free space of their disks."""
    found = {}
    for name, variable in FOLDERS.items():
        path = Path(os.environ.get(variable) or name).expanduser().absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        free = round(shutil.disk_usage(there).free / 1e9, 1)
        found[name] = {"path": str(path), "exists": path.is_dir(), "free GB": free}
    return found


def _weights() -> Found:
    """Return the backbones whose weights need no download: included ones, and others."""
    from fastcoop.backbones.catalog import EMBEDDED_WEIGHTS, weights_at_hand

    found: Found = {"included": [], "downloaded": []}
    for one in weights_at_hand():
        is_included = one.file is not None and one.file.parent == EMBEDDED_WEIGHTS
        found["included" if is_included else "downloaded"].append(one.backbone)
    return found


def advice(found: Found) -> Iterator[str]:
    """Yield what is slow or missing in what `examine` found, and what to do."""
    known = {name: one if isinstance(one, Mapping) else {} for name, one in found.items()}
    for name in (name for name, one in known["versions"].items() if one == "not installed"):
        if name in EXTRAS:
            extra, use = EXTRAS[name]
            yield f'{use} needs {name}; install it with `pip install "fastcoop[{extra}]"`.'
        else:
            yield f"{name} is missing: reinstall fastcoop with pip."
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
        if devices.get("C compiler") == "none":
            yield "There is no C compiler (cc), so training is slower: install gcc or clang, or name one in CC."
    if (free := known["memory"].get("available GB", LITTLE_MEMORY_GB)) < LITTLE_MEMORY_GB:
        yield f"Only {free} GB of memory are free: close other programs."
    for name, folder in known["folders"].items():
        if folder["free GB"] < LITTLE_DISK_GB:
            yield f"Only {folder['free GB']} GB are free for {name}: delete files there, or choose another folder."
    if known["weights"].get("downloaded") == []:
        yield "No pretrained weights are on this machine; a name such as RN50 downloads them once."
