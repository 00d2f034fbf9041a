"""One step of training of all runs, through kernels alone but for the products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcoop.engine.forest import Workspace
from fastcoop.engine.kernels.forest_pass import KernelPass
from fastcoop.engine.kernels.step import MAX_BATCH, Loss, Optimizer, class_blocks
from fastcoop.engine.objectives import CrossEntropy
from fastcoop.engine.optimizers import MOMENTUM, SGD, WEIGHT_DECAY

if TYPE_CHECKING:
    from fastcoop.engine.training import Batch


@dataclass(frozen=True, eq=False)
class KernelStep:
    """Forward, each run's loss, backward and SGD of a batch; its tensors are read and written in place."""

    forest_pass: KernelPass
    workspace: Workspace
    vectors: Tensor
    loss: Loss
    optimizer: Optimizer

    @classmethod
    def of(cls, batch: Batch, forest_pass: KernelPass, divergence_factor: float) -> KernelStep | None:
        """Return the step of a batch; None for other objectives, other optimizers and too large batches."""
        b, images, sgd = batch, batch.images, batch.optimizers[0][0]
        if {type(one) for one in b.objectives} != {CrossEntropy} or len(b.optimizers) > 1:
            return None
        if not isinstance(sgd, SGD) or images.rows.shape[-1] > MAX_BATCH:
            return None
        blocks = class_blocks([len(a.run.class_names) for a in b.active], b.vectors.device)
        loss = Loss(blocks, images.logit_scale, images.images, images.labels, images.rows, b.counter)
        decay, momentum = (b.vectors.new_full((len(b.vectors), 1), one) for one in (WEIGHT_DECAY, MOMENTUM))
        optimizer = Optimizer(
            b.vectors, sgd.momentum, sgd.run_of_vector, decay, momentum, sgd.rates, b.losses,
            b.limit, b.untrained_loss, b.first_epoch_left, b.diverged_at, b.counter, divergence_factor,
        )  # fmt: skip
        return cls(forest_pass, b.workspace, b.vectors, loss, optimizer)

    def __call__(self) -> None:
        """Do one step."""
        features = self.forest_pass.class_features(self.vectors, self.workspace)
        losses, grads = self.vectors.new_empty(self.optimizer.rates.shape[1]), torch.empty_like(features)
        self.loss(features, losses, grads)
        # Nothing is written before the last allocation: a step that runs out of memory is repeated from its start.
        self.optimizer(losses, self.forest_pass.vector_grads(grads, self.workspace))
