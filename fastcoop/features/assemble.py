"""Parts, and what an earlier store holds, put together into the store's one file."""

from __future__ import annotations

from collections.abc import Iterator, Set
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features.image_files import FileRecord, ImageFiles
from fastcoop.features.parts import Encoded, read_part
from fastcoop.features.plan import Part, Plan, dtype_name
from fastcoop.features.store import FeatureStore
from fastcoop.features.store_file import ROWS_AT_ONCE, Meta
from fastcoop.features.write import Block, SplitContent, write_store

PACKAGES = ("fastcoop", "torch", "open_clip_torch", "pillow", "numpy", "h5py")

Failures = dict[tuple[str, int], str]  # (split, index) -> why the image could not be read


def assemble(
    backbone: Backbone,
    dataset: Dataset,
    plan: Plan,
    store: FeatureStore | None,
    path: Path,
    skip_unreadable: bool,
) -> Failures:
    """Write the store of ``plan`` to ``path`` in one rename, and return which images could not be read.

    Those are left out; with ``skip_unreadable`` the store notes that they were left out for good. An existing
    store stays as it is if not one image of the plan could be read and none is to be noted.
    """
    failures: Failures = {}
    records: dict[tuple[str, int], FileRecord] = {}
    for part in plan.parts:
        encoded = _encoded(path, part)
        for at, reason in encoded.failures.items():
            failures[part.split, part.rows[at]] = reason
        if 0 in part.views:  # more views of an image do not say of which bytes its first ones are
            records |= {(part.split, row): encoded.files.record(at) for at, row in enumerate(part.rows)}
    planned = {(part.split, row) for part in plan.parts for row in part.rows}
    if store is not None and planned and failures.keys() == planned and not skip_unreadable:
        return failures
    failed = {split: np.array([row for name, row in failures if name == split], int) for split in plan.index}
    index = {split: np.setdiff1d(rows, failed[split]) for split, rows in plan.index.items()}
    skipped = {
        split: np.union1d(rows, failed[split]) if skip_unreadable else rows
        for split, rows in plan.skipped.items()
    }
    meta = Meta(
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        dataset=dataset.name,
        dataset_digest=dataset.digest,
        dim=backbone.embed_dim,
        recipe=plan.settings.recipe,
        view_seed=plan.settings.view_seed,
        views=plan.settings.views,
        dtype=plan.settings.dtype,
        class_names=dataset.class_names,
        template=dataset.template,
        expected={split: len(dataset.splits[split]) for split in index},
        skipped={split: rows.tolist() for split, rows in skipped.items()},
        sha256={},
        versions=package_versions(),
        compute_dtype=dtype_name(backbone),
    )
    contents = {}
    for split, rows in index.items():
        source = dataset.splits[split]
        kept = (
            {}
            if store is None or split not in store.splits
            else store.files(split).by_index(store.indices(split))
        )
        contents[split] = SplitContent(
            index=rows,
            labels=source.labels[rows],
            paths=[source.paths[row] for row in rows],
            views=plan.views(split),
            files=ImageFiles.of([records.get((split, row)) or kept[row] for row in rows.tolist()]),
            blocks=_blocks(plan, split, rows, store, path),
        )
    write_store(path, meta, contents)
    return failures


def package_versions() -> dict[str, str]:
    """Versions of the packages that features depend on."""
    return {name: version(name) for name in PACKAGES}


def _blocks(
    plan: Plan, split: str, index: np.ndarray, store: FeatureStore | None, path: Path
) -> Iterator[Block]:
    kept: Set[int] = set(index.tolist())
    if store is not None and split in store.splits:
        old = store.indices(split)
        for start in range(0, len(old), ROWS_AT_ONCE):
            rows = old[start : start + ROWS_AT_ONCE]
            features = store.raw(split, slice(start, start + ROWS_AT_ONCE))
            keep = np.isin(rows, index)
            yield np.searchsorted(index, rows[keep]), slice(0, features.shape[1]), features[keep]
    for part in plan.parts:
        if part.split == split:
            keep = np.array([row in kept for row in part.rows])
            features = _encoded(path, part).features[keep]
            views = slice(part.views.start, part.views.stop)
            yield np.searchsorted(index, np.array(part.rows)[keep]), views, features


def _encoded(store: Path, part: Part) -> Encoded:
    encoded = read_part(store, part)
    if encoded is None:
        raise UserError(
            f"A part of {store} was removed while the store was being made; run the command again."
        )
    return encoded
