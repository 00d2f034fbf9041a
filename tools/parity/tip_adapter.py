"""Tip-Adapter and Tip-Adapter-F: ``main.py`` and ``utils.py`` of gaopengcuhk/Tip-Adapter, on its features."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.parity import world
from tools.parity.official import (
    clip_of_features,
    load,
    quiet,
    reads_arrays_as_numbers,
    replaced,
    stub,
    stub_clip,
)
from tools.parity.world import Row, moved, relative, same


def compare(folder: Path, method: str) -> Iterator[Row]:
    official = Official(folder / "Tip-Adapter")
    yield from (training_free if method == "tip_adapter" else trained)(official)


def training_free(official: Official) -> Iterator[Row]:
    for classes, dim, views, shots, seed in (
        (13, 96, 7, 3, 5), (31, 40, 1, 2, 6), (6, 128, 0, 1, 7), (20, 256, 2, 8, 8)
    ):  # fmt: skip
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim)
        given = {"selection": "full_val", "alpha_max": 5.5, "beta_max": 12.0}
        runs = world.runs_of(data, "tip_adapter", shots, (21, 22, 23), backbone, **given)
        for run, found in world.learned(backbone, runs):
            values, logits = official.training_free(run, [12.0, 5.5])
            yield same("alpha, beta", [float(found.weights[name]) for name in ("beta", "alpha")], values)
            yield Row("logits", relative(world.logits_of(backbone, run, found), logits), world.CLOSED_FORM)


def trained(official: Official) -> Iterator[Row]:
    for classes, dim, views, shots, seed, size, epochs, rate in (
        (13, 96, 5, 6, 8, 20, 25, 3e-3), (19, 48, 3, 16, 9, 256, 20, 1e-3)
    ):  # fmt: skip
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim)
        given = {"epochs": epochs, "batch_size": size, "learning_rate": rate}
        choosing = {"selection": "official", "alpha_max": 4.0, "beta_max": 9.0}
        for which, more in (("last", {"selection": "fixed"}), ("best", choosing)):
            runs = world.runs_of(data, "tip_adapter_f", shots, (31, 32, 33), backbone, **given, **more)
            for run, found in world.learned(backbone, runs):
                keys, start, chosen, logits = official.trained(run, epochs, size, rate, last=which == "last")
                yield Row(f"keys of the {which} epoch", moved(found.weights["keys"], keys, start))
                if which == "best":
                    own = [found.extra["epoch"], *(float(found.weights[name]) for name in ("beta", "alpha"))]
                    yield same("epoch, alpha, beta", own, chosen)
                    yield Row("logits", relative(world.logits_of(backbone, run, found), logits))


class Official:
    """The official functions. Logits are those that they last measure an accuracy of."""

    def __init__(self, folder: Path):
        stub("datasets", build_dataset=None)
        stub("datasets.utils", build_data_loader=None)
        stub_clip()
        self.cache = tempfile.TemporaryDirectory()
        self.utils = load("utils", folder / "utils.py")
        self.main = load("main", folder / "main.py")
        reads_arrays_as_numbers(self.utils)
        self.logits: list[torch.Tensor] = []
        self.measure = self.utils.cls_acc
        self.search = self.utils.search_hp

    def accuracy(self, logits: torch.Tensor, *given: Any) -> float:
        self.logits.append(logits.detach().clone())
        return self.measure(logits, *given)

    def prepare(self, run: Any, scale: list[float]) -> tuple[Any, ...]:
        """Return its configuration, cache keys and values, validation and test images, and texts."""
        config = {
            "load_cache": False, "augment_epoch": max(1, run.data.views), "cache_dir": self.cache.name,
            "shots": run.shots, "search_hp": True, "search_scale": scale, "search_step": [200, 20], "init_beta": 1.0,
            "init_alpha": 1.17,
        }  # fmt: skip
        self.main.cls_acc = self.accuracy
        keys, values = self.utils.build_cache_model(config, clip_of_features(), world.ViewLoader(run))
        images = [*world.tensors(run.data.split("val", "tip")), *world.tensors(run.data.split("test", "tip"))]
        return config, keys, values, images, world.unit_texts(run.data)

    def training_free(self, run: Any, scale: list[float]) -> tuple[Any, torch.Tensor]:
        """Return the chosen beta and alpha, and the logits of test images."""
        with quiet():
            config, keys, values, images, texts = self.prepare(run, scale)
            self.main.run_tip_adapter(config, keys, values, *images, texts)
            logits = self.logits[-1]
            return self.search(config, keys, values, *images[:2], texts), logits

    def trained(self, run: Any, epochs: int, size: int, rate: float, last: bool) -> tuple[Any, ...]:
        """Return keys, their start, the best epoch with beta and alpha, and the logits of test images.

        With ``last``, each epoch counts as better than those before it.
        """
        batches, layers, chosen = iter(list(world.epochs_of(run, epochs, size, keep_short=True))), [], []

        class Loader:
            def __len__(self) -> int:
                return -(-len(run.subset.train) // size)

            def __iter__(self) -> Any:
                return iter(next(batches))

        class Linear(torch.nn.Linear):
            def __init__(self, *given: Any, **more: Any):
                super().__init__(*given, **more)
                layers.append(self)

        def search(*given: Any, **more: Any) -> Any:
            chosen.append(self.search(*given, **more))
            return chosen[-1]

        with quiet() as printed:
            config, keys, values, images, texts = self.prepare(run, [9.0, 4.0])
            config |= {"lr": rate, "train_epoch": epochs}
            count = iter(range(1, sys.maxsize))
            if last:
                self.main.cls_acc = lambda *given: 1e-4 * next(count)
            self.main.nn, self.main.search_hp = replaced(torch.nn, Linear=Linear), search
            start = keys.t().clone()
            clip = clip_of_features()
            self.main.run_tip_adapter_F(config, keys.clone(), values, *images, texts, clip, Loader())
        epoch = 1 + int(printed.getvalue().partition("at epoch: ")[2].partition(".")[0])
        keys = layers[0].weight.detach()
        return keys, start, np.array([epoch, *chosen[-1]]), self.logits[-1] if self.logits else None
