"""The zero-shot-initialized linear probe (ZS-LP), and CLAP, which holds it near its start (CVPR 2024, section 4)."""

from __future__ import annotations

from typing import ClassVar, Literal

from fastcoop.methods.adapters.base import Adapter, Fitted
from fastcoop.methods.adapters.selection import Judge
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized
from fastcoop.methods.adapters.training import ImageBatches, Optimizer, cosine_cross_entropy, train
from fastcoop.methods.base import MethodSettings
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.schedule import BatchSize, EpochNumber, LearningRate


class ZeroShotLinearProbeSettings(MethodSettings):
    """Settings of ZS-LP and CLAP. The defaults are the official ones, for all datasets and shots.

    Attributes:
        epochs: Epochs, of as many steps as the batch size goes into the number of images.
        batch_size: Views of a step, drawn from all views of all images.
        learning_rate: Of SGD.
    """

    epochs: EpochNumber = 300
    batch_size: BatchSize = 256
    learning_rate: LearningRate = 0.1


class CLAPSettings(ZeroShotLinearProbeSettings):
    """Settings of CLAP.

    Attributes:
        constraint: Whether the multipliers alpha_c stay as they are, or grow after each epoch with the distance to the
            start, by the steps of an augmented Lagrangian: alpha_c += rho_c h_c, then rho_c = h_c, where h_c is
            |w_c - t_c|^2 and rho_c starts at 0.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"constraint"})

    constraint: Literal["fixed", "adaptive"] = "fixed"


class ZeroShotLinearProbeMethod(Adapter[ZeroShotLinearProbeSettings]):
    """SGD on a prototype per class, which starts at the class's raw text feature; logits are scaled cosines.

    A class that the run has not learned keeps its zero-shot text.
    """

    name = "zs_lp"
    title = "ZS-LP"
    Settings = ZeroShotLinearProbeSettings
    by_class: ClassVar = {"prototypes": "raw"}
    text_length_matters = True

    def pull(self, stack: Stack, images: Tensor) -> Tensor | None:
        """Return the factor on each class's penalty, (runs, classes, 1); None for no penalty.

        ``images``: (runs, images, views, dim), as long as the factor on cosine similarities.
        """
        return None

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        settings, texts = stack.settings, stack.texts
        images = normalized(stack.views).mul_(texts.scale)
        pull = self.pull(stack, images)
        batches = ImageBatches(stack, images, settings.epochs, settings.batch_size, pooled=True)
        rates = batches.coop_rates(stack.value("learning_rate"))
        rho = texts.raw.new_zeros(())  # of the adaptive constraint

        def gradient(parameters: Weights, sums: Weights, momentum: float, *batch: Tensor) -> Tensor:
            prototypes, total = parameters["prototypes"], sums["prototypes"]
            images, labels = batch
            losses = cosine_cross_entropy(prototypes, images, labels, total, momentum)
            if pull is not None:
                moved = prototypes - texts.raw
                total.addcmul_(moved, pull, value=2)
                distance = torch.linalg.vector_norm(moved, dim=-1, keepdim=True).square_()
                losses += distance.mul_(pull).sum((1, 2))
            return losses

        def on_epoch(epoch: int, parameters: Weights) -> None:
            nonlocal rho
            if pull is not None and settings.constraint == "adaptive":
                distance = (parameters["prototypes"] - texts.raw).square().sum(-1, keepdim=True)
                pull.addcmul_(rho, distance, value=1 / len(texts))
                rho = distance

        start = {"prototypes": texts.raw.expand(len(stack), -1, -1)}
        learned, losses = train(start, batches, gradient, Optimizer("sgd", rates), on_epoch)
        return Fitted(learned, losses, trained=("prototypes",))

    def class_weights(self, weights: Weights, texts: Texts) -> tuple[Tensor, None]:
        return normalized(weights["prototypes"]), None


class CLAPMethod(ZeroShotLinearProbeMethod):
    """ZS-LP with the penalty mean_c alpha_c |w_c - t_c|^2, where zero-shot CLIP is right about class c's images.

    alpha_c is the mean zero-shot probability of class c over the views of its images. The official code has 0/0 for a
    class without images; here it is the mean over the other classes.
    """

    name = "clap"
    title = "CLAP"
    Settings = CLAPSettings

    def pull(self, stack: Stack, images: Tensor) -> Tensor:
        probabilities = (images @ stack.texts.unit.T).softmax(-1).mean(2)
        right = (probabilities * stack.onehot).sum(1)
        seen = stack.counts > 0
        alpha = right / stack.counts.clamp(min=1)
        alpha = alpha.where(seen, (alpha.sum(-1) / seen.sum(-1))[:, None])
        return alpha[..., None] / len(stack.texts)
