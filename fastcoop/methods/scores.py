"""From class scores to what is reported: accuracies and compact predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # workers import this package without torch
    from torch import Tensor

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

    @property
    def group(self) -> tuple[Any, ...]:
        """What classifiers must have in common to be computed together."""
        rows = None if self.rows is None else self.rows.tobytes()
        return self.weights.shape, self.weights.dtype, self.scale, self.bias is None, rows

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

    On a GPU, the logits of linear classifiers are computed and compared there, those of many in one product.

    Args:
        classifiers: They agree in ``unit_length``.
        features: float (images, dim), of length 1 if the classifiers have ``unit_length``.
        labels: int (images,).
        classes: Number of classes.
        device: The backbone's.
    """
    parts: list[list[Predicted]] = [[] for _ in classifiers]
    images = max(1, LOGITS_AT_ONCE // classes)
    for start in range(0, max(1, len(features)), images):
        for n, part in _predict_chunk(classifiers, features[start : start + images], classes, device):
            parts[n].append(part)
    joined = ((np.concatenate(arrays) for arrays in zip(*part, strict=True)) for part in parts)
    return [_scores(predictions, confidence, labels, classes) for predictions, confidence in joined]


def _predict_chunk(
    classifiers: Sequence[Classifier], features: np.ndarray, classes: int, device: Any
) -> Iterator[tuple[int, Predicted]]:
    """Yield the place of each classifier and what it predicts for some images."""
    groups: dict[Any, list[tuple[int, LinearClassifier]]] = {}
    for n, one in enumerate(classifiers):
        if str(device) != "cpu" and isinstance(one, LinearClassifier):
            groups.setdefault(one.group, []).append((n, one))
        else:
            yield n, _predict(one.logits(features))
    if groups:
        import torch

        given = torch.from_numpy(features).to(device)
        at_once = max(1, LOGITS_AT_ONCE // max(1, len(features) * classes))
        for group in groups.values():
            for first in range(0, len(group), at_once):
                places, some = zip(*group[first : first + at_once], strict=True)
                yield from zip(places, _predict_on(given, some), strict=True)


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Score logits (images, classes), whose softmax are probabilities, against labels (images,).

    A logit of -inf stands for a class of probability 0; any other that is not finite leaves no score.
    """
    return _scores(*_predict(logits), labels, logits.shape[1])


def _predict(logits: np.ndarray) -> Predicted:
    """Return what logits (images, classes) predict."""
    if not has_scores(logits):
        return np.full(len(logits), NO_CLASS, np.uint16), np.full(len(logits), math.nan, np.float16)
    highest = logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(logits - highest).sum(axis=1)
    return logits.argmax(axis=1).astype(np.uint16), confidence.astype(np.float16)


def _predict_on(features: Tensor, classifiers: Sequence[LinearClassifier]) -> Iterator[Predicted]:
    """Yield the same for each of some classifiers of one `LinearClassifier.group`, on the features' device."""
    import torch

    def stacked(arrays: Iterable[Any]) -> Tensor:
        return torch.from_numpy(np.stack([*arrays])).to(features.device)

    weights = stacked(one.weights for one in classifiers)
    logits = classifiers[0].scale * (features.to(weights.dtype) @ weights.mT)  # (classifiers, images, rows)
    if classifiers[0].bias is not None:
        logits = logits + stacked(one.bias for one in classifiers)[:, None]
    if (rows := classifiers[0].rows) is not None:  # -1 is the added last one
        rows = np.where(rows < 0, logits.shape[-1], rows)
        logits = torch.nn.functional.pad(logits, (0, 1), value=-math.inf)[..., stacked([rows])[0]]
    predictions = logits.argmax(-1)
    highest = logits.gather(-1, predictions[..., None])
    usable = (torch.isfinite(highest[..., 0]) & ~torch.isnan(logits).any(-1)).all(-1)
    confidence = torch.where(usable[:, None], 1 / torch.exp(logits - highest).sum(-1), math.nan)
    predictions = torch.where(usable[:, None], predictions, NO_CLASS)
    found = predictions.int().cpu().numpy().astype(np.uint16), confidence.cpu().numpy().astype(np.float16)
    yield from zip(*found, strict=True)


def _scores(predictions: np.ndarray, confidence: np.ndarray, labels: np.ndarray, classes: int) -> Scores:
    if np.isnan(confidence).any():  # of some of the images
        none = np.full_like(predictions, NO_CLASS), np.full_like(confidence, math.nan)
        return Scores(math.nan, math.nan, np.full(classes, math.nan), *none)
    correct = predictions == labels
    with np.errstate(invalid="ignore"):
        right = np.bincount(labels, weights=correct, minlength=classes)
        per_class = 100 * right / np.bincount(labels, minlength=classes)
    return Scores(
        float(100 * correct.mean()), float(np.nanmean(per_class)), per_class, predictions, confidence
    )


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
