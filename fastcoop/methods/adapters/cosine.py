"""Cross-entropy over cosine similarities to class vectors, with its gradient written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cosine_cross_entropy(
    classes: Tensor,
    images: Tensor,
    labels: Tensor,
    scale: float,
    anchors: Tensor | None = None,
    pull: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each run's mean cross-entropy, (runs,), and its gradient for ``classes``, (runs, classes, dim).

    Autograd's steps through the normalization of the classes and the penalty would double the time of a step.

    Args:
        classes: Class vectors (runs, classes, dim), of any length.
        images: Image features (runs, batch, dim), of length 1.
        labels: int64 (runs, batch).
        scale: Factor on the cosine similarities.
        anchors: (classes, dim), where a penalty holds the class vectors.
        pull: (runs, classes), weights of the penalty: the sum over classes of ``pull * |classes - anchors| ** 2`` is
            added to the loss.
    """
    import torch

    norms = torch.linalg.vector_norm(classes, dim=-1)
    factor = (scale / norms)[..., None]
    # Classes come before images, so that no product needs a transposed copy.
    logits = (classes @ images.mT).mul_(factor)
    likelihoods, target = logits.log_softmax(1), labels[:, None]
    losses = -likelihoods.gather(1, target).mean((1, 2))
    change = likelihoods.exp_()  # the gradient of each image's loss with respect to its logits
    change.scatter_add_(1, target, change.new_full((), -1.0).expand_as(target))
    along = logits.mul_(change).mean(2)  # of classes' gradients, their part along the classes
    gradient = change.mul_(factor / labels.shape[1]) @ images
    gradient.addcmul_(classes, along.div_(norms.square_())[..., None], value=-1)
    if pull is not None and anchors is not None:
        moved = classes - anchors
        gradient.addcmul_(moved, pull[..., None], value=2)
        losses += (pull * torch.linalg.vector_norm(moved, dim=-1).square()).sum(-1)
    return losses, gradient
