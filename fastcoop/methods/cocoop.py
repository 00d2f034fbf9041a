"""CoCoOp: context vectors shifted, for each image, by a network of its feature (Zhou et al., CVPR 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastcoop import engine
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, F, Tensor, fresh_state, torch
from fastcoop.methods.prompt_nets import (
    NetTraining,
    PromptNetMethod,
    PromptNetSettings,
    StepPart,
    prompt_encoder,
)
from fastcoop.methods.schedule import BatchSize, epochs_of, sgd, steps_per_epoch
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.training import vectors
from fastcoop.progress import counted
from fastcoop.prompts.layout import PromptLayout


class CoCoOpSettings(PromptNetSettings):
    """Settings of CoCoOp. The defaults are the official ones; a step encodes ``batch_size`` prompts of every class."""

    batch_size: BatchSize = 1

    def paper_epochs(self, dataset: str, shots: int | str) -> int:
        return 10


Run = RunSpec[CoCoOpSettings]


class CoCoOpMethod(PromptNetMethod[CoCoOpSettings]):
    """Each image x has the context vectors v_m + W2 relu(W1 x + b1) + b2, so class features of its own.

    The images of a step are the runs of a forest: their prompts share the start token and the class names' layout, and
    nothing else. Testing encodes a prompt per image and class.
    """

    name = "cocoop"
    title = "CoCoOp"
    Settings = CoCoOpSettings
    prompts_per_image = True
    tested_at_once = 1  # each takes long

    def layout(self, settings: CoCoOpSettings, backbone: Backbone, data: Data) -> PromptLayout:
        return PromptLayout(vectors(settings, backbone))

    def outputs(self, contexts: Tensor) -> tuple[int, torch.nn.Module]:
        return contexts.shape[1], torch.nn.ReLU()

    def notes(self, runs: Sequence[Run]) -> Iterator[str]:
        trained, tested = map(sum, zip(*map(_prompts, runs), strict=True))
        yield (
            f"{self.name} encodes a prompt per image and class: {trained:,} prompts forward and backward in training, "
            f"and {tested:,} in tests, in {counted(len(runs), 'run')}."
        )

    def run_shape(self, run: Run, backbone: Backbone) -> engine.RunShape:
        trained, tested = _prompts(run)  # a step of one image each; tests are as long, but only go forward
        steps = math.ceil((trained + tested / 2) / len(run.data.class_names))
        return replace(super().run_shape(run, backbone), steps=steps)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return sgd(parameters)

    def inputs(self, net: Any, images: Tensor, references: Any) -> tuple[Tensor]:
        return (net.ctx + net.meta_net(images)[:, None],)

    def loss(self, one: NetTraining, features: Tensor, part: StepPart) -> Tensor:
        logits = _logits(features, part.images, one.scale)
        return F.cross_entropy(logits, part.labels, reduction="sum") / part.step_images

    def classifier(self, backbone: Backbone, run: Run, data: Data) -> ImageConditioned:
        return ImageConditioned(run.settings, dict(run.weights), data.class_names, backbone)


@dataclass(frozen=True, eq=False)
class ImageConditioned:
    """A trained CoCoOp's logits, for which each image has class features of its own.

    Attributes:
        settings: Of the run.
        weights: What it learned.
        class_names: Names of the classes.
        backbone: Encodes the prompts. A pickle has none in its place.
    """

    settings: CoCoOpSettings
    weights: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    backbone: Any = field(repr=False)
    unit_length = True

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits float32 (images, classes) of features (images, dim) of length 1."""
        method, backbone = CoCoOpMethod(), self.backbone
        with fresh_state(), torch.no_grad():
            net = method.net(backbone, self.settings, self.weights)
            layout = PromptLayout(len(self.weights["ctx"]))
            encoder = prompt_encoder(backbone, self.class_names, layout)
            images = torch.tensor(features, dtype=torch.float32, device=backbone.device)
            found = []
            for part in images.split(encoder.runs_at_once):
                texts = encoder(*method.inputs(net, part, None)).to(part.dtype)
                found.append(_logits(texts, part, backbone.logit_scale))
        return np.asarray(torch.cat(found).float().cpu().numpy())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"backbone": None}


def _prompts(run: Run) -> tuple[int, int]:
    """Return the number of prompts that a run encodes in training, and in tests."""
    steps, images = epochs_of(run) * steps_per_epoch(run), len(run.subset.train)
    tested = sum(len(data.dataset.splits["test"]) * len(data.class_names) for data in run.tests)
    return steps * min(run.settings.batch_size, images) * len(run.data.class_names), tested


def _logits(features: Tensor, images: Tensor, scale: float) -> Tensor:
    """Return logits (n, classes) from class features (n, classes, dim) of each image (n, dim) of length 1."""
    return scale * (F.normalize(features, dim=-1) @ images[:, :, None])[..., 0]
