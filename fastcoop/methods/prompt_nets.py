"""Prompts that a small network makes: settings, start and training of CoCoOp and TCP.

Both learn context vectors and a network of two layers, in the layout and with the names of the official checkpoints
(``ctx``, ``meta_net.linear1.weight``, ...). A forest holds the prompts of a step of several runs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from fastcoop import backbones, engine
from fastcoop.errors import UserError
from fastcoop.memo import memoize
from fastcoop.methods.base import Outcome, hidden_units
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, F, State, Tensor, torch
from fastcoop.methods.schedule import LearningRate, Positive, ScheduleSettings
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.training import TrainedMethod
from fastcoop.progress import counted
from fastcoop.prompts.layout import PromptLayout


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


class PromptNetMethod(TrainedMethod[S]):
    """Context vectors and a network, trained by autograd over the forest of a step's prompts.

    Attributes:
        prompts_per_image: Whether each image has prompts of its own.
    """

    prompts_per_image: ClassVar[bool] = False

    def check(self, run: RunSpec[S]) -> None:
        super().check(run)
        hidden_units(run.model.embed_dim, run.settings.reduction)

    def trainer(self, settings: S) -> PromptNetTrainer:
        return PromptNetTrainer(self.name)

    @abstractmethod
    def outputs(self, contexts: Tensor) -> tuple[int, torch.nn.Module]:
        """Return the size of the network's output for contexts (M, width), and its activation."""

    @abstractmethod
    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Return the optimizer of a network. Its learning rate is set before each step."""

    @abstractmethod
    def inputs(self, net: Any, images: Tensor, references: Tensor | None) -> tuple[Tensor, ...]:
        """Return what a network gives to `encoder`, with a first dimension of sets of prompts: one, or one per image.

        Args:
            net: Of a run.
            images: Normalized images (n, dim) of its step.
            references: Its `references`.
        """

    @abstractmethod
    def loss(self, one: NetTraining, features: Tensor, part: StepPart) -> Tensor:
        """Return the loss of a part of a step from the class features (sets, classes, dim) of its `inputs`."""

    def references(self, backbone: Backbone, settings: S, data: Data) -> Tensor | None:
        """Return the hand-written text features (classes, dim) of length 1 that a network reads; None for none."""
        return None

    def new_net(self, backbone: Backbone, settings: S, contexts: Tensor) -> torch.nn.Module:
        """Return context vectors ``ctx`` (M, width) and a network ``meta_net`` of two layers that starts at random."""
        linear, inputs, (outputs, activation) = torch.nn.Linear, backbone.embed_dim, self.outputs(contexts)
        hidden = hidden_units(inputs, settings.reduction)
        layers = OrderedDict(linear1=linear(inputs, hidden), act=activation, linear2=linear(hidden, outputs))
        net = torch.nn.Module()
        net.ctx = torch.nn.Parameter(contexts.clone())
        net.meta_net = torch.nn.Sequential(layers)
        return net

    def net(self, backbone: Backbone, settings: S, weights: Mapping[str, np.ndarray]) -> torch.nn.Module:
        """Return a run's network with its learned weights."""
        with torch.random.fork_rng(devices=[]):  # whose random start is overwritten
            net = self.new_net(backbone, settings, torch.from_numpy(weights["ctx"]))
        net.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in weights.items()})
        return net.to(backbone.device)

    def training(self, backbone: Backbone, run: RunSpec[S]) -> NetTraining:
        """Return a run with its first network, and the batches that an engine's run of the same seed has."""
        drawn = self.engine_run(backbone, run)
        features = drawn.features
        dtype = torch.float64 if backbone.text.dtype == torch.float64 else torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            net = self.new_net(backbone, run.settings, drawn.contexts).to(backbone.device, dtype)
        references = self.references(backbone, run.settings, run.data)
        return NetTraining(
            method=self,
            run=run,
            scale=backbone.logit_scale,
            net=net,
            optimizer=self.optimizer(net.parameters()),
            images=features.flatten(0, 1).to(backbone.device),
            labels=drawn.labels.repeat_interleave(features.shape[1]).to(backbone.device),
            references=None if references is None else references.to(backbone.device, dtype),
            batches=torch.as_tensor(engine.runs.draw_batches(drawn)),
            rates=engine.runs.rates_by_step(drawn),
            losses=torch.zeros(drawn.steps, dtype=torch.float64),
            steps_per_epoch=drawn.steps_per_epoch,
        )

    def learned(self, backbone: Backbone, run: RunSpec[S], trained: NetTraining) -> Outcome:
        losses = trained.losses[: trained.step].view(-1, trained.steps_per_epoch).mean(1).numpy()
        weights = {name: tensor.float().cpu().numpy() for name, tensor in trained.net.state_dict().items()}
        return Outcome.learned(losses.astype(np.float32), weights=weights)


