"""``fastcoop features check``: whether a store is intact, and whether its images give the same features today."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.checks import whole_number
from fastcoop.datasets import Dataset
from fastcoop.features.encode import Chunk, Encoding, cut_chunks, encode_chunks
from fastcoop.features.image_files import find_changes
from fastcoop.features.store import FeatureStore, find_dataset
from fastcoop.features.store_file import IMPORTED, StoreMeta

MOST_CLASSES = 100  # whose prompts are encoded to measure what float16 does to logits
TOLERANCE = 0.01  # of a feature's length; float16 storage and other hardware stay well below


@dataclass(frozen=True)
class HalfPrecision:
    """What rounding features to float16 does to the logits of the hand-written prompts, temperature included."""

    largest: float  # absolute difference of a logit
    mean: float
    changed: int  # predictions that become another class
    predictions: int


@dataclass
class StoreReport:
    """The findings of `check_store`.

    Attributes:
        path: Path of the store.
        meta: Description of the store.
        counts: Split -> images stored.
        problems: One sentence each; empty if the store is intact.
        reencoded: Images encoded again.
        largest_difference: Between a stored and a new feature, relative to the stored one's length; None if nothing
            was encoded again.
        half_precision: Error of float16 in the logits of the new features; None if nothing was encoded again.
        notes: What was not checked, and why; one sentence each.
    """

    path: Path
    meta: StoreMeta
    counts: dict[str, int]
    problems: list[str] = field(default_factory=list)
    reencoded: int = 0
    largest_difference: float | None = None
    half_precision: HalfPrecision | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problems were found."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        meta = self.meta
        counts = ", ".join(f"{n} of {meta.expected[split]} {split}" for split, n in self.counts.items())
        lines = [
            f"{self.path}: {meta.dataset} by {meta.backbone}, {meta.dtype}, recipe {meta.recipe}",
            f"images: {counts}; {meta.views} augmented views of each training image; dim {meta.dim}",
            f"weights {meta.backbone_digest[:12]}, dataset {meta.dataset_digest[:12]}",
        ]
        if (half := self.half_precision) is not None:
            lines += [
                f"{self.reencoded} images encoded again: largest difference {self.largest_difference:.2e} of a "
                "feature's length",
                f"float16 moves their logits by {half.largest:.1e} at most, {half.mean:.1e} on average, and "
                f"{half.changed} of {half.predictions} predictions",
            ]
        return lines + (self.problems or ["no problems found"]) + self.notes


def check_store(
    path: str | Path,
    backbone: str | Path | Backbone | None = None,
    dataset: str | Path | Dataset | None = None,
    *,
    sample: int = 32,
    seed: int = 0,
) -> StoreReport:
    """Verify a store's digests and counts, and, given ``backbone`` and ``dataset``, encode some images again.

    Args:
        path: Path of the store.
        backbone: Backbone that made the store, as `backbone_from_spec` takes it.
        dataset: Dataset of its images, as `find_dataset` takes it; its files are compared with those encoded.
        sample: Images to encode again.
        seed: Seed that draws them.

    Raises:
        UserError: The file cannot be opened, or was made from other weights or images.
    """
    sample = whole_number(sample, "the number of images to encode again", 1)
    backbone = None if backbone is None else backbone_from_spec(backbone)
    dataset = None if dataset is None else find_dataset(dataset)
    dataset = dataset and (dataset.whole or dataset)
    store = FeatureStore.open(path, backbone, dataset)
    report = StoreReport(store.path, store.meta, {split: len(store.indices(split)) for split in store.splits})
    damaged = False
    for split in store.splits:
        damage = store.file.problems(split)
        report.problems += damage + _split_problems(store, split, None if damage else dataset)
        damaged |= bool(damage)
    if backbone is None or dataset is None:
        report.notes.append("No image was encoded again: that takes both --backbone and --dataset.")
    elif store.meta.recipe == IMPORTED:
        report.notes.append("No image was encoded again: the features were imported, without images.")
    elif damaged:
        report.notes.append("No image was encoded again, because the store is damaged.")
    else:
        _encode_again(store, backbone, dataset, np.random.default_rng(seed), sample, report)
    return report


def _split_problems(store: FeatureStore, split: str, dataset: Dataset | None) -> list[str]:
    meta, index, problems = store.meta, store.indices(split), []
    missing = meta.expected[split] - len(index) - len(meta.skipped.get(split, ()))
    if split != "train" and missing:
        problems.append(f"{missing} {split} images are missing; run `fastcoop cache-features` again.")
    if dataset is not None:
        source = dataset.splits[split]
        if [source.paths[row] for row in index] != list(store.paths(split)):
            problems.append(f"The {split} paths differ from the dataset's.")
        if not np.array_equal(source.labels[index], store.labels(split)):
            problems.append(f"The {split} labels differ from the dataset's.")
        paths = [dataset.root / source.paths[row] for row in index]
        changed, _ = find_changes(paths, store.files(split), f"Reading {split} image files", hash_all=True)
        if changed.any():
            problems.append(
                f"{changed.sum()} {split} image file(s) have changed since they were encoded, the first "
                f"{paths[int(changed.argmax())]}; delete {store.path} and run `fastcoop cache-features`."
            )
    return problems


def _encode_again(
    store: FeatureStore,
    backbone: Backbone,
    dataset: Dataset,
    rng: np.random.Generator,
    sample: int,
    report: StoreReport,
) -> None:
    """Encode a sample of the stored images again, and add to the report how far they are from the stored features."""
    encoding = Encoding(backbone, dataset, store.meta.recipe, store.meta.view_seed, dtype="float32")
    counts = [len(store.indices(split)) for split in store.splits]
    drawn = rng.permutation(sum(counts))[:sample]
    chunks: list[Chunk] = []
    for split, start, count in zip(store.splits, np.cumsum([0, *counts]), counts, strict=False):
        rows = np.sort(drawn[(start <= drawn) & (drawn < start + count)]) - start
        chunks += cut_chunks(split, store.indices(split)[rows], range(store.meta.views_of(split)))
    worst, encoded = 0.0, []
    for chunk, found in encode_chunks(encoding, chunks):
        readable = found.problems == ""
        report.problems += [
            f"{dataset.splits[chunk.split].paths[row]} can no longer be read: {problem}."
            for row, problem in zip(chunk.rows, found.problems.tolist(), strict=True)
            if problem
        ]
        new = found.features[readable]
        rows = np.searchsorted(store.indices(chunk.split), np.array(chunk.rows)[readable])
        old = store.raw(chunk.split, rows).astype(np.float32)
        length = np.maximum(np.linalg.norm(old, axis=-1), np.finfo(np.float32).tiny)
        worst = max(worst, float((np.linalg.norm(new - old, axis=-1) / length).max(initial=0)))
        encoded.append(new.reshape(-1, new.shape[-1]))
        report.reencoded += len(new)
    if report.reencoded:
        report.half_precision = _half_precision(backbone, dataset, np.concatenate(encoded))
        report.largest_difference = worst
    if worst > TOLERANCE:
        report.problems.append(
            f"Features encoded again differ by {worst:.1%} of their length: the images or the weights changed."
        )


def _half_precision(backbone: Backbone, dataset: Dataset, features: np.ndarray) -> HalfPrecision:
    """Compare logits of float32 features (n, dim) and of the same features in float16."""

    def unit(rows: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        return scaled

    names = [name.replace("_", " ") for name in dataset.class_names[:MOST_CLASSES]]
    texts = backbone.encode_text([dataset.template.format(name) for name in names])
    prompts = unit(texts.double().cpu().numpy())
    exact, rounded = (
        backbone.logit_scale * unit(stored.astype(np.float64)) @ prompts.T
        for stored in (features, features.astype(np.float16))
    )
    moved = np.abs(exact - rounded)
    changed = int((exact.argmax(1) != rounded.argmax(1)).sum())
    return HalfPrecision(float(moved.max()), float(moved.mean()), changed, len(features))
