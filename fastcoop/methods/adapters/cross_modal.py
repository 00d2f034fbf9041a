"""Cross-modal linear probe (Lin et al., CVPR 2023): texts are training samples too.

Half of each batch are image features, the other half text features, through one linear classifier at a fixed scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fastcoop.methods.adapters.base import Adapter, AdapterSettings, Fitted
from fastcoop.methods.adapters.selection import BestEpoch, Judge, ValidationOnly
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.adapters.training import (
    Batch,
    Optimizer,
    cosine_rates,
    softmax_gradient,
    train,
)
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.schedule import BatchSize, Coefficient, EpochNumber, LearningRate
from fastcoop.methods.spec import RunSpec

TRIED = {"learning_rate": (1e-3, 1e-4), "weight_decay": (0.0, 0.01, 1e-4), "batch_size": (8, 32)}
RATE, DECAY, SIZE = 1e-3, 0.01, 8  # of selection: fixed
WARMUP, FIRST_RATE = 50, 1e-5  # iterations, and the rate of the first
EVERY = 100  # iterations between validations


class CrossModalSettings(AdapterSettings):
    """Settings of the cross-modal linear probe.

    Attributes:
        learning_rate, weight_decay, batch_size: Of AdamW. None: chosen by ``selection`` of 1e-3 and 1e-4, of 0, 0.01
            and 1e-4, and of 8 and 32. They are 1e-3, 0.01 and 8 if it is "fixed".
        iterations: Steps. The best of every hundredth is kept, or the last if ``selection`` is "fixed".
        init: The classifier's start: the text features, or random numbers.
        wise_ft: Share of the text features in the final classifier, 0.5 in the paper's WiSE-FT variant.
    """

    learning_rate: LearningRate | None = None
    weight_decay: Coefficient | None = None
    batch_size: BatchSize | None = Field(None, ge=2)
    iterations: EpochNumber = 12800
    selection: ValidationOnly = "few_val"
    init: Literal["zero_shot", "random"] = "zero_shot"
    wise_ft: float = Field(0.0, ge=0, le=1)


class CrossModalMethod(Adapter[CrossModalSettings]):
    """The test-time crop of an image and its mirror image are samples."""

    name = "cross_modal"
    title = "Cross-modal linear probe"
    kinds = ("flip",)
    Settings = CrossModalSettings
    chooses_epoch = True  # the iteration
    by_class: ClassVar = {"W": "unit"}

    def tries(self, run: RunSpec[CrossModalSettings]) -> Sequence[Mapping[str, Any]]:
        most = min(2 * len(run.subset.train), len(run.data.class_names))
        sizes = [size for size in TRIED["batch_size"] if size // 2 < most] or TRIED["batch_size"][:1]
        given = {name: getattr(run.settings, name) for name in TRIED}
        tried = {name: [given[name]] if given[name] is not None else TRIED[name] for name in TRIED}
        if given["batch_size"] is None:
            tried["batch_size"] = sizes
        return [dict(zip(tried, row, strict=True)) for row in product(*tried.values())]

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        settings = stack.settings
        samples = normalized(stack.features).flatten(1, 2)
        labels = stack.labels.repeat_interleave(stack.features.shape[2], 1)
        texts, run = stack.texts.unit, torch.arange(len(stack), device=labels.device)[:, None]
        batch_size = settings.batch_size or SIZE
        rates = cosine_rates(stack.value("learning_rate", RATE), settings.iterations)
        rising = rates[:1] * torch.arange(WARMUP)[:, None].to(rates) / WARMUP
        rates = torch.cat([rising, rates])[: settings.iterations]
        rates[0] = FIRST_RATE

        def gradient(parameters: Weights, sums: Weights, momentum: float, *batch: Tensor) -> Tensor:
            rows, text_rows = batch
            x = torch.cat([samples[run, rows], texts[text_rows]], 1)
            targets = torch.cat([labels[run, rows], text_rows], 1)
            change = (parameters["W"] @ x.mT).mul_(stack.texts.scale)
            losses = softmax_gradient(change, targets)
            change.mul_(stack.texts.scale / targets.shape[1])
            torch.baddbmm(sums["W"], change, x, beta=momentum, out=sums["W"])
            return losses

        sizes = min(batch_size - batch_size // 2, labels.shape[1]), min(batch_size // 2, len(texts))
        decay = stack.value("weight_decay", DECAY)
        best = BestEpoch(judge, {"wise_ft": torch.zeros_like(decay)}) if judge else None
        last = 1 + (settings.iterations - 1) // EVERY  # the steps after are not validated

        def on_epoch(epoch: int, parameters: Weights) -> None:
            if best and epoch <= last:
                best(epoch, parameters)

        drawn = batches(stack, labels.shape[1], sizes, settings.iterations)
        optimizer, start = Optimizer("adamw", rates, decay), {"W": self.start(stack)}
        W, losses = train(start, drawn, gradient, optimizer, on_epoch)
        share = {"wise_ft": stack.value("wise_ft")}
        if best is None:
            return Fitted(W | share, losses, ("W",))
        extra = {"iteration": EVERY * (best.epoch - 1)}
        return Fitted(best.best | share, losses, ("W",), extra, best.accuracy)

    def start(self, stack: Stack) -> Tensor:
        """Return the weights at the start, (runs, classes, dim)."""
        texts = stack.texts.unit
        if stack.settings.init == "zero_shot":
            return texts.expand(len(stack), *texts.shape)
        draws = [np.random.default_rng((run.seed, 2)).uniform(-1, 1, texts.shape) for run in stack.runs]
        return torch.from_numpy(np.stack(draws)).to(texts) / texts.shape[1] ** 0.5

    def class_weights(self, weights: Weights, texts: Texts) -> tuple[Tensor, Tensor | None]:
        share = over(weights["wise_ft"], weights["W"])
        return (1 - share) * weights["W"] + share * texts.unit, None


def batches(stack: Stack, samples: int, sizes: tuple[int, int], iterations: int) -> Iterator[list[Batch]]:
    """Yield the batches between validations: one, then `EVERY` each. Rows are (runs, size) of images and of texts.

    Images and texts are each drawn in random orders, whose last, short batches are left out.
    """

    def rows(count: int, size: int, seed: tuple[int, int]) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(count)
            yield from order[: count // size * size].reshape(-1, size)

    counts = samples, len(stack.texts)
    streams = [
        [rows(count, size, (run.seed, place)) for run in stack.runs]
        for place, (count, size) in enumerate(zip(counts, sizes, strict=True))
    ]
    done = 0
    while done < iterations:
        many = min(EVERY if done else 1, iterations - done)
        drawn = [np.array([[next(one) for one in stream] for _ in range(many)]) for stream in streams]
        images, texts = (torch.from_numpy(one).to(stack.labels.device) for one in drawn)
        yield list(zip(images, texts, strict=True))
        done += many
