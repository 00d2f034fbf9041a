"""What Table 5's methods on the text encoder's output share: a few learned numbers on top of frozen features.

The paper gives neither code nor settings for them. Chosen here: the zero-shot prompts' features at length 1, the
learned offset zero at the start, so that training begins at zero-shot CLIP and weight decay pulls towards it; CoOp's
SGD, batches and epochs; and the learning rate by accuracy on the run's own validation images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastcoop.methods.base import Method, Outcome
from fastcoop.methods.data import Data
from fastcoop.methods.schedule import LearningRate, ScheduleSettings, epoch_order, epochs_of, schedule_of
from fastcoop.methods.scores import LinearClassifier, accuracy, unit
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import class_texts

if TYPE_CHECKING:
    from torch import Tensor

    from fastcoop.backbones import Backbone

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # tried at once, as a batch of runs
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


class TextLearnerSettings(ScheduleSettings):
    """``learning_rate``: a number, or "validation": the best of five decades on the validation images, by accuracy,
    then by loss, then the smallest."""

    learning_rate: LearningRate | Literal["validation"] = "validation"


class TextLearner(Method[TextLearnerSettings]):
    """An offset learned on text features. Subclasses define its shape and how it is applied."""

    Settings = TextLearnerSettings
    needs_backbone = False
    kept: str  # the offset's name in ``Outcome.weights``

    @abstractmethod
    def shape(self, dim: int) -> tuple[int, ...]:
        """Return the shape of the offset for features of size ``dim``."""

    @abstractmethod
    def apply(self, offset: Tensor, texts: Tensor) -> Tensor:
        """Apply offsets (runs, *shape) to texts (classes, dim). Return (runs, classes, dim), of any length."""

    def validation_choice(self, settings: TextLearnerSettings) -> tuple[str, str] | None:
        if settings.learning_rate != "validation":
            return None
        return f"the learning rate of {self.name}", f"set learning_rate of {self.name} to a number"

    def key_settings(self, run: RunSpec[TextLearnerSettings], backbone: Backbone) -> dict[str, Any]:
        resolved = {"epochs": epochs_of(run), "views": run.data.views, "prompt": run.data.dataset.template}
        return run.settings.model_dump(mode="json") | resolved | {"rates": rates_of(run.settings)}

    def prompts(self, settings: TextLearnerSettings, data: Data) -> tuple[str, ...]:
        return (data.dataset.template,)

    def columns(self, run: RunSpec[TextLearnerSettings], backbone: Backbone) -> dict[str, Any]:
        return {"epochs": epochs_of(run), "schedule": schedule_of(run.settings)}

    def learn(self, backbone: Backbone, run: RunSpec[TextLearnerSettings]) -> Outcome:
        import torch

        from fastcoop.backbones.precision import fresh_state

        assert run.subset is not None
        rates = rates_of(run.settings)
        with fresh_state():
            offsets, losses = self._train(backbone, run, rates)
        best, extra = 0, dict[str, float]()
        if len(run.subset.val):
            best, on_validation = self._choose(backbone, run, offsets)
            if np.isfinite(on_validation):
                extra["val_accuracy"] = on_validation
        extra["learning_rate"] = rates[best]
        finite = bool(np.isfinite(losses[best]).all()) and bool(torch.isfinite(offsets[best]).all())
        return Outcome(
            {},
            losses[best],
            weights={self.kept: offsets[best].float().cpu().numpy()},
            status="done" if finite else "diverged",
            extra=extra,
        )

    def classifier(
        self, backbone: Backbone, run: RunSpec[TextLearnerSettings], data: Data
    ) -> LinearClassifier:
        import torch

        assert run.weights is not None
        offset, texts = (
            torch.from_numpy(run.weights[self.kept]),
            torch.from_numpy(self._texts(backbone, data)),
        )
        return LinearClassifier.of_texts(self.apply(offset[None], texts)[0].numpy(), backbone.logit_scale)

    def _texts(self, backbone: Backbone, data: Data) -> np.ndarray:
        return class_texts(backbone, data, data.dataset.template)

    def _train(
        self, backbone: Backbone, run: RunSpec[TextLearnerSettings], rates: Sequence[float]
    ) -> tuple[Tensor, np.ndarray]:
        """Train an offset per rate on the same batches. Return offsets (rates, *shape), losses (rates, epochs)."""
        import torch
        from torch.nn.functional import normalize

        from fastcoop.engine.runs import learning_rates

        assert run.subset is not None
        features, labels = run.data.train(run.subset)
        images = torch.from_numpy(unit(features[:, 1:] if features.shape[1] > 1 else features))
        images, targets = images.to(backbone.device), torch.from_numpy(labels).to(backbone.device)
        texts = torch.from_numpy(self._texts(backbone, run.data)).to(backbone.device)
        epochs = epochs_of(run)
        schedule = np.minimum([learning_rates(epochs, rate) for rate in rates], np.array(rates)[:, None])
        shape = self.shape(texts.shape[1])
        offsets = torch.zeros(len(rates), *shape, dtype=torch.float32, device=backbone.device)
        offsets.requires_grad_()
        momentum = torch.zeros_like(offsets)
        rng = np.random.default_rng(run.seed)
        losses = np.zeros((len(rates), epochs), np.float32)
        for epoch in range(epochs):
            rate = torch.tensor(schedule[:, epoch], dtype=torch.float32, device=backbone.device)
            rate = rate.view(-1, *[1] * len(shape))
            view = rng.integers(images.shape[1], size=len(images))
            steps = epoch_order(len(images), run.settings.batch_size, rng)
            for rows in steps:
                weights = normalize(self.apply(offsets, texts), dim=-1)
                logits = backbone.logit_scale * images[rows, view[rows]] @ weights.mT
                loss = -torch.log_softmax(logits, -1)[:, np.arange(len(rows)), targets[rows]].mean(1)
                (gradient,) = torch.autograd.grad(loss.sum(), offsets)
                with torch.no_grad():
                    momentum.mul_(MOMENTUM).add_(gradient).add_(offsets, alpha=WEIGHT_DECAY)
                    offsets -= rate * momentum
                losses[:, epoch] += loss.detach().cpu().numpy() / len(steps)
        return offsets.detach(), losses

    def _choose(
        self, backbone: Backbone, run: RunSpec[TextLearnerSettings], offsets: Tensor
    ) -> tuple[int, float]:
        """Return the index of the best offset on the validation images, and its accuracy there in percent, or NaN."""
        import torch

        assert run.subset is not None
        features, labels = run.data.validation(run.subset)
        texts = torch.from_numpy(self._texts(backbone, run.data)).to(backbone.device)
        weights = unit(self.apply(offsets, texts).cpu().numpy())
        logits = backbone.logit_scale * unit(features) @ weights.swapaxes(1, 2)
        probabilities = torch.log_softmax(torch.from_numpy(logits).double(), -1)
        loss = -probabilities[:, np.arange(len(labels)), labels].mean(1).numpy()
        found = accuracy(logits, labels)
        lost = ~np.isfinite(loss) | ~np.isfinite(found)
        order = np.lexsort((np.where(lost, np.inf, loss), np.where(lost, np.inf, -found)))
        return int(order[0]), float(np.where(lost, np.nan, found)[order[0]])


def rates_of(settings: TextLearnerSettings) -> tuple[float, ...]:
    """Return the learning rates that a run tries."""
    return RATES if settings.learning_rate == "validation" else (settings.learning_rate,)
