"""From class scores to what is reported: accuracies and compact predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """How a classifier did on one test set.

    Attributes:
        accuracy: top-1, in percent.
        macro_accuracy: mean of the per-class accuracies, in percent, over classes that have test images.
        per_class: float64 (classes,), in percent; NaN for a class without test images.
        predictions: uint16 (images,), the predicted labels.
        confidence: float16 (images,), the softmax probability of the prediction.
    """

    accuracy: float
    macro_accuracy: float
    per_class: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Score logits (images, classes), whose softmax are probabilities, against labels (images,)."""
    classes = logits.shape[1]
    predictions = logits.argmax(axis=1)
    highest = logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(logits - highest).sum(axis=1)
    correct = predictions == labels
    images = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        per_class = 100 * np.bincount(labels, weights=correct, minlength=classes) / images
    return Scores(
        accuracy=float(100 * correct.mean()),
        macro_accuracy=float(np.nanmean(per_class)),
        per_class=per_class,
        predictions=predictions.astype(np.uint16),
        confidence=confidence.astype(np.float16),
    )
