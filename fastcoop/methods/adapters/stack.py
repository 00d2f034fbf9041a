"""Runs of one dataset as tensors over runs, and the text features of the classes that they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, F, Tensor, torch
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import raw_class_texts

Weights = dict[str, "Tensor"]  # what runs learned, (runs, ...) each; values such as alpha are (runs,)


def normalized(features: Tensor) -> Tensor:
    """Return features scaled to length 1 along the last axis."""
    return features / features.norm(dim=-1, keepdim=True)


def over(values: Tensor, like: Tensor) -> Tensor:
    """Return a value per run, (runs,), in a shape that multiplies ``like``, (runs, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, eq=False)
class Texts:
    """Text features of a dataset's classes in its own prompt.

    Attributes:
        raw: float32 (classes, dim), of any length, as the text tower gives them.
        scale: Factor on cosine similarities, CLIP's 100.
    """

    raw: Tensor
    scale: float

    @classmethod
    def of(cls, backbone: Backbone, data: Data) -> Texts:
        """Return the text features of a dataset's classes, on the device of the backbone."""
        raw = torch.from_numpy(raw_class_texts(backbone, data)).to(backbone.device)
        return cls(raw, backbone.logit_scale)

    @cached_property
    def unit(self) -> Tensor:
        """float32 (classes, dim), of length 1."""
        return normalized(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def zero_shot(self, images: Tensor) -> Tensor:
        """Return the logits (..., images, classes) of zero-shot CLIP for features (..., images, dim) of length 1."""
        return self.scale * images @ self.unit.T


@dataclass(frozen=True, eq=False)
class Stack:
    """Runs that are learned in one batch. They share a dataset, the shots, the numbers of images and views, and all
    settings that are not floats.

    Attributes:
        runs: The runs.
        features: float32 (runs, images, 1 + views, dim), raw; view 0 is the test-time crop.
        labels: int64 (runs, images).
        texts: Of the classes.
        backbone: Of the runs.
    """

    runs: tuple[RunSpec[Any], ...]
    features: Tensor
    labels: Tensor
    texts: Texts
    backbone: Any = None

    @classmethod
    def of(cls, backbone: Backbone, runs: Sequence[RunSpec[Any]], kind: str = "coop") -> Stack:
        """Read the features of runs, of a kind as `Data.train` takes it."""
        given = [run.data.train(run.subset, kind) for run in runs]
        features = torch.from_numpy(np.stack([images for images, _ in given])).to(backbone.device)
        labels = torch.from_numpy(np.stack([labels for _, labels in given])).to(backbone.device)
        return cls(tuple(runs), features, labels, Texts.of(backbone, runs[0].data), backbone)

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def views(self) -> Tensor:
        """float32 (runs, images, views, dim), raw features of the augmented views, or of the crop if there are none."""
        return self.features[:, :, 1:] if self.features.shape[2] > 1 else self.features

    @property
    def settings(self) -> Any:
        """The settings of the first run, for those that all runs share."""
        return self.runs[0].settings

    def value(self, name: str, default: float | None = None) -> Tensor:
        """Return a setting of each run, float32 (runs,), or the default where it is None."""
        given = [getattr(run.settings, name) for run in self.runs]
        return self.features.new_tensor([default if value is None else value for value in given])

    @cached_property
    def onehot(self) -> Tensor:
        """float32 (runs, images, classes)."""
        return F.one_hot(self.labels, len(self.texts)).to(self.features.dtype)

    @cached_property
    def counts(self) -> Tensor:
        """float32 (runs, classes), the number of training images; 0 for a class without any."""
        return self.onehot.sum(1)

    def class_sums(self, images: Tensor) -> Tensor:
        """Return the sum of each class's features, (runs, classes, dim), of features (runs, images, dim)."""
        return self.onehot.mT @ images
