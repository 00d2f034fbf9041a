"""``fastcoop features check``: whether a store is intact, and whether its images give the same features today."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.checks import whole_number
from fastcoop.datasets import Dataset
from fastcoop.features.encode import difference, encode_chunks, precision_note
from fastcoop.features.image_files import find_changes
from fastcoop.features.plan import Chunk, Encoding, cut_chunks
from fastcoop.features.store import FeatureStore, find_dataset
from fastcoop.features.store_file import FEATURES, IMPORTED, StoreMeta
from fastcoop.progress import counted

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
    """The findings of `check_store`."""

    path: Path
    meta: StoreMeta
    counts: dict[str, int]  # split -> images stored
    problems: list[str] = field(default_factory=list)  # one sentence each; empty if the store is intact
    reencoded: int = 0  # images encoded again; if there are none, the next two are None
    largest_difference: float | None = None  # of a new feature, relative to the length of the stored one
    half_precision: HalfPrecision | None = None  # of the new features
    notes: list[str] = field(default_factory=list)  # what was not checked, and why; one sentence each

    @property
    def ok(self) -> bool:
        """Whether no problems were found."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        meta, half = self.meta, self.half_precision
        counts = ", ".join(f"{n} of {meta.expected[split]} {split}" for split, n in self.counts.items())
        lines = [
            f"{self.path}: {meta.dataset} by {meta.backbone}, {meta.dtype}, recipe {meta.recipe}",
            f"images: {counts}; {meta.views} augmented views of each training image; dim {meta.dim}",
            f"weights {meta.backbone_digest[:12]}, dataset {meta.dataset_digest[:12]}",
        ]
        if meta.kinds:
            kinds = (f"{kind} ({counted(views, 'augmented view')})" for kind, views in meta.kinds.items())
            lines.append(f"further kinds of features: {', '.join(kinds)}")
        if meta.precision_difference is not None:
            lines.append(precision_note(meta.precision, meta.precision_difference))
        if half is not None:
            lines += [
                f"{counted(self.reencoded, 'image')} encoded again: largest difference {self.largest_difference:.2e} "
                "of a feature's length",
                f"float16 moves their logits by {half.largest:.1e} at most, {half.mean:.1e} on average, and "
                f"{half.changed} of {half.predictions} predictions",
            ]
        return [*lines, *(self.problems or ["no problems found"]), *self.notes]


def check_store(
    path: str | Path,
    backbone: str | Path | Backbone | None = None,
    dataset: str | Path | Dataset | None = None,
    *,
    sample: int = 32,
) -> StoreReport:
    """Verify a store's digests and counts, and, given ``backbone`` and ``dataset``, encode some images again.

    Args:
        path: Path of the store.
        backbone: Backbone that made the store, as `backbone_from_spec` takes it.
        dataset: Dataset of its images, as `find_dataset` takes it; its files are compared with those encoded.
        sample: Images to encode again.

    Raises:
        UserError: The file cannot be opened, or was made from other weights or images.
    """
    sample = whole_number(sample, "the number of images to encode again", 1)
    backbone = None if backbone is None else backbone_from_spec(backbone)
    dataset = None if dataset is None else find_dataset(dataset)
    dataset = dataset and (dataset.whole or dataset)
    store = FeatureStore.open(path, backbone, dataset)
    report = StoreReport(store.path, store.meta, {split: len(store.indices(split)) for split in store.splits})
    is_damaged, meta = False, store.meta
    for split in store.splits:
        damage = [one for array in meta.arrays(split) for one in store.file.problems(split, array)]
        report.problems += damage + _split_problems(store, split, None if damage else dataset)
        is_damaged |= bool(damage)
    if backbone is None or dataset is None:
        report.notes.append("No image was encoded again: that takes both --backbone and --dataset.")
    elif meta.recipe == IMPORTED:
        report.notes.append("No image was encoded again: the features were imported, without images.")
    elif is_damaged:
        report.notes.append("No image was encoded again, because the store is damaged.")
    else:
        drawn = np.random.default_rng(0).permutation(sum(report.counts.values()))[:sample]
        precision = "bfloat16" if meta.precision == "bfloat16" else "float32"
        made = meta.recipe, meta.view_seed, meta.views, "float32", precision, meta.kinds
        _encode_again(store, Encoding(backbone, dataset, *made), drawn, report)
    return report


