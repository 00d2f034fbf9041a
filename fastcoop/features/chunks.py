"""What is still to be encoded for a store, cut into chunks, and the file of each finished chunk.

A chunk's file is immutable and renamed into place, so a killed process loses one chunk at most.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import SPLITS
from fastcoop.errors import UserError
from fastcoop.features.store import FeatureStore
from fastcoop.files import atomic_write

CROPS_PER_CHUNK = 256


@dataclass(frozen=True)
class EncodingSettings:
    """How features are computed; see `cache_features`."""

    recipe: str
    view_seed: int
    views: int
    dtype: str
    batch_size: int


@dataclass(frozen=True)
class Chunk:
    """Some images of one split, and the views of them to encode."""

    split: str
    rows: tuple[int, ...]  # ascending indices into the split
    views: range  # consecutive view numbers
    key: str  # name of the chunk's file, equal for equal work only

    @property
    def crops(self) -> int:
        """Crops to encode."""
        return len(self.rows) * len(self.views)


@dataclass(frozen=True, eq=False)
class Encoded:
    """The features of a chunk."""

    features: np.ndarray  # (rows, views, dim) in the store's dtype; zeros for unreadable images
    files: np.ndarray  # `FILE` records (rows,) of the images as they were read
    failures: dict[int, str]  # position in the chunk -> why that image could not be read


@dataclass(frozen=True, eq=False)
class EncodingPlan:
    """What to encode for a store."""

    settings: EncodingSettings  # with the views and dtype of the finished store
    chunks: tuple[Chunk, ...]
    index: Mapping[str, np.ndarray]  # split -> ascending indices in the finished store if all can be read
    skipped: Mapping[str, np.ndarray]  # split -> indices left out earlier

    @property
    def crops(self) -> int:
        """Crops to encode."""
        return sum(chunk.crops for chunk in self.chunks)


def wanted_images(dataset: Dataset, subsets: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Return for each split the ascending indices to store: of train those in ``subsets``, of the others all."""
    wanted = {split: np.arange(len(images)) for split, images in dataset.splits.items()}
    if "train" in wanted:
        wanted["train"] = np.unique(np.concatenate([np.zeros(0, np.int64), *subsets]))
    return wanted


def plan_encoding(
    backbone: Backbone,
    dataset: Dataset,
    wanted: Mapping[str, np.ndarray],
    settings: EncodingSettings,
    store: FeatureStore | None,
    leave_skipped: bool,
) -> EncodingPlan:
    """Compare the images wanted with those in ``store``.

    More views than the store has are added to every training image; fewer leave the store as it is.

    Args:
        backbone: Backbone to encode with.
        dataset: Dataset of the images.
        wanted: Split -> ascending indices.
        settings: Settings asked for.
        store: The present store, if there is one.
        leave_skipped: Whether images that could not be read earlier are not tried again.

    Raises:
        UserError: The store was made with settings that cannot be mixed with these.
    """
    if store is not None:
        settings = _reconcile(store, settings, backbone)
    chunks: list[Chunk] = []
    index: dict[str, np.ndarray] = {}
    skipped: dict[str, np.ndarray] = {}
    for split in (name for name in SPLITS if name in dataset.splits):
        have = skipped[split] = np.zeros(0, np.int64)
        if store is not None and split in store.splits:
            have = store.indices(split)
            if leave_skipped:
                skipped[split] = np.array(store.meta.skipped.get(split, ()), np.int64)
        new = np.setdiff1d(wanted[split], np.union1d(have, skipped[split]))
        index[split] = np.union1d(have, new)
        last = settings.views if split == "train" else 0
        if store is not None and split == "train" and store.views < last:
            chunks += _cut(backbone, dataset, settings, split, have, range(store.views + 1, last + 1))
        chunks += _cut(backbone, dataset, settings, split, new, range(last + 1))
    return EncodingPlan(settings, tuple(chunks), index, skipped)


def dtype_name(backbone: Backbone) -> str:
    """Return the dtype that the backbone computes in, such as "float32"."""
    return str(backbone.dtype).removeprefix("torch.")


def _reconcile(store: FeatureStore, asked: EncodingSettings, backbone: Backbone) -> EncodingSettings:
    meta = store.meta
    compared = [
        ("recipe", meta.recipe, asked.recipe),
        ("view seed", meta.view_seed, asked.view_seed),
        ("a backbone in", meta.compute_dtype, dtype_name(backbone)),
    ]
    if meta.dtype == "float16":  # a float32 store serves both
        compared.append(("features in", meta.dtype, asked.dtype))
    for what, stored, value in compared:
        if stored != value:
            raise UserError(
                f"{store.path} was made with {what} {stored} and {value} was asked for; "
                "use another cache folder or move the file away."
            )
    return replace(asked, dtype=meta.dtype, views=max(meta.views, asked.views))


def _cut(
    backbone: Backbone,
    dataset: Dataset,
    settings: EncodingSettings,
    split: str,
    rows: np.ndarray,
    views: range,
) -> list[Chunk]:
    size = max(1, CROPS_PER_CHUNK // len(views))
    chunks = []
    for start in range(0, len(rows), size):
        cut = rows[start : start + size].tolist()
        facts = [
            *(backbone.digest, dtype_name(backbone), dataset.digest, split, cut, list(views)),
            *(settings.recipe, settings.view_seed, settings.dtype, settings.batch_size),
        ]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        chunks.append(Chunk(split, tuple(cut), views, key))
    return chunks


def chunks_folder(store: Path) -> Path:
    """Return the folder, beside a store, of the chunks finished for it."""
    return store.with_name(store.name + ".parts")


def write_chunk(store: Path, chunk: Chunk, encoded: Encoded) -> None:
    """Write a chunk's file, whole or not at all."""
    content = io.BytesIO()  # on a full disk zipfile itself would print errors beside our own message
    np.savez(
        content,
        features=encoded.features,
        files=encoded.files,
        failed=np.array(list(encoded.failures), np.int64),
        reasons=np.array(list(encoded.failures.values()), np.str_),
    )
    with atomic_write(chunks_folder(store) / f"{chunk.key}.npz") as temporary, temporary.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def read_chunk(store: Path, chunk: Chunk) -> Encoded | None:
    """Return a chunk written earlier; None if there is none, or if a crash of the machine damaged its file."""
    try:
        with np.load(chunks_folder(store) / f"{chunk.key}.npz") as content:
            failures = dict(zip(content["failed"].tolist(), content["reasons"].tolist(), strict=True))
            encoded = Encoded(content["features"], content["files"], failures)
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return encoded if encoded.features.shape[:2] == (len(chunk.rows), len(chunk.views)) else None


def discard_chunks(store: Path) -> None:
    """Remove every chunk: the store holds them now, or nothing needs them."""
    shutil.rmtree(chunks_folder(store), ignore_errors=True)
