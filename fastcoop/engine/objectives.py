"""Objectives: what runs learn. From class features and the images of a step to losses, and gradients of class features.

An objective belongs to one run. Runs of one tree, number of images and kind of objective are computed together, by one
objective whose tensors and floats are those of all these runs, stacked. Ten lines make one's own:

    @dataclass(frozen=True, eq=False)
    class Smoothed(Objective):
        smoothing: float = 0.1

        def losses(self, texts, images):
            log_p = torch.log_softmax(images.logits(texts), -1)  # (runs, images, classes)
            right = log_p.gather(-1, images.targets)[..., 0]
            s = self.smoothing[:, None]  # the float of each run: (runs,)
            return -(1 - s) * right - s * log_p.mean(-1)

    run = fc.Run(..., objective=Smoothed(0.2))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fastcoop.engine.schedule import expect
from fastcoop.engine.weights import bmm


@dataclass(frozen=True, eq=False)
class Images:
    """The images that some runs learn from in a step, or a part of them.

    Attributes:
        features: (runs, images, dim), of length 1.
        labels: int64 (runs, images), -1 where a run has fewer images than others.
        weights: (runs, images), the share of each image in its run's mean; 0 for a label of -1.
        logit_scale: Logits are this times the cosine.
        product: Multiplies batches of matrices.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor
    logit_scale: float
    product: Callable[[Tensor, Tensor], Tensor] = bmm

    @property
    def targets(self) -> Tensor:
        """Labels as an index of classes, (runs, images, 1)."""
        return self.labels.clamp(min=0)[..., None]

    def logits(self, texts: Tensor) -> Tensor:
        """Return logits (runs, images, classes) for class features of length 1, (runs, classes, dim)."""
        return self.logit_scale * self.product(self.features, texts.transpose(1, 2))


O = TypeVar("O", bound="Objective")  # noqa: E741


@dataclass(frozen=True, eq=False)
class Objective:
    """What a run learns. Subclasses are dataclasses; tensors and floats in their fields may differ from run to run.

    Inside the methods, such a field holds the values of several runs, (runs, ...), on the device.

    Attributes:
        parts: Number of gradients; with more than one, `losses` returns as many losses, and `combine` merges them.
    """

    parts: ClassVar[int] = 1

    def losses(self, texts: Tensor, images: Images) -> Tensor | Sequence[Tensor]:
        """Return the loss of each image, (runs, images), whose mean a run minimizes; torch differentiates it.

        Args:
            texts: Class features (runs, classes, dim), of length 1.
            images: Their number may be a part of a step's: the loss of an image must not depend on other images.

        Returns:
            With several ``parts``, a loss per part; the first is the one that is recorded.
        """
        raise NotImplementedError

    def penalty(self, texts: Tensor) -> Tensor | None:
        """Return a loss (runs,) without images, which is added to the first part; None for none."""
        return None

    def combine(self, grads: Sequence[Tensor]) -> Tensor:
        """Merge the gradients of the contexts by each part, (runs, vectors, width), into one."""
        return grads[0]

    def gradients(self, texts: Tensor, images: Images) -> tuple[Tensor, list[Tensor]]:
        """Return the weighted mean loss (runs,) of the first part, and for each part its gradient for ``texts``.

        Override it, in place of `losses`, where the gradient is written out by hand.
        """
        with torch.enable_grad():
            texts = texts.detach().requires_grad_()
            found = self.losses(texts, images)
            parts = [found] if isinstance(found, Tensor) else found
            means = [(one * images.weights).sum(1) for one in parts]
            grads = [torch.autograd.grad(mean.sum(), texts, retain_graph=True)[0] for mean in means]
        return means[0].detach(), grads

    # What the engine needs.

    @property
    def kind(self) -> Hashable:
        """What runs must have in common to be computed together."""
        values = (getattr(self, field.name) for field in fields(self))
        alike = (one.shape if isinstance(one, Tensor) else one for one in values)
        return type(self), *(float if isinstance(one, float) else one for one in alike)

    @classmethod
    def stack(cls: type[O], objectives: Sequence[O], dtype: torch.dtype, device: torch.device) -> O:
        """Return the objective of several runs of one kind."""

        def stacked(name: str) -> Tensor:
            values = torch.stack([torch.as_tensor(getattr(one, name)) for one in objectives])
            return values.to(device, dtype if values.is_floating_point() else None)

        return objectives[0]._with(stacked)

    def of_runs(self: O, runs: slice) -> O:
        """Return the objective of some of its runs."""
        return self._with(lambda name: getattr(self, name)[runs])

    def _with(self: O, value_of: Callable[[str], Any]) -> O:
        """Return a copy with other values in the fields that differ from run to run."""
        other = copy.copy(self)
        for field in fields(self):
            if isinstance(getattr(self, field.name), Tensor | float):
                object.__setattr__(other, field.name, value_of(field.name))
        return other


