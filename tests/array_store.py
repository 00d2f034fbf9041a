"""A feature store over arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch


class ArrayStore:
    """As much of a feature store as methods use, over given arrays, which stand for every kind.

    Args:
        labels: int64 (images,) of each split.
        features: (images, 1 + views, dim) of each split; view 0 is the test-time crop.
    """

    digest = "0" * 64
    meta = SimpleNamespace(recipe="current", skipped={}, sha256={})

    def __init__(self, labels: Mapping[str, np.ndarray], features: Mapping[str, np.ndarray]):
        self._labels = dict(labels)
        self._features = {name: one.astype(np.float32) for name, one in features.items()}
        self.views = next(iter(self._features.values())).shape[1] - 1

    def indices(self, split: str) -> np.ndarray:
        return np.arange(len(self._labels[split]))

    def train(self, indices: np.ndarray, kind: str = "coop", as_stored: bool = False) -> torch.Tensor:
        return torch.from_numpy(self._features["train"][indices])

    def train_labels(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._labels["train"][indices])

    def split(self, name: str, kind: str = "coop") -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self._features[name][:, 0]), torch.from_numpy(self._labels[name])