def _split_problems(store: FeatureStore, split: str, dataset: Dataset | None) -> list[str]:
    meta, index, problems = store.meta, store.indices(split), []
    missing = meta.expected[split] - len(index) - len(store.skipped(split))
    if split != "train" and missing:
        lacks = counted(missing, f"{split} image")
        problems.append(f"The store lacks {lacks}; run `fastcoop cache-features` again.")
    if dataset is not None:
        source = dataset.splits[split]
        if [source.paths[row] for row in index] != list(store.paths(split)):
            problems.append(f"The {split} paths differ from the dataset's.")
        if not np.array_equal(source.labels[index], store.labels(split)):
            problems.append(f"The {split} labels differ from the dataset's.")
        paths = dataset.files(split, index)
        changed, _ = find_changes(paths, store.files(split), f"Reading {split} image files", hash_all=True)
        if changed.any():
            images, first = counted(int(changed.sum()), f"{split} image file"), paths[int(changed.argmax())]
            problems.append(
                f"{images} changed since the last encoding, the first {first}; delete {store.path} and run `fastcoop "
                "cache-features`."
            )
    return problems


def _encode_again(store: FeatureStore, encoding: Encoding, drawn: np.ndarray, report: StoreReport) -> None:
    """Encode images again, and add to the report how far they are from the stored features. ``drawn`` are positions
    among all images of the store, split by split."""
    chunks, start = list[Chunk](), 0
    for split, count in report.counts.items():
        rows = np.sort(drawn[(start <= drawn) & (drawn < start + count)]) - start
        chunks += cut_chunks(split, store.indices(split)[rows], encoding.arrays(split))
        start += count
    worst, encoded = 0.0, []
    for chunk, found in encode_chunks(encoding, chunks):
        paths, readable = encoding.dataset.splits[chunk.split].paths, found.problems == ""
        failures = found.failures(chunk).items()
        report.problems += [f"{paths[row]} can no longer be read: {problem}." for row, problem in failures]
        rows = np.searchsorted(store.indices(chunk.split), np.array(chunk.rows)[readable])
        for array in chunk.adds:
            new = found.of(chunk, array)[readable]
            worst = max(worst, difference(new, store.raw(chunk.split, rows, array=array).astype(np.float32)))
            if array == FEATURES:
                encoded.append(new.reshape(-1, new.shape[-1]))
        report.reencoded += len(rows)
    if report.reencoded:
        report.half_precision = _half_precision(encoding, np.concatenate(encoded))
        report.largest_difference = worst
    if worst > TOLERANCE:
        report.problems.append(
            f"Features encoded again differ by {worst:.1%} of their length: the images or the weights changed."
        )


def _half_precision(encoding: Encoding, features: np.ndarray) -> HalfPrecision:
    """Compare logits of float32 features (n, dim) and of the same features in float16."""
    backbone, dataset = encoding.backbone, encoding.dataset
    names = [name.replace("_", " ") for name in dataset.class_names[:MOST_CLASSES]]
    texts = backbone.encode_text([dataset.template.format(name) for name in names]).double().cpu()
    exact, rounded = (
        backbone.logit_scale * normalize(torch.from_numpy(stored).double()) @ normalize(texts).T
        for stored in (features, features.astype(np.float16))
    )
    moved, changed = (exact - rounded).abs(), int((exact.argmax(1) != rounded.argmax(1)).sum())
    return HalfPrecision(float(moved.max()), float(moved.mean()), changed, len(features))
