"""TCP: a network turns each class's hand-written text feature into tokens of its prompt (Yao et al., CVPR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fastcoop.methods.base import Outcome
from fastcoop.methods.data import Data
from fastcoop.methods.prompt_nets import PromptNetMethod, PromptNetSettings, prompt_net
from fastcoop.methods.schedule import Coefficient, Positive
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import Template, prompt_features

if TYPE_CHECKING:
    import torch

    from fastcoop.backbones import Backbone
    from fastcoop.engine.encoder import ClassTokenEncoder
    from fastcoop.prompts import PromptLayout

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
        own = TEMPLATES.get(data.name.partition(":")[0], data.dataset.template)
        return (settings.template or own,)

    def key_settings(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        from fastcoop.engine.encoder import check_layer

        check_layer(backbone, run.settings.layer)
        frame = self.prompt_layout(run.settings, backbone, run.data)
        prompts = {"template": self.prompts(run.settings, run.data)[0], "prompt": frame.prompt or "[CLASS]."}
        return super().key_settings(run, backbone) | prompts

    def prompt_layout(self, settings: TCPSettings, backbone: Backbone, data: Data) -> PromptLayout:
        """Return the vectors in place of the words before the class name in the dataset's own prompt."""
        from fastcoop.prompts import PromptLayout

        own = "[CLASS]" + data.dataset.template.partition("{}")[2]
        frame = FRAMES.get(data.name.partition(":")[0], own)
        return PromptLayout.written(f"[V]x{self.vectors(settings, backbone)} {frame}")

    def new_net(self, backbone: Backbone, settings: TCPSettings, contexts: torch.Tensor) -> torch.nn.Module:
        from open_clip.transformer import QuickGELU

        sizes = backbone.embed_dim, settings.reduction, contexts.numel()
        return prompt_net(contexts, *sizes, QuickGELU())

    def train(self, backbone: Backbone, run: Run) -> Outcome:
        import torch
        from torch.nn.functional import cross_entropy, normalize

        from fastcoop.engine.runs import WEIGHT_DECAY

        encoder, texts = self._encoder(backbone, run, run.data), self._texts(backbone, run, run.data)

        def backward(net: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
            reference = texts.to(images)
            learned = normalize(class_features(net, encoder, reference).to(images), dim=-1)
            loss = cross_entropy(backbone.logit_scale * images @ learned.T, labels)
            loss = loss + run.settings.lmbda * (1 - (learned * reference).sum(-1).mean())
            loss.backward()
            return float(loss.item())

        def adam(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, lr=0.0, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)

        return self.fit(backbone, run, adam, backward)

    def classifier(self, backbone: Backbone, run: Run, data: Data) -> LinearClassifier:
        import torch

        from fastcoop.backbones.precision import fresh_state

        with fresh_state(), torch.no_grad():
            net, encoder = self.net(backbone, run.settings, run.weights), self._encoder(backbone, run, data)
            features = class_features(net, encoder, self._texts(backbone, run, data)).float().cpu().numpy()
        return LinearClassifier.of_texts(np.asarray(features), backbone.logit_scale)

    def _encoder(self, backbone: Backbone, run: Run, data: Data) -> ClassTokenEncoder:
        from fastcoop.engine.encoder import ClassTokenEncoder

        layout = self.prompt_layout(run.settings, backbone, data)
        return ClassTokenEncoder(backbone, data.class_names, layout, run.settings.layer)

    def _texts(self, backbone: Backbone, run: Run, data: Data) -> torch.Tensor:
        """Return the hand-written text features of the classes (classes, dim), of length 1."""
        import torch

        (template,) = self.prompts(run.settings, data)
        return torch.from_numpy(prompt_features(backbone, data.class_names, template)).to(backbone.device)


def class_features(net: Any, encoder: ClassTokenEncoder, texts: torch.Tensor) -> torch.Tensor:
    """Return class features (classes, dim), not normalized, of the hand-written ones ``texts`` (classes, dim)."""
    tokens = net.meta_net(texts).view(len(texts), *net.ctx.shape)
    return encoder(net.ctx, tokens)
