"""ProKeR: its function in omarnust/BReg-Adapter, a copy of ybendou/ProKeR, on its features.

Its sums over samples in float32 depend on the order of the samples. With many samples and large lambda that is more
than the bar, which is then what the official code differs from itself by, with its samples in another order.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tools.parity import world
from tools.parity.official import functions, load, quiet, reads_arrays_as_numbers, stub
from tools.parity.world import CLOSED_FORM, Row, relative, same

SEARCHED = {"beta": [0.5, 3.0, 20], "lmbda": [0.001, 1.0, 10]}


def compare(folder: Path, method: str) -> Iterator[Row]:
    folder = folder / "BReg-Adapter"
    known = {"torch": torch, "os": os, "json": json, "yaml": yaml}
    utils = stub("utils", **functions(folder / "utils.py", "cls_acc", "save_hps", **known))
    reads_arrays_as_numbers(utils)
    utils.cls_acc.__globals__["float"] = utils.float
    official = load("proker", folder / "trainers/proker.py")
    for classes, dim, views, shots, seed in (
        (13, 96, 7, 3, 5), (31, 40, 1, 4, 6), (9, 64, 6, 8, 7), (37, 256, 4, 4, 8), (20, 512, 3, 16, 8)
    ):  # fmt: skip
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim)
        runs = world.runs_of(data, method, shots, (21, 22), backbone, selection="full_val")
        for run, found in world.learned(backbone, runs):
            chosen, logits = run_official(official, run)
            yield same("beta, lambda", [float(found.weights[name]) for name in ("beta", "lmbda")], chosen)
            difference = relative(world.logits_of(backbone, run, found) / 100, logits)
            _, reordered = run_official(official, run, np.random.default_rng(0))
            itself = relative(reordered, logits)
            which = "" if itself < CLOSED_FORM else ", where the official ones depend on the order of samples"
            yield Row(f"logits{which}", difference, max(CLOSED_FORM, itself))


def run_official(
    official: Any, run: Any, rng: np.random.Generator | None = None
) -> tuple[list[float], torch.Tensor]:
    """Return the chosen beta and lambda, and the logits of test images; with ``rng``, of samples in another order."""
    loader, views = world.ViewLoader(run), max(1, run.data.views)
    samples, labels = (
        torch.cat(parts) for parts in zip(*(next(iter(loader)) for _ in range(views)), strict=True)
    )
    samples = samples / samples.norm(dim=-1, keepdim=True)
    if rng is not None:
        order = torch.from_numpy(rng.permutation(len(samples)))
        samples, labels = samples[order], labels[order]
    val, (test, _) = (world.tensors(run.data.split(name, "tip")) for name in ("val", "test"))
    texts, here = world.unit_texts(run.data), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, quiet():
        configs = Path(folder) / "configs/RN50/configs_proker"
        configs.mkdir(parents=True)
        (configs / "made-up.yaml").write_text(yaml.safe_dump(SEARCHED))
        os.chdir(folder)
        try:
            logits = official.ProKeR(samples, labels, *val, test, texts, "made-up", run.shots, "seed1", "val")
        finally:
            os.chdir(here)
        (kept,) = (path for path in (configs / "made-up").rglob("*") if path.is_file())
        chosen = json.loads(kept.read_text())
    return [chosen["beta"], chosen["lmbda"]], logits
