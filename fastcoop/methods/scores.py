"""From class scores to what is reported: accuracies and compact predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastcoop.methods.late import Tensor, torch

NO_CLASS = 65535  # the predicted label of outputs that are not finite
LOGITS_AT_ONCE = 1 << 25  # 128 MiB in float32

Predicted = tuple[np.ndarray, np.ndarray]  # predictions and confidence, as `Scores` has them


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


def score_all(
    classifiers: Sequence[Classifier],
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    device: Any = "cpu",
) -> list[Scores]:
    """Score classifiers of the same ``classes`` on the same images, `LOGITS_AT_ONCE` logits at a time.

    On a GPU, the logits of linear classifiers are computed and compared there.

    Args:
        classifiers: They agree in ``unit_length``.
        features: float (images, dim), of length 1 if the classifiers have ``unit_length``.
        labels: int (images,).
        classes: Number of classes.
        device: The backbone's.
    """
    parts: list[list[Predicted]] = [[] for _ in classifiers]
    images, is_gpu = max(1, LOGITS_AT_ONCE // classes), str(device) != "cpu"
    for start in range(0, max(1, len(features)), images):
        some = features[start : start + images]
        there = _tensor(some, device) if is_gpu else None
        for part, one in zip(parts, classifiers, strict=True):
            if there is not None and isinstance(one, LinearClassifier):
                part.append(_predict_on(there, one))
            else:
                part.append(_predict(one.logits(some)))
    joined = ((np.concatenate(arrays) for arrays in zip(*part, strict=True)) for part in parts)
    return [_scores(predictions, confidence, labels, classes) for predictions, confidence in joined]


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Score logits (images, classes), whose softmax are probabilities, against labels (images,).

    A logit of -inf stands for a class of probability 0; any other that is not finite leaves no score.
    """
    return _scores(*_predict(logits), labels, logits.shape[1])


def _predict(logits: np.ndarray) -> Predicted:
    """Return what logits (images, classes) predict."""
    if not has_scores(logits):
        return _no_scores(len(logits))
    highest = logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(logits - highest).sum(axis=1)
    return logits.argmax(axis=1).astype(np.uint16), confidence.astype(np.float16)


def _predict_on(features: Tensor, one: LinearClassifier) -> Predicted:
    """Return the same for the logits of a classifier, computed on the features' device."""
    weights = _tensor(one.weights, features.device)
    logits = one.scale * (features.to(weights.dtype) @ weights.mT)
    if one.bias is not None:
        logits = logits + _tensor(one.bias, features.device)
    if one.rows is not None:  # -1 is the added last one
        rows = np.where(one.rows < 0, logits.shape[1], one.rows)
        logits = torch.nn.functional.pad(logits, (0, 1), value=-math.inf)[:, _tensor(rows, features.device)]
    highest, predictions = logits.max(1, keepdim=True)
    if not bool(torch.isfinite(highest).all()) or bool(torch.isnan(logits).any()):
        return _no_scores(len(logits))
    confidence = 1 / torch.exp(logits - highest).sum(1)
    labels = predictions[:, 0].int().cpu().numpy().astype(np.uint16)
    return labels, confidence.cpu().numpy().astype(np.float16)


def _tensor(array: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(array).to(device)


def _no_scores(images: int) -> Predicted:
    return np.full(images, NO_CLASS, np.uint16), np.full(images, math.nan, np.float16)


def _scores(predictions: np.ndarray, confidence: np.ndarray, labels: np.ndarray, classes: int) -> Scores:
    if np.isnan(confidence).any():  # of some of the images
        return Scores(math.nan, math.nan, np.full(classes, math.nan), *_no_scores(len(labels)))
    correct = predictions == labels
    with np.errstate(invalid="ignore"):
        right = np.bincount(labels, weights=correct, minlength=classes)
        per_class = 100 * right / np.bincount(labels, minlength=classes)
    mean, macro = float(100 * correct.mean()), float(np.nanmean(per_class))
    return Scores(mean, macro, per_class, predictions, confidence)


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