class StepPart(NamedTuple):
    """Images of a run's step, normalized (n, dim), their labels (n,), and the number of images in the whole step."""

    images: Tensor
    labels: Tensor
    step_images: int


@dataclass(eq=False, kw_only=True)
class NetTraining:
    """A run in training.

    Attributes:
        images, labels: Raw features (images * views, dim) and labels (images * views,), on the device.
        references: The method's `references`, in the network's precision.
        batches: Rows of ``images`` for each step (steps, batch size), -1 where a batch is short.
        rates: Learning rate of each step.
        losses: float64 (steps,).
        step: Steps done.
    """

    method: PromptNetMethod[Any]
    run: RunSpec[Any]
    scale: float
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    references: Tensor | None
    batches: Tensor
    rates: np.ndarray
    losses: Tensor
    steps_per_epoch: int
    step: int = 0

    @property
    def steps(self) -> int:
        return len(self.batches)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or an epoch whose loss is not finite."""
        is_epoch = self.step % self.steps_per_epoch == 0
        return self.step == self.steps or bool(is_epoch and not self.losses[: self.step].isfinite().all())

    def parts(self, most: int) -> Iterator[StepPart]:
        """Yield the images of the next step, at most ``most`` at a time if each has prompts of its own."""
        rows = self.batches[self.step]
        rows = rows[rows >= 0].to(self.images.device)
        dtype = next(self.net.parameters()).dtype
        images, size = F.normalize(self.images[rows].to(dtype), dim=-1), len(rows)
        if self.method.prompts_per_image:
            size = min(size, most)
        for some, labels in zip(images.split(size), self.labels[rows].split(size), strict=True):
            yield StepPart(some, labels, len(rows))

    def state(self, index: int) -> State:
        """Return what `restore` needs, named for the run's place among those that train."""
        own = {"step": torch.tensor(self.step), "losses": self.losses}
        own |= {f"weights_{k}": one.detach() for k, one in enumerate(self.net.parameters())}
        for k, kept in self.optimizer.state_dict()["state"].items():
            own |= {f"{name}_{k}": one for name, one in kept.items() if isinstance(one, torch.Tensor)}
        return {f"{name}.{index}": one.cpu().clone() for name, one in own.items()}

    def restore(self, index: int, state: State) -> None:
        """Continue from a state, if it has this run."""
        own = {name.rpartition(".")[0]: one for name, one in state.items() if name.endswith(f".{index}")}
        if not own:
            return
        self.step, self.losses = int(own.pop("step")), own.pop("losses")
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in own.items():
            what, _, place = name.rpartition("_")
            kept.setdefault(int(place), {})[what] = tensor
        with torch.no_grad():
            for k, parameter in enumerate(self.net.parameters()):
                parameter.copy_(kept[k].pop("weights"))
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": kept})