class CrossEntropy(Objective):
    """CoOp's objective (equation 3): the mean cross-entropy of the images."""

    def gradients(self, texts: Tensor, images: Images) -> tuple[Tensor, list[Tensor]]:
        logits, target = images.logits(texts), images.targets
        losses = -(torch.log_softmax(logits, -1).gather(-1, target)[..., 0] * images.weights).sum(1)
        # Not exp(log_softmax): an element-wise exponential rounds by a number's place in memory, a softmax row by row.
        grad_logits = torch.softmax(logits, -1)
        grad_logits.scatter_add_(-1, target, torch.full_like(grad_logits[..., :1], -1.0))
        grad_logits *= images.weights[..., None] * images.logit_scale
        return losses, [images.product(grad_logits.transpose(1, 2), images.features)]


@dataclass(frozen=True, eq=False)
class PullToPrompt(CrossEntropy):
    """Cross-entropy, and a pull of the class features t to those of a hand-written prompt h: w mean_k |t_k - h_k|^2.

    This is KgCoOp's objective, whose own weight is that of 1 - cos, half of |t - h|^2.

    Args:
        reference: Text features of the hand-written prompt (classes, dim), of length 1.
        weight: w.

    Raises:
        UserError: The reference has another length.
    """

    reference: Tensor
    weight: float

    def __post_init__(self) -> None:
        lengths = self.reference.norm(dim=-1)
        low, high = float(lengths.min()), float(lengths.max())
        expected = "a reference of length 1, as F.normalize(h, dim=-1) is"
        expect(low > 0.99 and high < 1.01, expected, f"lengths of {low:.3g} to {high:.3g}")

    def penalty(self, texts: Tensor) -> Tensor:
        return self.weight * (texts - self.reference).square().sum(-1).mean(-1)


def class_gradients(
    objective: Objective, features: Tensor, parts: Iterable[tuple[slice, Images]]
) -> tuple[Tensor, list[Tensor]]:
    """Return the losses (runs,), and for each of the objective's parts the gradient for ``features``.

    Args:
        objective: Of these runs.
        features: Class features (runs, classes, dim), not normalized.
        parts: The images of the step, part by part, and the runs that they belong to.
    """
    length = features.norm(dim=-1, keepdim=True)
    texts = features / length
    loss, grads = texts.new_zeros(len(texts)), [torch.zeros_like(texts) for _ in range(objective.parts)]
    for runs, images in parts:
        of_images, of_texts = objective.of_runs(runs).gradients(texts[runs], images)
        loss[runs] += of_images
        for grad, more in zip(grads, of_texts, strict=True):
            grad[runs] += more
    with torch.enable_grad():
        leaf = texts.detach().requires_grad_()
        penalty = objective.penalty(leaf)
        if penalty is not None:
            loss += penalty.detach()
            grads[0] += torch.autograd.grad(penalty.sum(), leaf)[0]
    return loss, [(grad - texts * (grad * texts).sum(-1, keepdim=True)) / length for grad in grads]
