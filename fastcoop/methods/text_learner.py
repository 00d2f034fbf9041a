"""Table 5's methods on the text encoder's output: a linear layer, or a bias, learned on frozen text features.

The paper gives neither code nor settings for them. Chosen here: the text features of the dataset's own prompt at length
1; a learned offset that is zero at the start, so that training begins at zero-shot CLIP and weight decay pulls towards
it; and CoOp's SGD, batches and epochs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from fastcoop import engine
from fastcoop.methods.base import Outcome
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, F, Tensor, fresh_state, torch
from fastcoop.methods.schedule import LearningRate, ScheduledMethod, ScheduleSettings, epoch_order, epochs_of
from fastcoop.methods.scores import LinearClassifier, accuracy, unit
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import class_texts

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # trained at once


class TextLearnerSettings(ScheduleSettings):
    """Settings of the methods on text features.

    Attributes:
        learning_rate: A number, or "validation": the best of five powers of ten on the run's validation images, by
            accuracy, then by loss, then the smallest.
    """

    learning_rate: LearningRate | Literal["validation"] = "validation"

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that a run tries."""
        return RATES if self.learning_rate == "validation" else (self.learning_rate,)


Run = RunSpec[TextLearnerSettings]


class TextLearner(ScheduledMethod[TextLearnerSettings]):
    """An offset learned on text features.

    Attributes:
        weight_name: The offset's name in ``Outcome.weights``.
        axes: Its axes, each as long as a feature.
    """

    Settings = TextLearnerSettings
    needs_backbone = False
    reads_prompt = True
    weight_name: ClassVar[str]
    axes: ClassVar[int]

    @abstractmethod
    def apply(self, offset: Tensor, texts: Tensor) -> Tensor:
        """Apply offsets (runs, dim, ...) to texts (classes, dim). Return (runs, classes, dim), of any length."""

    def label(self, settings: TextLearnerSettings) -> str:
        return self.name.replace("_", " ").capitalize()

    def validation_choice(self, settings: TextLearnerSettings) -> tuple[str, str] | None:
        if settings.learning_rate != "validation":
            return None
        return f"the learning rate of {self.name}", f"set learning_rate of {self.name} to a number"

    def key_settings(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        return super().key_settings(run, backbone) | {"rates": run.settings.rates}

    def learn(self, backbone: Backbone, run: Run) -> Outcome:
        rates = run.settings.rates
        with fresh_state():
            offsets, losses = self._train(backbone, run, rates)
        best, extra = 0, dict[str, float]()
        if len(run.subset.val):
            best, on_validation = self._choose(backbone, run, offsets)
            if np.isfinite(on_validation):
                extra["val_accuracy"] = on_validation
        extra["learning_rate"] = rates[best]
        weights = {self.weight_name: offsets[best].float().cpu().numpy()}
        return Outcome.learned(losses[best], weights=weights, extra=extra)

    def classifier(self, backbone: Backbone, run: Run, data: Data) -> LinearClassifier:
        offset = torch.from_numpy(run.weights[self.weight_name])[None]
        texts = self.apply(offset, torch.from_numpy(class_texts(backbone, data)))[0].numpy()
        return LinearClassifier.of_texts(texts, backbone.logit_scale)

    def _train(self, backbone: Backbone, run: Run, rates: Sequence[float]) -> tuple[Tensor, np.ndarray]:
        """Train an offset per rate on the same batches. Return offsets (rates, dim, ...), losses (rates, epochs)."""
        features, labels = run.data.train_views(run.subset)
        given = unit(features.astype(np.float32)), labels, class_texts(backbone, run.data)
        images, targets, texts = (torch.from_numpy(array).to(backbone.device) for array in given)
        epochs, shape = epochs_of(run), self.axes * (texts.shape[1],)
        schedule = [np.minimum(engine.schedule.learning_rates(epochs, rate), rate) for rate in rates]
        offsets = torch.zeros(len(rates), *shape, dtype=torch.float32, device=backbone.device)
        offsets.requires_grad_()
        momentum = torch.zeros_like(offsets)
        rng, rule = np.random.default_rng(run.seed), engine.optimizers
        losses = np.zeros((len(rates), epochs), np.float32)
        for epoch in range(epochs):
            now = [of_rate[epoch] for of_rate in schedule]
            rate = torch.tensor(now, dtype=torch.float32, device=backbone.device)
            rate = rate.view(-1, *[1] * len(shape))
            view = rng.integers(images.shape[1], size=len(images))
            steps = epoch_order(len(images), run.settings.batch_size, rng)
            for rows in steps:
                weights = F.normalize(self.apply(offsets, texts), dim=-1)
                logits = backbone.logit_scale * images[rows, view[rows]] @ weights.mT
                loss = -torch.log_softmax(logits, -1)[:, np.arange(len(rows)), targets[rows]].mean(1)
                (gradient,) = torch.autograd.grad(loss.sum(), offsets)
                with torch.no_grad():
                    momentum.mul_(rule.MOMENTUM).add_(gradient).add_(offsets, alpha=rule.WEIGHT_DECAY)
                    offsets -= rate * momentum
                losses[:, epoch] += loss.detach().cpu().numpy() / len(steps)
        return offsets.detach(), losses

    def _choose(self, backbone: Backbone, run: Run, offsets: Tensor) -> tuple[int, float]:
        """Return the index of the best offset on the validation images, and its accuracy there in percent, or NaN."""
        features, labels = run.data.validation(run.subset)
        texts = torch.from_numpy(class_texts(backbone, run.data)).to(backbone.device)
        weights = unit(self.apply(offsets, texts).cpu().numpy())
        logits = backbone.logit_scale * unit(features) @ weights.swapaxes(1, 2)
        probabilities = torch.log_softmax(torch.from_numpy(logits).double(), -1)
        loss = -probabilities[:, np.arange(len(labels)), labels].mean(1).numpy()
        found = accuracy(logits, labels)
        diverged = ~np.isfinite(loss + found)
        loss[diverged] = found[diverged] = np.nan
        best = int(np.lexsort((loss, -found))[0])  # NaN sorts last
        return best, float(found[best])


class TextTransformMethod(TextLearner):
    """Each class's text feature t becomes t + A t, with A learned (dim, dim) and zero at the start."""

    name = "text_transform"
    weight_name = "transform"
    axes = 2

    def apply(self, offset: Tensor, texts: Tensor) -> Tensor:
        return texts + texts @ offset.mT


class TextBiasMethod(TextLearner):
    """Each class's text feature t becomes t + b, with b learned (dim,), the same for all classes."""

    name = "text_bias"
    weight_name = "bias"
    axes = 1

    def apply(self, offset: Tensor, texts: Tensor) -> Tensor:
        return texts + offset[:, None]
