"""What is still to be computed for a store, cut into parts that no interruption changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import SPLITS
from fastcoop.errors import UserError
from fastcoop.features.store import FeatureStore

CROPS_PER_PART = 256  # the most work that a kill can lose


@dataclass(frozen=True)
class Settings:
    """How features are computed: see ``cache_features``."""

    recipe: str
    view_seed: int
    views: int
    dtype: str
    batch_size: int


@dataclass(frozen=True)
class Part:
    """Some images of one split, and the views to compute of them.

    Attributes:
        rows: ascending indices into the split.
        views: view numbers, consecutive.
        key: names the part's file; equal for equal work alone.
    """

    split: str
    rows: tuple[int, ...]
    views: range
    key: str


@dataclass(frozen=True, eq=False)
class Plan:
    """Attributes:
    settings: with the views and dtype that the finished store has.
    parts: everything to compute.
    index: for each split the ascending indices that the store holds in the end if every image can be read.
    skipped: for each split the indices left out from earlier on.
    """

    settings: Settings
    parts: tuple[Part, ...]
    index: Mapping[str, np.ndarray]
    skipped: Mapping[str, np.ndarray]

    def views(self, split: str) -> int:
        """Views stored of each image: only training images have augmented ones."""
        return 1 + self.settings.views if split == "train" else 1


def make_plan(
    backbone: Backbone,
    dataset: Dataset,
    wanted: Mapping[str, np.ndarray],
    settings: Settings,
    store: FeatureStore | None,
    leave_skipped: bool,
) -> Plan:
    """Compare what is wanted (ascending indices for each split) with what ``store`` holds.

    Images skipped earlier are tried again unless ``leave_skipped``. More views than the store has are added
    to every image; fewer leave the store as it is.

    Raises UserError where the store was made with settings that cannot be mixed with these.
    """
    if store is not None:
        settings = _reconciled(store, settings, backbone)
    parts: list[Part] = []
    index: dict[str, np.ndarray] = {}
    skipped: dict[str, np.ndarray] = {}
    for split in (name for name in SPLITS if name in dataset.splits):
        stored = store is not None and split in store.splits
        have = store.indices(split) if store is not None and stored else np.zeros(0, np.int64)
        skipped[split] = np.zeros(0, np.int64)
        if store is not None and stored and leave_skipped:
            skipped[split] = np.array(store.meta.skipped.get(split, ()), np.int64)
        new = np.setdiff1d(wanted[split], np.union1d(have, skipped[split]))
        index[split] = np.union1d(have, new)
        last = settings.views if split == "train" else 0
        if store is not None and split == "train" and store.views < last:
            parts += _cut(backbone, dataset, settings, split, have, range(store.views + 1, last + 1))
        parts += _cut(backbone, dataset, settings, split, new, range(last + 1))
    return Plan(settings, tuple(parts), index, skipped)


def dtype_name(backbone: Backbone) -> str:
    """The dtype that the backbone computes in, "float32" for example."""
    return str(backbone.dtype).removeprefix("torch.")


def _reconciled(store: FeatureStore, asked: Settings, backbone: Backbone) -> Settings:
    meta = store.meta
    for what, stored, value in (
        ("recipe", meta.recipe, asked.recipe),
        ("view seed", meta.view_seed, asked.view_seed),
        ("a backbone in", meta.compute_dtype, dtype_name(backbone)),
    ):
        if stored != value:
            raise UserError(
                f"{store.path} was made with {what} {stored} and {value} was asked for; "
                "use another cache folder or move the file away."
            )
    if meta.dtype == "float16" and asked.dtype == "float32":
        raise UserError(
            f"{store.path} holds float16 features and float32 was asked for; "
            "use another cache folder or move the file away."
        )
    return replace(asked, dtype=meta.dtype, views=max(meta.views, asked.views))


def _cut(
    backbone: Backbone,
    dataset: Dataset,
    settings: Settings,
    split: str,
    rows: np.ndarray,
    views: range,
) -> list[Part]:
    size = max(1, CROPS_PER_PART // len(views))
    cuts: Sequence[np.ndarray] = [rows[start : start + size] for start in range(0, len(rows), size)]
    parts = []
    for cut in cuts:
        facts = [
            *(backbone.digest, dtype_name(backbone), dataset.digest, split, cut.tolist(), list(views)),
            *(settings.recipe, settings.view_seed, settings.dtype, settings.batch_size),
        ]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        parts.append(Part(split, tuple(cut.tolist()), views, key))
    return parts
