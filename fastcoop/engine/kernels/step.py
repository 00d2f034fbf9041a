"""The loss of all runs in one launch, and the optimizer's step in two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcoop.engine.kernels.launch import launch, padded, wide

CLASS_BLOCK = 64  # classes of a program
DIM_BLOCK = 32  # numbers of a feature at a time
MAX_BATCH = 64  # images of a step that the loss kernel takes
RUNS = 256  # at a time, of the program that notes the losses


@triton.jit
def _cosines(
    features, images, first, classes, image, is_image,
    dim, DTYPE: tl.constexpr, DIM_BLOCK: tl.constexpr, CLASSES: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Return cosines (BATCH, CLASSES) of images with the classes from ``first`` on, and the norms of both."""
    c = tl.arange(0, CLASSES)
    products = tl.zeros((BATCH, CLASSES), DTYPE)
    squares, image_squares = tl.zeros((CLASSES,), DTYPE), tl.zeros((BATCH,), DTYPE)
    for begin in range(0, dim, DIM_BLOCK):
        k = begin + tl.arange(0, DIM_BLOCK)
        of_image = images + image[:, None].to(tl.int64) * dim + k[None, :]
        of_class = features + (first + c)[:, None].to(tl.int64) * dim + k[None, :]
        a = tl.load(of_image, mask=is_image[:, None] & (k[None, :] < dim), other=0.0).to(DTYPE)
        b = tl.load(of_class, mask=(c < classes)[:, None] & (k[None, :] < dim), other=0.0).to(DTYPE)
        products += tl.dot(a, tl.trans(b), input_precision="ieee")
        squares += tl.sum(b * b, 1)
        image_squares += tl.sum(a * a, 1)
    norm = tl.where(c < classes, tl.sqrt(squares), 1.0)
    image_norm = tl.where(is_image, tl.sqrt(image_squares), 1.0)
    return products / image_norm[:, None] / norm[None, :], norm, image_norm


