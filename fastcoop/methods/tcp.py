"""TCP: a network turns each class's hand-written text feature into tokens of its prompt (Yao et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from fastcoop import engine
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, F, Tensor, fresh_state, torch
from fastcoop.methods.prompt_nets import (
    NetTraining,
    PromptNetMethod,
    PromptNetSettings,
    StepPart,
    check_layer,
    prompt_encoder,
)
from fastcoop.methods.schedule import Coefficient, Positive
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import Template, prompt_features
from fastcoop.methods.training import vectors
from fastcoop.prompts.layout import PromptLayout

ADAM_EPS = 1e-3  # as the official code's README asks for
# Where the official prompts are not the dataset's own: of the text features, and behind the vectors.
TEMPLATES = {
    "dtd": "a photo of a {}, a type of texture.",
    "fgvc_aircraft": "a photo of an aircraft {}.",
    "food101": "a photo of a {}, a type of food.",
}
FRAMES = {
    "dtd": "[CLASS] texture.",
    "fgvc_aircraft": "[CLASS], a type of aircraft.",
    "stanford_cars": "[CLASS], a type of car",
    "ucf101": "person doing [CLASS].",
}


class TCPSettings(PromptNetSettings):
    """Settings of TCP. The defaults are the official ones.

    Attributes:
        lmbda: Weight of 1 - cos of the learned and the hand-written text features.
        layer: The layer of the text tower, counted from 0, at whose input the network's tokens replace the context
            vectors.
        template: Hand-written prompt with one "{}". None: the dataset's, or the official code's where that differs.
    """

    init: str = Field("random", min_length=1)
    reduction: Positive = 4
    lmbda: Coefficient = 8.0
    layer: Positive = 8
    template: Template | None = None

    def paper_epochs(self, dataset: str, shots: int | str) -> int:
        return 25 if dataset.partition(":")[0] in ("imagenet", "sun397") else 50


Run = RunSpec[TCPSettings]


class TCPMethod(PromptNetMethod[TCPSettings]):
    """Each class's text feature h gives M tokens W2 quickgelu(W1 h + b1) + b2, which replace the context vectors."""

    name = "tcp"
    title = "TCP"
    Settings = TCPSettings
    needs_causal_tower = True

    def prompts(self, settings: TCPSettings, data: Data) -> tuple[str, ...]:
        name, own = data.name.partition(":")[0], data.dataset.template
        template = settings.template or TEMPLATES.get(name, own)
        # Its words behind the class name are those of the learned prompts, too.
        return (template,) if name in FRAMES or template == own else (template, own)

    def check(self, run: Run) -> None:
        super().check(run)
        check_layer(run.model, run.settings.layer)

    def key_settings(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        frame = self.layout(run.settings, backbone, run.data)
        prompts = {"template": self.prompts(run.settings, run.data)[0], "prompt": frame.prompt or "[CLASS]."}
        return super().key_settings(run, backbone) | prompts

    def layout(self, settings: TCPSettings, backbone: Backbone, data: Data) -> PromptLayout:
        """Return the vectors in place of the words before the class name in the dataset's own prompt."""
        own = "[CLASS]" + data.dataset.template.partition("{}")[2]
        frame = FRAMES.get(data.name.partition(":")[0], own)
        return PromptLayout.written(f"[V]x{vectors(settings, backbone)} {frame}")

    def outputs(self, contexts: Tensor) -> tuple[int, torch.nn.Module]:
        from open_clip.transformer import QuickGELU

        return contexts.numel(), QuickGELU()

    def run_shape(self, run: Run, backbone: Backbone) -> engine.RunShape:
        shape = super().run_shape(run, backbone)
        return replace(shape, layout=replace(shape.layout, class_specific=True))  # as it is above the layer

    def references(self, backbone: Backbone, settings: TCPSettings, data: Data) -> Tensor:
        template = self.prompts(settings, data)[0]
        return torch.from_numpy(prompt_features(backbone, data.class_names, template)).to(backbone.device)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.0, eps=ADAM_EPS, weight_decay=engine.optimizers.WEIGHT_DECAY)

    def inputs(self, net: Any, images: Any, references: Tensor | None) -> tuple[Tensor, Tensor]:
        assert references is not None
        return net.ctx[None], net.meta_net(references).view(1, len(references), *net.ctx.shape)

    def loss(self, one: NetTraining, features: Tensor, part: StepPart) -> Tensor:
        learned, texts = F.normalize(features[0], dim=-1), one.references
        assert texts is not None
        loss = F.cross_entropy(one.scale * part.images @ learned.T, part.labels)
        return loss + one.run.settings.lmbda * (1 - (learned * texts).sum(-1).mean())

    def classifier(self, backbone: Backbone, run: Run, data: Data) -> LinearClassifier:
        settings, layout = run.settings, self.layout(run.settings, backbone, data)
        with fresh_state(), torch.no_grad():
            net = self.net(backbone, settings, run.weights)
            encoder = prompt_encoder(backbone, data.class_names, layout, settings.layer)
            features = encoder(*self.inputs(net, None, self.references(backbone, settings, data)))[0]
        return LinearClassifier.of_texts(np.asarray(features.float().cpu().numpy()), backbone.logit_scale)