@dataclass(frozen=True)
class PromptNetTrainer:
    """Trains networks of one method: in each step, runs of equal prompts are encoded in one forest.

    Each run has its own optimizer, and the weights that it has alone.
    """

    method: str

    def costs(self, backbone: Backbone, trainings: Sequence[NetTraining]) -> list[float]:
        return [one.steps * self._step_cost(one) for one in trainings]

    def train(
        self,
        backbone: Backbone,
        trainings: Sequence[NetTraining],
        *,
        memory_budget: int | None,
        on_done: Callable[[int, NetTraining], None],
        on_progress: Callable[[float], None],
        state: State,
        on_step: Callable[[Callable[[], State]], None],
    ) -> None:
        def get_state() -> State:
            states = [one.state(n) for n, one in enumerate(trainings) if one.step]
            return {name: tensor for of_run in states for name, tensor in of_run.items()}

        def left(numbers: Sequence[int]) -> list[int]:
            for n in numbers:
                if trainings[n].ended:
                    on_done(n, trainings[n])
            return [n for n in numbers if not trainings[n].ended]

        by_encoder: dict[Any, list[int]] = {}
        for n, one in enumerate(trainings):
            one.restore(n, state)
            layout = one.method.layout(one.run.settings, backbone, one.run.data)
            key = one.run.data.class_names, layout, getattr(one.run.settings, "layer", None)
            by_encoder.setdefault(key, []).append(n)
        images = sum(one.images.nbytes for one in trainings)
        for key, numbers in by_encoder.items():
            active, room = left(numbers), _room(backbone, memory_budget, images, key)
            while active:
                with backbones.precision.limit_threads(backbone.text.heads):
                    _step(prompt_encoder(backbone, *key), [trainings[n] for n in active], room)
                on_progress(sum(self._step_cost(trainings[n]) for n in active))
                active = left(active)
                on_step(get_state)

    @staticmethod
    def _step_cost(one: NetTraining) -> float:
        images = one.batches.shape[1] if one.method.prompts_per_image else 1
        return float(images * len(one.run.data.class_names))


def _room(backbone: Backbone, budget: int | None, images: int, key: tuple[Any, ...]) -> int:
    """Return how many sets of prompts of `prompt_encoder` fit into memory at once, next to ``images`` bytes."""
    names, layout, layer = key
    deepest = replace(layout, class_specific=layer is not None)  # as it is from the layer on
    plan = engine.plan_training(backbone, [engine.RunShape(names, deepest, steps=1)], memory_budget=budget)
    return (plan.memory_bytes - plan.scratch_bytes - images) // max(1, plan.runs[0].tree.activation_bytes)


def _step(encoder: Any, active: Sequence[NetTraining], most: int) -> None:
    """Do one step of each run. ``encoder``: of the classes and the layout of all of them.

    A forest has at most ``most`` sets of prompts, or else those of one part: how a run is cut decides on its bits.
    """
    forests: list[list[tuple[NetTraining, StepPart]]] = []
    room = 0
    for one in active:
        one.optimizer.zero_grad()
        one.optimizer.param_groups[0]["lr"] = float(one.rates[one.step])
        for part in one.parts(encoder.runs_at_once):
            taken = len(part.images) if one.method.prompts_per_image else 1
            if taken > room:
                forests.append([])
                room = min(encoder.runs_at_once, most)
            room -= taken
            forests[-1].append((one, part))
    for forest in forests:
        inputs = [one.method.inputs(one.net, part.images, one.references) for one, part in forest]
        features = encoder(*map(torch.cat, zip(*inputs, strict=True)))
        by_part = features.to(inputs[0][0].dtype).split([len(first) for first, *_ in inputs])
        losses = [one.method.loss(one, own, part) for (one, part), own in zip(forest, by_part, strict=True)]
        torch.stack(losses).sum().backward()
        for (one, _), loss in zip(forest, losses, strict=True):
            one.losses[one.step] += loss.item()
    for one in active:
        one.optimizer.step()
        one.step += 1


@memoize(2)
def prompt_encoder(
    backbone: Backbone, class_names: tuple[str, ...], layout: PromptLayout, layer: int | None = None
) -> Any:
    """Return the encoder of prompts, kept for the next call; with a layer, one that replaces vectors there."""
    if layer is None:
        return engine.PromptEncoder(backbone, class_names, layout)
    from fastcoop.methods.class_tokens import ClassTokenEncoder  # it needs torch

    return ClassTokenEncoder(backbone, class_names, layout, layer)


def check_layer(backbone: Backbone, layer: int) -> None:
    """Raise UserError unless the text tower has the layer, counted from 0, and one before it."""
    layers = backbone.shared_text.layers
    if not 1 <= layer < layers:
        most = f"from 1 to {layers - 1}" if layers > 1 else "of a deeper text tower"
        raise UserError(
            f"Expected a layer {most}, at whose input context vectors are replaced, got {layer}: the text tower of "
            f"{backbone.name} has {counted(layers, 'layer')}, counted from 0."
        )
