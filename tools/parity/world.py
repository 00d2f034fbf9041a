"""Made-up features and runs on them, and how far two results are from each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastcoop.datasets import Dataset, FewShot, Split
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec, expand, get_method
from fastcoop.methods.adapters.selection import drawn_for
from tests.array_store import ArrayStore

CLOSED_FORM = 1e-5  # bar on the difference of logits, relative to the largest
TRAINED = 1e-4  # bar on that of what was trained, relative to the distance that it moved

Batches = list[tuple[torch.Tensor, torch.Tensor]]  # of images and labels


@dataclass(frozen=True)
class Row:
    """A quantity of a run that is compared, the difference, and what it may be."""

    quantity: str
    difference: float
    bar: float = TRAINED


def made_up(
    classes: int | Sequence[str],
    dim: int,
    views: int,
    seed: int,
    name: str = "made-up",
    template: str | None = None,
) -> Data:
    """Return a dataset of 20 training, 20 validation and 13 test images per class.

    Features are a narrow cone, as CLIP's, with classes that overlap. Class texts are random, unless there is a
    ``template``.
    """
    names = (
        tuple(f"thing {number}" for number in range(classes)) if isinstance(classes, int) else tuple(classes)
    )

    def split(part: str, images: int) -> Split:
        labels = np.repeat(np.arange(len(names)), images)
        return Split(tuple(f"{part}/{number}.png" for number in range(len(labels))), labels)

    splits = {part: split(part, images) for part, images in (("train", 20), ("val", 20), ("test", 13))}
    prompt, nowhere = template or "a photo of a {}.", Path(os.devnull)
    dataset = Dataset(name, Path(), names, prompt, splits, name, name, nowhere / "fewshot")
    rng, spread = np.random.default_rng(seed), (dim / 48) ** 0.5  # as hard in every dimension
    cone, centers = rng.normal(size=dim), 0.55 * rng.normal(size=(len(names), dim))

    def features(labels: np.ndarray) -> np.ndarray:
        images = cone + centers[labels] + 0.5 * spread * rng.normal(size=(len(labels), dim))
        noise = 0.35 * spread * rng.normal(size=(len(labels), 1 + views, dim))
        lengths = rng.uniform(3, 6.5, size=(len(labels), 1 + views, 1))
        return (images[:, None] + noise) / dim**0.5 * lengths

    labels = {part: split.labels for part, split in splits.items()}
    store: Any = ArrayStore(labels, {part: features(of_split) for part, of_split in labels.items()})
    texts = 0.8 * rng.normal(size=dim) + centers + 0.66 * spread * rng.normal(size=centers.shape)
    texts = (texts / dim**0.5 * rng.uniform(5, 9, size=(len(names), 1))).astype(np.float32)
    return Data(dataset, store, views, text_features=None if template else texts)


def scale_alone(dim: int, scale: float = 100.0, **more: Any) -> SimpleNamespace:
    """Return as much of a backbone as methods on features read. The official trainers round its scale to float32."""
    given = {"image_projection": None} | more
    return SimpleNamespace(name="made-up", device="cpu", embed_dim=dim, logit_scale=float(scale), **given)


ROUNDED_SCALE = float(torch.tensor(np.log(100.0), dtype=torch.float32).exp())


def runs_of(
    data: Data, method: str, shots: int, seeds: Sequence[int], backbone: Any, **settings: Any
) -> list[RunSpec[Any]]:
    """Return runs of one method, by seed."""
    (one,) = expand(get_method(method), settings)
    return [
        RunSpec.of(method, one, data, backbone, subset=data.subset(shots, seed), shots=shots, seed=seed)
        for seed in seeds
    ]


def learned(backbone: Any, runs: Sequence[RunSpec[Any]]) -> list[tuple[RunSpec[Any], Outcome]]:
    """Do runs, in one stack, and return each with what it learned."""
    outcomes: dict[int, Outcome] = {}
    METHODS[runs[0].method].run(backbone, runs, outcomes.__setitem__, RunContext())
    return [(run, outcomes[place]) for place, run in enumerate(runs)]


def logits_of(backbone: Any, run: RunSpec[Any], outcome: Outcome, data: Data | None = None) -> np.ndarray:
    """Return the logits of a run for the test images of its own or of other ``data``."""
    data, method = data or run.data, METHODS[run.method]
    after = replace(run, weights=outcome.weights, contexts=outcome.contexts)
    classifier = method.classifier(backbone, after, data)
    features = data.split("test", method.kinds[0])[0]
    return classifier.logits(unit(features) if classifier.unit_length else features)


def unit(features: np.ndarray) -> np.ndarray:
    """Return features scaled to length 1."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def tensors(given: tuple[np.ndarray, np.ndarray], scaled: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features, scaled to length 1, and labels as tensors."""
    features, labels = given
    return torch.from_numpy(unit(features) if scaled else features), torch.from_numpy(labels)


def validation_of(run: RunSpec[Any], selection: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the validation images that ``selection`` draws for a run."""
    return run.data.validation(FewShot(run.subset.train, drawn_for(run, selection)), kind)


def unit_texts(data: Data) -> torch.Tensor:
    """Return the text features, of length 1, (dim, classes), as the official codes have them."""
    return torch.from_numpy(unit(data.text_features)).T


def epochs_of(run: RunSpec[Any], epochs: int, size: int, keep_short: bool = False) -> Iterator[Batches]:
    """Yield the documented batches: in each epoch a random order of the images, and a random view of each."""
    features, labels = run.data.train_views(run.subset)
    rng, (images, views) = np.random.default_rng(run.seed), features.shape[:2]
    steps = max(1, -(-images // size) if keep_short else images // size)
    for _ in range(epochs):
        order, view = rng.permutation(images), rng.integers(views, size=images)
        parts = [slice(step * size, (step + 1) * size) for step in range(steps)]
        yield [
            (torch.from_numpy(features[order[part], view[part]]), torch.from_numpy(labels[order[part]]))
            for part in parts
        ]


class ViewLoader:
    """A loader of the official codes, which gives the next view of all images in each pass."""

    def __init__(self, run: RunSpec[Any]):
        self.features, self.labels = run.data.train_views(run.subset, METHODS[run.method].kinds[0])
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        view, self.passes = self.passes % self.features.shape[1], self.passes + 1
        yield torch.from_numpy(self.features[:, view].copy()), torch.from_numpy(self.labels)

    def __len__(self) -> int:
        return 1


def relative(one: Any, other: Any) -> float:
    """Return the largest difference, relative to the largest number of the other."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.abs(one - other).max() / np.abs(other).max())


def moved(one: Any, other: Any, start: Any) -> float:
    """Return the length of the difference, relative to the distance of the other from its start."""
    one, other, start = (np.asarray(x, np.float64).ravel() for x in (one, other, start))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - start))


def same(what: str, one: Sequence[float], other: Sequence[float]) -> Row:
    """Return a row of chosen values that must be equal, but for their rounding to float32."""
    return Row(f"{what}: chosen otherwise", float(not np.allclose(one, other, rtol=1e-5, atol=0)), 0)
