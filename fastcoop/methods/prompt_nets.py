"""Prompts that a small network makes: settings, start and training of CoCoOp and TCP.

Both learn context vectors and a network of two layers, in the layout and with the names of the official checkpoints
(``ctx``, ``meta_net.linear1.weight``, ...). Each run trains by itself; the forest holds the prompts of its step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import Field

from fastcoop.errors import UserError
from fastcoop.methods.base import Outcome, report_share
from fastcoop.methods.data import Data
from fastcoop.methods.schedule import LearningRate, Positive, ScheduledMethod, ScheduleSettings, epochs_of
from fastcoop.methods.spec import RunSpec

if TYPE_CHECKING:
    import torch

    from fastcoop.backbones import Backbone
    from fastcoop.prompts import PromptLayout


class PromptNetSettings(ScheduleSettings):
    """Settings of methods that learn context vectors and a small network.

    Attributes:
        init: Words whose token embeddings the context vectors start from, or "random": N(0, 0.02^2).
        context_length: M, the number of random vectors. Words have one vector per token.
        reduction: The network's hidden layer is its input's size divided by this.
        learning_rate: Of the first epoch after the warm-up.
    """

    init: str = Field("a photo of a", min_length=1)
    context_length: Positive = 4
    reduction: Positive = 16
    learning_rate: LearningRate = 0.002

    @property
    def words(self) -> str | None:
        """The words that contexts start from; None if they start from random vectors."""
        return None if self.init == "random" else self.init

    def unused(self) -> Mapping[str, str | None]:
        return {"context_length": None} if self.words else {}  # it may be the words' number of tokens


S = TypeVar("S", bound=PromptNetSettings)


class PromptNetMethod(ScheduledMethod[S]):
    """Context vectors and a network, trained by autograd over the forest of a step's prompts."""

    def key_settings(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        settings, length = run.settings, self.vectors(run.settings, backbone)
        is_given = "context_length" in settings.model_fields_set and not run.has_learned
        if is_given and settings.context_length != length:
            raise UserError(
                f'The words "{settings.init}" are {length} tokens, so the context of {self.name} has {length} vectors '
                f"and the context_length of {settings.context_length} is not used: leave it out, or give init: random."
            )
        return super().key_settings(run, backbone) | {"context_length": length}

    def columns(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        given = {"context_length": self.vectors(run.settings, backbone), "init": run.settings.init}
        return super().columns(run, backbone) | given

    @staticmethod
    def vectors(settings: S, backbone: Backbone) -> int:
        """Return M, the number of context vectors."""
        from fastcoop.prompts.vectors import word_tokens

        return len(word_tokens(backbone, settings.words)) if settings.words else settings.context_length

    def learn(self, backbone: Backbone, run: RunSpec[S]) -> Outcome:
        from fastcoop.backbones.precision import fresh_state

        with fresh_state():
            return self.train(backbone, run)

    @abstractmethod
    def train(self, backbone: Backbone, run: RunSpec[S]) -> Outcome:
        """Train a run's network, by `fit`."""

    @abstractmethod
    def new_net(self, backbone: Backbone, settings: S, contexts: torch.Tensor) -> torch.nn.Module:
        """Return the network of a run that starts from these contexts (M, width), by `prompt_net`."""

    @abstractmethod
    def prompt_layout(self, settings: S, backbone: Backbone, data: Data) -> PromptLayout:
        """Return the layout of the prompts of ``data``'s classes."""

    def net(self, backbone: Backbone, settings: S, weights: Mapping[str, np.ndarray]) -> torch.nn.Module:
        """Return a run's network with its learned weights."""
        import torch

        with torch.random.fork_rng(devices=[]):  # whose random start is overwritten
            net = self.new_net(backbone, settings, torch.from_numpy(weights["ctx"]))
        net.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in weights.items()})
        return net.to(backbone.device)

    def fit(
        self,
        backbone: Backbone,
        run: RunSpec[S],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        backward: Callable[[Any, torch.Tensor, torch.Tensor], float],
    ) -> Outcome:
        """Train a run's network on the batches that an engine's run of the same seed has.

        Args:
            backbone: Its text tower's precision, at least float32, and device are the network's.
            run: The run.
            optimizer: Makes the optimizer of the network's parameters. Its rate is set every epoch.
            backward: Called with the network, normalized images (batch, dim) and labels (batch,); returns the loss, and
                leaves its gradients in the parameters.
        """
        import torch
        from torch.nn.functional import normalize

        from fastcoop.engine import Run
        from fastcoop.engine.runs import draw_batches, learning_rates
        from fastcoop.prompts import initial_contexts

        settings, names, epochs = run.settings, run.data.class_names, epochs_of(run)
        layout = self.prompt_layout(settings, backbone, run.data)
        start = initial_contexts(backbone, layout, len(names), run.seed, settings.words)
        features, labels = map(torch.from_numpy, run.data.train_views(run.subset))
        size, base_rate = settings.batch_size, settings.learning_rate
        drawn = Run(names, layout, start, features, labels, epochs, run.seed, size, base_rate)
        batches, per_epoch = torch.as_tensor(draw_batches(drawn)), drawn.steps_per_epoch
        dtype = torch.float64 if backbone.text.dtype == torch.float64 else torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            net = self.new_net(backbone, settings, start).to(backbone.device, dtype)
        images, labels = features.flatten(0, 1).to(backbone.device), labels.to(backbone.device)
        chosen = optimizer(net.parameters())
        losses, views = list[float](), features.shape[1]
        for rate, epoch in zip(learning_rates(epochs, base_rate), batches.split(per_epoch), strict=True):
            chosen.param_groups[0]["lr"], total = float(rate), 0.0
            for batch in epoch:
                rows = batch[batch >= 0].to(backbone.device)
                chosen.zero_grad()
                total += backward(net, normalize(images[rows].to(dtype), dim=-1), labels[rows // views])
                chosen.step()
                report_share(1 / len(batches))
            losses.append(total / per_epoch)
            if not np.isfinite(total):
                break
        weights = {name: tensor.float().cpu().numpy() for name, tensor in net.state_dict().items()}
        finite = np.isfinite(losses[-1]) and all(np.isfinite(array).all() for array in weights.values())
        status = "done" if finite else "diverged"
        return Outcome({}, np.array(losses, np.float32), weights=weights, status=status)


def prompt_net(
    contexts: torch.Tensor, inputs: int, reduction: int, outputs: int, activation: torch.nn.Module
) -> torch.nn.Module:
    """Return a module with context vectors ``ctx`` and a network ``meta_net`` of two layers.

    Raises UserError for a reduction that leaves no hidden unit.
    """
    import torch

    if reduction > inputs:
        raise UserError(
            f"Expected a reduction of at most {inputs}, the size of a feature, got {reduction}; give a smaller number."
        )
    linear, hidden = torch.nn.Linear, inputs // reduction
    layers = OrderedDict(linear1=linear(inputs, hidden), act=activation, linear2=linear(hidden, outputs))
    net = torch.nn.Module()
    net.ctx = torch.nn.Parameter(contexts.clone())
    net.meta_net = torch.nn.Sequential(layers)
    return net