@triton.jit
def cross_entropy_kernel(
    features, images, labels, image_rows, step, class_blocks, losses, grads, scale, runs, dim,
    DIM_BLOCK: tl.constexpr, CLASSES: tl.constexpr, BATCH_SIZE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    block = class_blocks + 4 * tl.program_id(0)
    run, first, classes, own = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    b, c = tl.arange(0, BATCH), tl.arange(0, CLASSES)
    at = (tl.load(step) * runs + run) * BATCH_SIZE + b
    image = tl.load(image_rows + at, mask=b < BATCH_SIZE, other=-1)
    is_image = image >= 0
    label = tl.load(labels + image, mask=is_image, other=-1)
    count = tl.sum(is_image.to(tl.int32), 0)

    # Every program of a run goes over all of its classes for the softmax; the gradient is for its own block alone.
    DTYPE: tl.constexpr = losses.dtype.element_ty
    largest = tl.full((BATCH,), float("-inf"), DTYPE)
    total, right = tl.zeros((BATCH,), DTYPE), tl.zeros((BATCH,), DTYPE)
    for begin in range(0, classes, CLASSES):
        cosines, _, _ = _cosines(
            features, images, first + begin, classes - begin, image, is_image, dim, DTYPE, DIM_BLOCK, CLASSES, BATCH
        )  # fmt: skip
        logits = tl.where((begin + c < classes)[None, :], scale * cosines, float("-inf"))
        right += tl.sum(tl.where((begin + c)[None, :] == label[:, None], logits, 0.0), 1)
        larger = tl.maximum(largest, tl.max(logits, 1), propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        largest = larger
    if own == 0:
        tl.store(losses + run, tl.sum(tl.where(is_image, largest + tl.log(total) - right, 0.0), 0) / count)

    cosines, norm, image_norm = _cosines(
        features, images, first + own, classes - own, image, is_image, dim, DTYPE, DIM_BLOCK, CLASSES, BATCH
    )
    is_class = own + c < classes
    p = tl.where(is_class[None, :], tl.exp(scale * cosines - largest[:, None]) / total[:, None], 0.0)
    error = p - ((own + c)[None, :] == label[:, None]).to(p.dtype)
    error = tl.where(is_image[:, None], error * scale / count, 0.0)
    along = tl.sum(error * cosines, 0)  # the gradient's part along the class feature, which its norm removes
    error /= image_norm[:, None]
    for begin in range(0, dim, DIM_BLOCK):
        k = begin + tl.arange(0, DIM_BLOCK)
        of_image = images + image[:, None].to(tl.int64) * dim + k[None, :]
        of_class = (first + own + c)[:, None].to(tl.int64) * dim + k[None, :]
        is_number = is_class[:, None] & (k[None, :] < dim)
        a = tl.load(of_image, mask=is_image[:, None] & (k[None, :] < dim), other=0.0).to(DTYPE)
        direction = tl.load(features + of_class, mask=is_number, other=0.0).to(DTYPE) / norm[:, None]
        through_images = tl.dot(tl.trans(error), a, input_precision="ieee")
        grad = (through_images - direction * along[:, None]) / norm[:, None]
        tl.store(grads + of_class, grad.to(grads.dtype.element_ty), mask=is_number)


def cross_entropy(
    features: Tensor,
    class_blocks: Tensor,
    images: Tensor,
    labels: Tensor,
    image_rows: Tensor,
    step: Tensor,
    logit_scale: float,
    losses: Tensor,
    grads: Tensor,
) -> None:
    """Write the mean cross-entropy of every run (equation 3), and its gradient for the class features.

    Args:
        features: Of the classes of all runs, (classes, dim), run by run, not normalized, in the tower's dtype.
        class_blocks: Of `class_blocks`.
        images: Raw image features (images, dim), of any float dtype.
        labels: int64 (images,).
        image_rows: int32 (steps, runs, batch size): rows of ``images``, -1 where a batch is short.
        step: int64 (1,) on the device: the step to read.
        logit_scale: Logits are this times the cosine.
        losses: (runs,), written.
        grads: Shaped as ``features``, contiguous, written.
    """
    _, runs, batch_size = image_rows.shape
    launch(
        cross_entropy_kernel, (len(class_blocks),), features, images, labels, image_rows, step, class_blocks,
        losses, grads, logit_scale, runs, features.shape[1],
        DIM_BLOCK=DIM_BLOCK, CLASSES=CLASS_BLOCK, BATCH_SIZE=batch_size, BATCH=padded(batch_size),
    )  # fmt: skip


def class_blocks(classes: Sequence[int], device: torch.device | str) -> Tensor:
    """Cut each run's classes into blocks.

    Returns:
        int32 (blocks, 4): the run, its first class among those of all runs, its number of classes, and the block's
        first class among the run's own.
    """
    firsts = np.concatenate([[0], np.cumsum(classes)])
    rows = [
        (run, firsts[run], number, own)
        for run, number in enumerate(classes)
        for own in range(0, number, CLASS_BLOCK)
    ]
    return torch.as_tensor(np.array(rows, np.int32), device=device)


@triton.jit
def note_losses_kernel(
    loss, losses, limit, untrained_loss, first_epoch_left, diverged_at, step, runs, factor, RUNS: tl.constexpr
):
    at = tl.load(step)
    for begin in range(0, runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        is_run = run < runs
        value = tl.load(loss + run, mask=is_run, other=0.0)
        tl.store(losses + at * runs + run, value, mask=is_run)
        bound = tl.load(limit + run, mask=is_run, other=0.0)
        raised = tl.maximum(
            factor * tl.maximum(value, tl.load(untrained_loss + run, mask=is_run, other=0.0)), bound
        )
        bound = tl.where(at < tl.load(first_epoch_left + run, mask=is_run, other=0), raised, bound)
        tl.store(limit + run, bound, mask=is_run)
        is_good = (value <= bound) & (tl.abs(value) < float("inf"))
        known = tl.load(diverged_at + run, mask=is_run, other=0)
        tl.store(diverged_at + run, tl.where(is_good | (known >= 0), known, at), mask=is_run)
    tl.debug_barrier()  # every thread has read the step
    tl.store(step, at + 1)


@triton.jit
def sgd_kernel(
    vectors, momentum, grad, run_of_vector, rates, diverged_at, step, runs,
    DECAY: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    vector, w = tl.program_id(0), tl.arange(0, BLOCK)
    run = tl.load(run_of_vector + vector)
    at, mask = vector.to(tl.int64) * WIDTH + w, w < WIDTH
    rate = tl.load(rates + (tl.load(step) - 1) * runs + run)
    value = tl.load(vectors + at, mask=mask)
    change = tl.load(momentum + at, mask=mask) * KEPT
    change += wide(tl.load(grad + at, mask=mask)) + DECAY * value
    tl.store(momentum + at, change, mask=mask)
    if tl.load(diverged_at + run) < 0:  # diverged runs are frozen
        tl.store(vectors + at, value - rate * change, mask=mask)


def note_losses(
    loss: Tensor,
    losses: Tensor,
    limit: Tensor,
    untrained_loss: Tensor,
    first_epoch_left: Tensor,
    diverged_at: Tensor,
    step: Tensor,
    factor: float,
) -> None:
    """Keep a step's losses, mark runs that diverged, and raise the step by one.

    Args:
        loss: (runs,).
        losses: (steps, runs), written.
        limit: (runs,) the loss above which a run has diverged; raised in the first epoch.
        untrained_loss: (runs,) loss of equal logits; the limit is at least the factor times it.
        first_epoch_left: int64 (runs,) steps of the first epoch that are left.
        diverged_at: int64 (runs,) -1, or the step in which a run diverged; written.
        step: int64 (1,), raised.
        factor: A loss this many times above those of the first epoch is divergence.
    """
    launch(
        note_losses_kernel, (1,), loss, losses, limit, untrained_loss, first_epoch_left, diverged_at, step,
        len(loss), factor, RUNS=RUNS,
    )  # fmt: skip


def sgd(
    vectors: Tensor,
    momentum: Tensor,
    grad: Tensor,
    run_of_vector: Tensor,
    rates: Tensor,
    diverged_at: Tensor,
    step: Tensor,
    weight_decay: float,
    kept: float,
) -> None:
    """Do a step of SGD with momentum and weight decay of all runs but diverged ones.

    Args:
        vectors: Context vectors of all runs, (vectors, width), written.
        momentum: As ``vectors``, written.
        grad: As ``vectors``, contiguous.
        run_of_vector: int64 (vectors,): each vector's run.
        rates: Learning rates (steps, runs).
        diverged_at: As `note_losses` left it.
        step: As `note_losses` left it: that of the rates, plus one.
        weight_decay: Times the vectors, it is added to the gradient.
        kept: Of the momentum.
    """
    count, width = vectors.shape
    launch(
        sgd_kernel, (count,), vectors, momentum, grad, run_of_vector, rates, diverged_at, step, rates.shape[1],
        DECAY=weight_decay, KEPT=kept, WIDTH=width, BLOCK=padded(width),
    )  # fmt: skip
