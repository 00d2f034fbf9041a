"""CLIP-Adapter: the model and the steps of ``clip_adapter.py`` of gaopengcuhk/CLIP-Adapter, on its features.

Where the input of a ReLU is within rounding of zero, the official code differs from itself, by up to 2e-3, if its start
changes by a rounding. Such runs have a row of their own, whose bar is that difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcoop.methods import METHODS
from fastcoop.methods.adapters.stack import Stack
from tools.parity import official, world
from tools.parity.world import Row, moved, relative

DIM = 1024  # as it is written
STARTS = 12  # that differ by rounding


def compare(folder: Path, method: str) -> Iterator[Row]:
    official.stub_dassl(folder / "Dassl.pytorch")
    official.stub_clip()
    trainers = official.load("clip_adapter", folder / "CLIP-Adapter/clip_adapter.py")
    for classes, views, shots, seed, size, epochs, rate in (
        (7, 3, 6, 3, 16, 30, 0.01),
        (11, 4, 2, 4, 32, 60, 0.002),
    ):
        data, backbone = world.made_up(classes, DIM, views, seed), world.scale_alone(DIM, world.ROUNDED_SCALE)
        given = {"epochs": epochs, "batch_size": size, "learning_rate": rate}
        runs = world.runs_of(data, method, shots, (41, 42), backbone, **given)
        starts = METHODS[method].start(Stack.of(backbone, runs))
        for place, (run, found) in enumerate(world.learned(backbone, runs)):
            start = {name: one[place] for name, one in starts.items()}
            weights, losses, logits = run_official(trainers, run, start, epochs, size, rate)

            def apart(one: Mapping[str, Any], weights=weights, start=start) -> float:
                return float(np.max([moved(one[name], weights[name], start[name]) for name in weights]))

            if (difference := apart(found.weights)) <= world.TRAINED:
                yield Row("both layers", difference)
            else:
                others = [
                    run_official(trainers, run, rounded(start, number), epochs, size, rate)[0]
                    for number in range(STARTS)
                ]
                bar = max(map(apart, others))
                yield Row("both layers, where a ReLU's input is within rounding of zero", difference, bar)
            yield Row("losses", relative(found.losses, losses))
            yield Row("logits", relative(world.logits_of(backbone, run, found), logits))


def rounded(start: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return weights that differ from ``start`` by about the rounding of float32."""
    draw, size = torch.Generator().manual_seed(seed), torch.finfo(torch.float32).eps
    return {name: one * (1 + size * torch.randn(one.shape, generator=draw)) for name, one in start.items()}


def run_official(
    trainers: Any, run: Any, start: Mapping[str, torch.Tensor], epochs: int, size: int, rate: float
) -> tuple[Any, ...]:
    """Return both layers' weights, the losses and the logits of test images."""
    texts = torch.from_numpy(run.data.text_features)
    trainers.TextEncoder.forward = lambda self: texts.clone()
    trainer = trainers.CLIP_Adapter()
    trainer.device = "cpu"
    trainer.model = trainers.CustomCLIP(None, run.data.class_names, official.clip_of_features())
    layers = trainer.model.adapter.fc
    weights = {"down": layers[0].weight, "up": layers[2].weight}
    with torch.no_grad():
        for name, one in weights.items():
            one.copy_(start[name])
    settings = official.optimizer_config(LR=rate, MAX_EPOCH=epochs)
    official.register(trainer, "clip_adapter", trainer.model.adapter, settings)
    losses = official.train(trainer, world.epochs_of(run, epochs, size))
    with torch.no_grad():
        logits = trainer.model.eval()(torch.from_numpy(run.data.split("test")[0]))
    return {name: one.detach() for name, one in weights.items()}, losses, logits
