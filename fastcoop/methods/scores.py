"""From class scores to what is reported: accuracies and compact predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

NO_CLASS = 65535  # the predicted label of outputs that are not finite


class Classifier(Protocol):
    """A function from image features to the logits of classes, such as a `LinearClassifier`."""

    @property
    def unit_length(self) -> bool:
        """Whether image features are scaled to length 1 first."""

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits (images, classes) of features (images, dim), which are of length 1 if ``unit_length``."""


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A linear function from image features to the logits of classes.

    Attributes:
        weights: float (rows, dim).
        bias: float (rows,), or None.
        scale: Factor on the products, before the bias.
        unit_length: Whether image features are scaled to length 1 first.
        rows: int (classes,), the row of each class, -1 for classes without one, whose logit is -inf. None: a row per
            class, in order.
    """

    weights: np.ndarray
    bias: np.ndarray | None = None
    scale: float = 1.0
    unit_length: bool = False
    rows: np.ndarray | None = None

    @classmethod
    def of_texts(cls, texts: np.ndarray, scale: float) -> LinearClassifier:
        """Return the classifier by cosine similarity to text features (classes, dim) of any length."""
        return cls(unit(texts.astype(np.float32)), scale=scale, unit_length=True)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits (images, classes) of features (images, dim), which are of length 1 if ``unit_length``."""
        logits = self.scale * (features.astype(self.weights.dtype, copy=False) @ self.weights.T)
        if self.bias is not None:
            logits = logits + self.bias
        if self.rows is None:
            return logits
        known = self.rows >= 0
        by_class = np.full((len(features), len(self.rows)), -np.inf)
        by_class[:, known] = logits[:, self.rows[known]]
        return by_class


def unit(features: np.ndarray) -> np.ndarray:
    """Return features scaled to length 1 along the last axis; NaN for those of length 0."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # `score` refuses what is not finite
        return np.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Scores:
    """A classifier's result on one test set. If its outputs are not finite, all is NaN and predictions are `NO_CLASS`.

    Attributes:
        accuracy: top-1, in percent.
        macro_accuracy: mean of the per-class accuracies, in percent, over classes that have test images.
        per_class: float64 (classes,), in percent; NaN for a class without test images.
        predictions: uint16 (images,), the predicted labels, or `NO_CLASS`.
        confidence: float16 (images,), the softmax probability of the prediction.
    """

    accuracy: float
    macro_accuracy: float
    per_class: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Score logits (images, classes), whose softmax are probabilities, against labels (images,).

    A logit of -inf stands for a class of probability 0; any other that is not finite leaves no score.
    """
    images, classes = logits.shape
    if not has_scores(logits):
        none = np.full(images, NO_CLASS, np.uint16), np.full(images, math.nan, np.float16)
        return Scores(math.nan, math.nan, np.full(classes, math.nan), *none)
    predictions = logits.argmax(axis=1)
    highest = logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(logits - highest).sum(axis=1)
    correct = predictions == labels
    with np.errstate(invalid="ignore"):
        right = np.bincount(labels, weights=correct, minlength=classes)
        per_class = 100 * right / np.bincount(labels, minlength=classes)
    found = predictions.astype(np.uint16), confidence.astype(np.float16)
    return Scores(float(100 * correct.mean()), float(np.nanmean(per_class)), per_class, *found)


def has_scores(logits: np.ndarray) -> np.ndarray:
    """Return whether logits (..., images, classes) can be scored, bool (...): finite, or -inf beside finite ones."""
    highest = logits.max(axis=-1)
    return np.asarray((np.isfinite(highest) & ~np.isnan(logits).any(axis=-1)).all(axis=-1))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the accuracy in percent, float64 (...), of logits (..., images, classes) against labels (images,).

    It is NaN where the logits are not finite.
    """
    correct = 100 * (logits.argmax(axis=-1) == labels).mean(axis=-1)
    return np.where(has_scores(logits), correct, math.nan)
