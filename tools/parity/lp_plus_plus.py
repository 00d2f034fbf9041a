"""LP++: ``LinearProbe_P2`` of FereshteShakeri/FewShot-CLIP-Strong-Baseline, on its features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tools.parity import world
from tools.parity.official import clip_of_features, load, quiet, replaced, stub
from tools.parity.world import Row, moved, relative


def compare(folder: Path, method: str) -> Iterator[Row]:
    methods = folder / "FewShot-CLIP-Strong-Baseline/methods"
    stub("lp").__path__ = [str(methods)]
    utils = load("lp.utils", methods / "utils.py")
    load("lp.method", methods / "method.py")
    official, one_hot = load("lp.linear_probe_p2", methods / "linear_probe_p2.py"), utils.get_one_hot
    utils.get_one_hot = lambda *given, **more: one_hot(*given, **more).float()  # float16 there
    for classes, dim, views, shots, seed, epochs in (
        (17, 72, 6, 7, 3, 300),
        (9, 200, 3, 2, 4, 300),
        (14, 48, 8, 16, 5, 137),
        (100, 512, 1, 1, 6, 300),
    ):
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim)
        every = {
            which: world.learned(
                backbone, world.runs_of(data, method, shots, (61, 62, 63), backbone, epochs=epochs, **more)
            )
            for which, more in (("last", {"selection": "fixed"}), ("best", {}))
        }
        for (run, last), (best_run, best) in zip(every["last"], every["best"], strict=True):
            images, labels, bias = start_of(run)
            theirs, losses, alpha = run_official(official, best_run, images, labels, bias, epochs)
            x = F.normalize(images, dim=-1)
            start = {"W": F.one_hot(labels, classes).float().T @ x, "b": bias, "alpha": alpha}
            for which, found in (("last", last), ("best", best)):
                for name, one in theirs[which].items():
                    yield Row(
                        f"W, b, alpha of the {which} epoch", moved(found.weights[name], one, start[name])
                    )
            yield Row("losses", relative(last.losses, losses))
            W, b, alpha = theirs["best"].values()
            test, _ = world.tensors(data.split("test", "tip"))
            logits = test @ W.T + b + alpha * (test @ world.unit_texts(data))
            yield Row("logits", relative(world.logits_of(backbone, best_run, best), logits))


def start_of(run: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the images, one documented view of each, their labels, and the documented start of the bias."""
    features, labels = run.data.train_views(run.subset, "tip")
    view = np.random.default_rng(run.seed).integers(features.shape[1], size=len(labels))
    classes, most = len(run.data.class_names), features.shape[2] ** -0.5
    bias = np.random.default_rng([run.seed, 1]).uniform(-most, most, classes)
    images = features[np.arange(len(labels)), view]
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(bias).float()


def run_official(
    official: Any, run: Any, images: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor, epochs: int
) -> tuple[dict[str, dict[str, torch.Tensor]], np.ndarray, torch.Tensor]:
    """Return W, b and alpha of the last epoch and of the best on validation images, the losses, and alpha's start."""
    (test, test_labels), found = world.tensors(run.data.split("test", "tip")), SimpleNamespace(losses=[])

    def now() -> dict[str, torch.Tensor]:
        given = {"W": found.classifier.weight, "b": found.classifier.bias, "alpha": found.alpha}
        return {name: one.detach().clone() for name, one in given.items()}

    class Linear(torch.nn.Linear):
        def __init__(self, *given: Any, **more: Any):
            super().__init__(*given, **more)
            self.bias.data, found.classifier = bias.clone(), self

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            if given is test:  # measured whenever an epoch is the best
                found.best = now()
            return super().forward(given)

    def variable(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
        found.start, found.alpha = tensor.detach().clone(), tensor.detach().clone().requires_grad_()
        return found.alpha

    def cross_entropy(*given: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(*given)
        found.losses.append(loss.item())
        return loss

    official.nn, official.Variable = replaced(torch.nn, Linear=Linear), variable
    official.F = SimpleNamespace(cross_entropy=cross_entropy)
    config = {"train_epoch": epochs, "shots": run.shots, "dataset": "made-up", "output_dir": ""}
    val = [world.tensors(world.validation_of(run, "shots_val", "tip"), scaled=False)]
    texts, names = world.unit_texts(run.data), run.data.class_names
    with quiet():
        probe = official.LinearProbe_P2(config)
        probe([(images, labels)], val, test, test_labels, texts, clip_of_features(), names)
    return {"last": now(), "best": found.best}, np.array(found.losses), found.start
