"""ProLIP: its method in astra-vision/ProLIP, with its search, on features before the projection."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fastcoop.methods import Data
from tools.parity import world
from tools.parity.official import load, quiet, reads_arrays_as_numbers, stub
from tools.parity.world import Row, moved, relative, same


def compare(folder: Path, method: str) -> Iterator[Row]:
    methods = folder / "ProLIP/methods"
    stub("prolip").__path__ = [str(methods)]
    reads_arrays_as_numbers(load("prolip.utils", methods / "utils.py"))
    load("prolip.method", methods / "method.py")
    official = load("prolip.ProLIP", methods / "ProLIP.py")
    for classes, before, dim, views, shots, seed, epochs, rate, lmbda, has_bias in (
        (15, 90, 60, 7, 5, 3, 300, 1e-5, None, False), (15, 90, 60, 7, 5, 3, 140, 2e-3, 0.03, False),
        (8, 48, 70, 5, 12, 4, 300, 1e-4, None, True),
    ):  # fmt: skip
        data, backbone = projected(classes, before, dim, views, seed, has_bias)
        given = {"learning_rate": rate, "epochs": epochs} | ({} if lmbda is None else {"lmbda": lmbda})
        runs = world.runs_of(data, method, shots, (81, 82), backbone, **given)
        for run, found in world.learned(backbone, runs):
            P, _, logits = run_official(official, run, backbone, epochs, rate, lmbda)
            yield Row("P", moved(found.weights["P"], P, backbone.image_projection.weight))
            yield Row("logits", relative(world.logits_of(backbone, run, found), logits))
    data, backbone = projected(9, 40, 24, 4, 6, False)
    given = {"selection": "few_val", "epochs": 40}
    for run, found in world.learned(backbone, world.runs_of(data, method, 3, (83, 84), backbone, **given)):
        P, chosen, _ = run_official(official, run, backbone, 40, 1e-5, None, search=True)
        yield same("learning rate, lambda", [found.extra["learning_rate"], found.extra["lmbda"]], chosen)
        yield Row("P", moved(found.weights["P"], P, backbone.image_projection.weight))


def projected(classes: int, before: int, dim: int, views: int, seed: int, has_bias: bool) -> tuple[Data, Any]:
    """Return a dataset of features before a random projection, and the backbone that has it."""
    data, rng = world.made_up(classes, before, views, seed), np.random.default_rng(seed)
    P = torch.from_numpy(rng.normal(size=(before, dim)) / before**0.5).float()
    data.text_features = (data.text_features @ P.numpy()).astype(np.float32)
    bias = torch.from_numpy(0.3 * rng.normal(size=dim)).float() if has_bias else None
    projection = SimpleNamespace(weight=P, bias=bias, before_dim=before)
    return data, world.scale_alone(dim, image_projection=projection)


def run_official(
    official: Any,
    run: Any,
    backbone: Any,
    epochs: int,
    rate: float,
    lmbda: float | None,
    search: bool = False,
) -> tuple[np.ndarray, list[float], torch.Tensor]:
    """Return the projection, the rate and lambda that the search chose, and the logits of test images."""
    data, projection, made = run.data, backbone.image_projection, []
    P, bias, is_resnet = projection.weight, projection.bias, projection.bias is not None

    def keep(made_before: Any) -> Any:
        """Return an initializer of a projection that also keeps it: the last one made is the learned one."""

        def initialize(self: torch.nn.Module, *given: Any) -> None:
            made_before(self, *given)
            made.append(self)

        return initialize

    kinds = official.VisProjRN, official.VisProjViT
    model = torch.nn.Module()
    model.visual = torch.nn.Module()
    model.visual.attnpool = torch.nn.Module()
    if is_resnet:
        layer = model.visual.attnpool.c_proj = torch.nn.Linear(*P.shape)
        layer.weight.data, layer.bias.data = P.T.contiguous().clone(), bias.clone()
    official.compute_image_features = lambda model, loader: world.tensors(loader, scaled=False)
    val, test = world.validation_of(run, "few_val", "pre"), data.split("test", "pre")
    views, labels = data.train_views(run.subset, "pre")
    here = os.getcwd()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(quiet())
        for kind in kinds:
            stack.enter_context(patch.object(kind, "__init__", keep(kind.__init__)))
        backbone_name = "RN50" if is_resnet else "ViTB16"
        kept = Path(folder, f"features_{backbone_name}_made-up", f"{run.shots}_shot", f"seed{run.seed}")
        kept.mkdir(parents=True)
        torch.save(torch.from_numpy(labels), kept / "label.pth")
        for view in range(views.shape[1]):
            torch.save(torch.from_numpy(views[:, view].copy()), kept / f"f{view}.pth")
        config = {
            "backbone": "RN50" if is_resnet else "ViT-B/16", "train_epoch": epochs, "root_path": folder,
            "dataset": "made-up", "aug_views": views.shape[1], "search_lr": search, "lr_v": rate,
            "lambda_funct_1_N": lmbda is None, "lambda_funct_1_N2": False, "lambda_v": lmbda,
            "save_checkpoints": False, "SUBSAMPLE_CLASSES": "all",
        }  # fmt: skip
        os.chdir(folder)
        try:
            # Its search trains the very tensor that it starts from, in place: a copy keeps the start.
            official.ProLIP(config)(
                None, val, test, None, None, None, None, world.unit_texts(data), None, None, None, model,
                {"visual.proj": P.clone()}, data.class_names, run.seed, run.shots, "c", "t",
            )  # fmt: skip
        finally:
            os.chdir(here)
        found = list(Path(folder, "results_lr").rglob("*.txt")) if search else []
        chosen = [float(number) for number in found[0].read_text().split(",")] if found else []
    learned = made[-1].linear.weight.T if is_resnet else made[-1].vit_proj
    with torch.no_grad():
        images = torch.nn.functional.normalize(made[-1](torch.from_numpy(test[0])), dim=-1)
        return learned.detach().numpy(), chosen, 100.0 * images @ world.unit_texts(data)
