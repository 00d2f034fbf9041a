"""One step of training of all runs, through kernels alone but for the products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcoop.engine.kernels.step import MAX_BATCH, class_blocks, cross_entropy, note_losses, sgd
from fastcoop.engine.objectives import CrossEntropy
from fastcoop.engine.optimizers import MOMENTUM, SGD, WEIGHT_DECAY

if TYPE_CHECKING:
    from fastcoop.engine.training import Batch


def kernel_step(batch: Batch, divergence_factor: float) -> Callable[[Batch], None] | None:
    """Return what does a step of the batch; None for other objectives, other optimizers and too large batches."""
    objectives = {type(one) for one in batch.objectives}
    optimizers = [type(one) for one, _, _ in batch.optimizers]
    if objectives != {CrossEntropy} or optimizers != [SGD] or batch.images.rows.shape[-1] > MAX_BATCH:
        return None
    blocks = class_blocks([len(a.run.class_names) for a in batch.active], batch.vectors.device)
    return partial(_step, blocks, divergence_factor)


def _step(blocks: Tensor, divergence_factor: float, batch: Batch) -> None:
    """Do forward, each run's loss, backward and SGD. The batch's tensors are read and written in place."""
    forest_pass: Any = batch.forest_pass
    images, optimizer, step = batch.images, batch.optimizers[0][0], batch.counter
    features = forest_pass.forward(batch.vectors, batch.workspace)
    loss, grads = batch.vectors.new_empty(len(batch.active)), torch.empty_like(features)
    cross_entropy(
        features, blocks, images.images, images.labels, images.rows, step, images.logit_scale, loss, grads
    )  # fmt: skip
    grad = forest_pass.backward(grads, batch.workspace)
    # Nothing is written before the last allocation: a step that runs out of memory is repeated from its start.
    note_losses(
        loss, batch.losses, batch.limit, batch.untrained_loss, batch.first_epoch_left, batch.diverged_at, step,
        divergence_factor,
    )  # fmt: skip
    sgd(
        batch.vectors, optimizer.momentum, grad, optimizer.run_of_vector, optimizer.rates, batch.diverged_at, step,
        WEIGHT_DECAY, MOMENTUM,
    )  # fmt: skip
