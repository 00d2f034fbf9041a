"""Datasets whose features are given arrays, and a tiny random CLIP."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import Dataset, Split
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec, expand, get_method
from tests.small_world import write_backbone

DIM = 16
ALONE = RunContext()
NOT_KEPT = Path(os.devnull) / "fewshot"  # a place for subsets that cannot be written to


class ArrayStore:
    """As much of a feature store as methods use, over arrays drawn from a seed, which stand for every kind."""

    digest = "0" * 64
    meta = SimpleNamespace(recipe="current", skipped={}, sha256={})

    def __init__(self, dataset: Dataset, views: int, seed: int):
        rng = np.random.default_rng(seed)
        self.views, self._labels = views, {name: split.labels for name, split in dataset.splits.items()}
        centres = rng.normal(size=(len(dataset.class_names), DIM))
        self._features = {
            name: (centres[labels][:, None] + 0.8 * rng.normal(size=(len(labels), 1 + views, DIM))).astype(
                np.float32
            )
            for name, labels in self._labels.items()
        }

    def indices(self, split: str) -> np.ndarray:
        return np.arange(len(self._labels[split]))

    def train(self, indices: np.ndarray, kind: str = "coop", as_stored: bool = False) -> torch.Tensor:
        return torch.from_numpy(self._features["train"][indices])

    def train_labels(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._labels["train"][indices])

    def split(self, name: str, kind: str = "coop") -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self._features[name][:, 0]), torch.from_numpy(self._labels[name])


def make_data(
    classes: tuple[str, ...] = ("cat", "sea lion", "old dog"),
    name: str = "animals",
    views: int = 3,
    seed: int = 0,
) -> Data:
    def split(part: str, images: int) -> Split:
        labels = np.repeat(np.arange(len(classes)), images)
        return Split(tuple(f"{part}/{index}.png" for index in range(len(labels))), labels)

    splits = {part: split(part, images) for part, images in (("train", 6), ("val", 4), ("test", 9))}
    dataset = Dataset(name, Path(), classes, "a photo of a {}.", splits, name, name, NOT_KEPT)
    return Data(dataset, ArrayStore(dataset, views, seed), views)


def run(backbone: Backbone, method: str, jobs: list[RunSpec]) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    METHODS[method].run(backbone, jobs, outcomes.__setitem__, ALONE)
    return [outcomes[index] for index in range(len(jobs))]


def job(
    data: Data,
    method: str,
    shots: int = 2,
    seed: int = 1,
    targets: tuple[Data, ...] = (),
    model: Backbone | None = None,
    **settings,
) -> RunSpec:
    (one,) = expand(get_method(method), settings)
    if not METHODS[method].learns:
        return RunSpec.of(method, one, data, model, targets=targets)
    subset = data.subset(shots, seed)
    return RunSpec.of(method, one, data, model, subset=subset, shots=shots, seed=seed, targets=targets)


@pytest.fixture
def data() -> Data:
    return make_data()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return backbone_from_spec(str(write_backbone(tmp_path_factory.mktemp("models") / "tiny", text_layers=3)))
