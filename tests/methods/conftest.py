"""Datasets whose features are given arrays, and a tiny random CLIP."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import Dataset, Split
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec, expand, get_method
from tests.array_store import ArrayStore
from tests.small_world import write_backbone

DIM = 16
ALONE = RunContext()
NOT_KEPT = Path(os.devnull) / "fewshot"  # a place for subsets that cannot be written to


def array_store(dataset: Dataset, views: int, seed: int) -> ArrayStore:
    """Features drawn from a seed."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(dataset.class_names), DIM))

    def features(labels: np.ndarray) -> np.ndarray:
        return centres[labels][:, None] + 0.8 * rng.normal(size=(len(labels), 1 + views, DIM))

    labels = {name: split.labels for name, split in dataset.splits.items()}
    return ArrayStore(labels, {name: features(of_split) for name, of_split in labels.items()})


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
    return Data(dataset, array_store(dataset, views, seed), views)


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
