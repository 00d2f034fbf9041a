"""CoCoOp: context vectors shifted, for each image, by a network of its feature (Zhou et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fastcoop.checks import LARGEST_BATCH
from fastcoop.memo import memoize
from fastcoop.methods.base import Outcome
from fastcoop.methods.data import Data
from fastcoop.methods.prompt_nets import PromptNetMethod, PromptNetSettings, prompt_net
from fastcoop.methods.schedule import epochs_of, steps_per_epoch
from fastcoop.methods.spec import RunSpec
from fastcoop.progress import counted

if TYPE_CHECKING:
    import torch

    from fastcoop.backbones import Backbone
    from fastcoop.engine import PromptEncoder
    from fastcoop.prompts import PromptLayout


class CoCoOpSettings(PromptNetSettings):
    """Settings of CoCoOp. The defaults are the official ones; a step encodes ``batch_size`` prompts of every class."""

    batch_size: int = Field(1, ge=1, le=LARGEST_BATCH)

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

    def layout(self, settings: CoCoOpSettings, backbone: Backbone) -> PromptLayout:
        from fastcoop.prompts import PromptLayout

        return PromptLayout(self.vectors(settings, backbone))

    def prompt_layout(self, settings: CoCoOpSettings, backbone: Backbone, data: Data) -> PromptLayout:
        return self.layout(settings, backbone)

    def new_net(
        self, backbone: Backbone, settings: CoCoOpSettings, contexts: torch.Tensor
    ) -> torch.nn.Module:
        import torch

        sizes = backbone.embed_dim, settings.reduction, contexts.shape[1]
        return prompt_net(contexts, *sizes, torch.nn.ReLU())

    def notes(self, runs: Sequence[Run]) -> Iterator[str]:
        def prompts(run: Run) -> tuple[int, int]:
            steps, images = epochs_of(run) * steps_per_epoch(run), len(run.subset.train)
            tested = sum(len(data.dataset.splits["test"]) * len(data.class_names) for data in run.tests)
            return steps * min(run.settings.batch_size, images) * len(run.data.class_names), tested

        trained, tested = map(sum, zip(*map(prompts, runs), strict=True))
        yield (
            f"{self.name} encodes a prompt per image and class: {trained:,} prompts forward and backward in training, "
            f"and {tested:,} in tests, in {counted(len(runs), 'run')}."
        )

    def train(self, backbone: Backbone, run: Run) -> Outcome:
        import torch
        from torch.nn.functional import cross_entropy

        from fastcoop.engine.runs import MOMENTUM, WEIGHT_DECAY

        encoder = _encoder(backbone, run.data.class_names, self.layout(run.settings, backbone))

        def backward(net: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
            total, start = 0.0, 0
            for logits in image_logits(net, encoder, images, backbone.logit_scale):  # a part of the images
                own = labels[start : (start := start + len(logits))]
                loss = cross_entropy(logits, own, reduction="sum") / len(labels)
                loss.backward()
                total += loss.item()
            return total

        def sgd(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

        return self.fit(backbone, run, sgd, backward)

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
        import torch

        from fastcoop.backbones.precision import fresh_state

        method, backbone = CoCoOpMethod(), self.backbone
        with fresh_state(), torch.no_grad():
            net = method.net(backbone, self.settings, self.weights)
            encoder = _encoder(backbone, self.class_names, method.layout(self.settings, backbone))
            images = torch.from_numpy(np.asarray(features, np.float32)).to(backbone.device)
            parts = [part.float().cpu() for part in image_logits(net, encoder, images, backbone.logit_scale)]
        return np.asarray(torch.cat(parts).numpy())

    def with_backbone(self, backbone: Backbone) -> ImageConditioned:
        """Return the classifier with the backbone that a pickle does not have."""
        return replace(self, backbone=backbone)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"backbone": None}


def image_logits(
    net: Any, encoder: PromptEncoder, images: torch.Tensor, logit_scale: float
) -> Iterator[torch.Tensor]:
    """Yield logits (part, classes) of images (n, dim) of length 1, as many at a time as fill a forest."""
    from torch.nn.functional import normalize

    for part in images.split(encoder.runs_at_once):
        contexts = net.ctx + net.meta_net(part)[:, None]  # (part, M, width)
        texts = normalize(encoder(contexts).to(contexts.dtype), dim=-1)
        yield logit_scale * (texts @ part[:, :, None])[..., 0]


@memoize(2)
def _encoder(backbone: Backbone, class_names: tuple[str, ...], layout: PromptLayout) -> PromptEncoder:
    from fastcoop.engine import PromptEncoder

    return PromptEncoder(backbone, class_names, layout)
