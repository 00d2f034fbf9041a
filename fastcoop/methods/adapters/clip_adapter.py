"""CLIP-Adapter: image features x become r MLP(x) + (1 - r) x (IJCV 2024, section 3.2)."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fastcoop.methods.adapters.base import Adapter, Fitted
from fastcoop.methods.adapters.selection import Judge
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.adapters.training import ImageBatches, Optimizer, by_autograd, cross_entropy, train
from fastcoop.methods.base import hidden_units
from fastcoop.methods.late import Backbone, Tensor
from fastcoop.methods.schedule import LearningRate, ScheduleSettings, epochs_of
from fastcoop.methods.spec import RunSpec

WEIGHT_DECAY = 5e-4


class CLIPAdapterSettings(ScheduleSettings):
    """Settings of CLIP-Adapter, besides `ScheduleSettings`: the official code is run with CoOp's schedule.

    Attributes:
        ratio: Share r of the adapted features, from 0, which is zero-shot CLIP, to 1.
        reduction: The hidden layer has dim / reduction units.
        learning_rate: Of SGD.
    """

    ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    reduction: Annotated[int, Field(ge=1, le=65_536)] = 4
    learning_rate: LearningRate = 0.002


class CLIPAdapterMethod(Adapter[CLIPAdapterSettings]):
    """Two linear maps without bias, each followed by a ReLU, on image features; classes are as in zero-shot CLIP.

    It learns nothing that belongs to a class, so it can be tested on any.
    """

    name = "clip_adapter"
    title = "CLIP-Adapter"
    Settings = CLIPAdapterSettings

    def check(self, run: RunSpec[CLIPAdapterSettings]) -> None:
        super().check(run)
        hidden_units(run.model.embed_dim, run.settings.reduction)

    def key_settings(self, run: RunSpec[CLIPAdapterSettings], backbone: Backbone) -> dict[str, Any]:
        return super().key_settings(run, backbone) | {"epochs": epochs_of(run)}

    def columns(self, run: RunSpec[CLIPAdapterSettings], backbone: Backbone) -> dict[str, Any]:
        schedule = {"epochs": epochs_of(run), "schedule": run.settings.schedule_label}
        return super().columns(run, backbone) | schedule

    def start(self, stack: Stack) -> Weights:
        """Return the weights at the start, drawn from each run's seed as ``torch.nn.Linear`` draws them."""
        dim, settings = stack.texts.raw.shape[1], stack.settings
        hidden = hidden_units(dim, settings.reduction)
        draws = [np.random.default_rng([run.seed, 1]) for run in stack.runs]

        def drawn(out: int, into: int) -> Tensor:
            limit = into**-0.5
            numbers = [rng.uniform(-limit, limit, (out, into)) for rng in draws]
            return stack.features.new_tensor(np.stack(numbers))

        return {"down": drawn(hidden, dim), "up": drawn(dim, hidden)}

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        settings, texts, ratio = stack.settings, stack.texts, stack.value("ratio")
        batches = ImageBatches(stack, stack.views, epochs_of(stack.runs[0]), settings.batch_size)
        rates = batches.coop_rates(stack.value("learning_rate"))

        def loss(parameters: Weights, images: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.logits({**parameters, "ratio": ratio}, images, texts), labels)

        optimizer = Optimizer("sgd", rates, WEIGHT_DECAY)
        learned, losses = train(self.start(stack), batches, by_autograd(loss), optimizer)
        return Fitted(learned | {"ratio": ratio}, losses, trained=("down", "up"))

    def logits(self, weights: Weights, images: Tensor, texts: Texts) -> Tensor:
        ratio = over(weights["ratio"], images)
        adapted = ((images @ weights["down"].mT).relu() @ weights["up"].mT).relu()
        return texts.zero_shot(normalized(ratio * adapted + (1 - ratio) * images))
