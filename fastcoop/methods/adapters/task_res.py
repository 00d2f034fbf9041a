"""TaskRes: a residual x learned on each class's text feature t, which becomes t + alpha x (CVPR 2023, equation 5)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from fastcoop.methods.adapters.base import Adapter, Fitted
from fastcoop.methods.adapters.selection import Judge
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.adapters.training import ImageBatches, Optimizer, cosine_cross_entropy, train
from fastcoop.methods.base import MethodSettings
from fastcoop.methods.late import Backbone, Tensor
from fastcoop.methods.schedule import BatchSize, Coefficient, EpochNumber, LearningRate
from fastcoop.methods.spec import RunSpec

WEIGHT_DECAY = 5e-4


class TaskResSettings(MethodSettings):
    """Settings of TaskRes. "paper" stands for the value of the official scripts.

    Attributes:
        alpha: Factor on the residual. "paper": 1 on Oxford Flowers, 0.5 elsewhere.
        learning_rate: "paper": 2e-4 on ImageNet, 2e-3 elsewhere.
        epochs: "paper": 100 for up to 4 shots, 200 for more.
        batch_size: Images of a step.
    """

    alpha: Coefficient | Literal["paper"] = "paper"
    learning_rate: LearningRate | Literal["paper"] = "paper"
    epochs: EpochNumber | Literal["paper"] = "paper"
    batch_size: BatchSize = 256

    def resolved(self, run: RunSpec[Any]) -> dict[str, Any]:
        """Return the settings of a run, with the paper's values in place of "paper"."""
        name, few = run.data.name.partition(":")[0], run.shots != "all" and int(run.shots) <= 4
        paper = {
            "alpha": 1.0 if name == "oxford_flowers" else 0.5,
            "learning_rate": 2e-4 if name == "imagenet" else 2e-3,
            "epochs": 100 if few else 200,
        }
        given = self.model_dump(mode="json")
        return {field: paper[field] if value == "paper" else value for field, value in given.items()}


class TaskResMethod(Adapter[TaskResSettings]):
    """Adam on one residual per class, which starts at zero, where the method is zero-shot CLIP.

    A class that the run has not learned has no residual: it keeps its zero-shot text.
    """

    name = "task_res"
    title = "TaskRes"
    Settings = TaskResSettings
    by_class: ClassVar = {"x": ""}
    text_length_matters = True

    def key_settings(self, run: RunSpec[TaskResSettings], backbone: Backbone) -> dict[str, Any]:
        return super().key_settings(run, backbone) | run.settings.resolved(run)

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        given, texts = [run.settings.resolved(run) for run in stack.runs], stack.texts
        epochs, batch_size = given[0]["epochs"], given[0]["batch_size"]
        alpha = stack.features.new_tensor([one["alpha"] for one in given])
        rate = stack.features.new_tensor([one["learning_rate"] for one in given])
        batches = ImageBatches(stack, normalized(stack.views).mul_(texts.scale), epochs, batch_size)
        rates, factor = batches.coop_rates(rate), alpha[:, None, None]

        def gradient(parameters: Weights, sums: Weights, momentum: float, *batch: Tensor) -> Tensor:
            classes, total, (images, labels) = texts.raw.addcmul(factor, parameters["x"]), sums["x"], batch
            losses = cosine_cross_entropy(classes, images, labels, total)
            total.mul_(factor)
            return losses

        start = {"x": texts.raw.new_zeros(len(stack), *texts.raw.shape)}
        learned, losses = train(start, batches, gradient, Optimizer("adam", rates, WEIGHT_DECAY))
        return Fitted(learned | {"alpha": alpha}, losses, trained=("x",))

    def class_weights(self, weights: Weights, texts: Texts) -> tuple[Tensor, None]:
        x = weights["x"]
        return normalized(texts.raw + over(weights["alpha"], x) * x), None
