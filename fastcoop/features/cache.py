"""``cache_features``: encode the images that a dataset's store lacks, in chunks that survive a kill."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.checks import LARGEST_BATCH, MOST_VIEWS, several, whole_number
from fastcoop.datasets import Dataset, few_shot
from fastcoop.datasets.dataset import warn_once
from fastcoop.datasets.files import abbreviate
from fastcoop.errors import UserError, nearest, writing
from fastcoop.features.chunks import (
    Chunk,
    Encoded,
    EncodingPlan,
    EncodingSettings,
    chunks_folder,
    discard_chunks,
    dtype_name,
    plan_encoding,
    read_chunk,
    wanted_images,
)
from fastcoop.features.encode import encode_chunks
from fastcoop.features.image_files import FILE
from fastcoop.features.images import RECIPES
from fastcoop.features.store import FeatureStore, find_dataset, open_if_there, store_path
from fastcoop.features.store_file import ROWS_AT_ONCE, SplitRows, StoreMeta
from fastcoop.features.write import Block, SplitContent, write_store
from fastcoop.files import lock

LISTED = 50  # unreadable images named in one message

log = logging.getLogger("fastcoop")

Wanted = tuple[
    str | Path | Dataset, Sequence[int | str], Sequence[int]
]  # a dataset with the shots and seeds to cache for
Failures = dict[tuple[str, int], str]  # (split, index) -> why the image could not be read


class UnreadableImages(UserError):
    """Some images could not be decoded; everything else is stored."""


def cache_all(
    backbones: Iterable[str | Path | Backbone],
    wanted: Sequence[Wanted],
    cache_root: str | Path,
    **options: Any,
) -> Iterator[Path]:
    """Call `cache_features` with ``options`` for each backbone and dataset, yielding each store's path as it is done.

    Raises:
        UserError: As `cache_features`; for unreadable images only when all the rest is stored.
    """
    unreadable = []
    for backbone in backbones:
        for dataset, shots, seeds in wanted:
            try:
                yield cache_features(backbone, dataset, cache_root, shots=shots, seeds=seeds, **options)
            except UnreadableImages as error:
                unreadable.append(str(error))
    if unreadable:
        raise UnreadableImages("\n".join(unreadable))


def cache_features(
    backbone: str | Path | Backbone,
    dataset: str | Path | Dataset,
    cache_root: str | Path,
    *,
    shots: Sequence[int | str],
    seeds: Sequence[int],
    views: int = 8,
    recipe: str = "current",
    dtype: str = "float16",
    batch_size: int = 64,
    view_seed: int = 0,
    skip_unreadable: bool = False,
    retry_skipped: bool = True,
) -> Path:
    """Make sure that a store holds the images that runs with these shots and seeds use, and return its path.

    The store holds the training images in the few-shot subsets of ``shots`` x ``seeds``, each with view 0 (the
    test-time crop) and ``views`` augmented views, and all validation and test images with view 0. Features of an
    existing store are kept unless the image file has changed; only missing ones are computed. If the process is
    killed, the next call continues where it stopped and ends with the same contents. A second process on the same
    store waits; if everything is there already, nothing is written, and the store may be in a read-only folder.

    Args:
        backbone: Backbone to encode with, as `backbone_from_spec` takes it.
        dataset: Dataset to encode, as `find_dataset` takes it. Of half of a dataset's classes, the whole is stored.
        cache_root: Folder of feature stores.
        shots: Images per class, or "all".
        seeds: Seeds of the few-shot subsets.
        views: Augmented views per training image.
        recipe: "current" or "official-2021", the image preprocessing of every view.
        dtype: "float16" or "float32"; an existing float32 store stays one.
        batch_size: Crops encoded at once.
        view_seed: Seed of the augmentations.
        skip_unreadable: Leave out images that cannot be decoded, with a warning, instead of raising at the end.
        retry_skipped: Try images again that were left out earlier; ignored with ``skip_unreadable``.

    Raises:
        UserError: An unknown recipe or dtype, a store made with other weights, images or settings, a disk that
            cannot be written; and, after everything else is stored, images that could not be decoded
            (``UnreadableImages``), or no test image that could be.
    """
    if recipe not in RECIPES:
        raise UserError(f'There is no recipe "{recipe}".{nearest(recipe, RECIPES)}')
    check_dtype(dtype)
    settings = EncodingSettings(
        recipe,
        whole_number(view_seed, "view_seed"),
        whole_number(views, "views", 0, MOST_VIEWS),
        dtype,
        whole_number(batch_size, "batch_size", 1, LARGEST_BATCH),
    )
    shots, seeds = several(shots), several(seeds)
    backbone, dataset = backbone_from_spec(backbone), find_dataset(dataset)
    dataset = dataset.whole or dataset
    path = store_path(cache_root, backbone, dataset)
    if dataset.store is not None:  # imported features are complete
        FeatureStore.open(path, backbone, dataset)
        return path
    subsets = (few_shot(dataset, number, seed).train for number in shots for seed in seeds)
    wanted = wanted_images(dataset, subsets)
    failures: Failures = {}

    def compare() -> tuple[FeatureStore | None, EncodingPlan]:
        store = open_if_there(path, backbone, dataset, only_unchanged=True)
        leave_skipped = skip_unreadable or not retry_skipped
        return store, plan_encoding(backbone, dataset, wanted, settings, store, leave_skipped)

    with writing(path):
        store, plan = compare()
        if plan.chunks or chunks_folder(path).exists():
            with store_lock(path):
                store, plan = compare()
                if plan.chunks:
                    _warn_of_changes(dataset, store, plan)
                    encode_chunks(backbone, dataset, plan, path)
                    failures = assemble(backbone, dataset, plan, store, path, skip_unreadable)
                discard_chunks(path)
        elif store is not None and store.compared.renewed:
            # New times of unchanged files are recorded where possible: the next call need not hash them again.
            with suppress(OSError), lock(lock_path(path), timeout_s=0):
                store, plan = compare()
                if not plan.chunks:
                    assemble(backbone, dataset, plan, store, path, skip_unreadable)
    _report(dataset, failures, skip_unreadable)
    _check_coverage(dataset, FeatureStore.open(path), shots, seeds)
    return path


def open_current(path: Path, backbone: Backbone, dataset: Dataset) -> FeatureStore:
    """Open a store whose features have just been cached.

    Raises:
        UserError: An image file has changed since it was encoded, or as `FeatureStore.open`.
    """
    store = FeatureStore.open(path, backbone, dataset, only_unchanged=True)
    if store.compared.count:
        raise UserError(
            f"{store.compared.count} image file(s) of {dataset.name} changed while features were computed; run the "
            "same command again."
        )
    return store


def check_dtype(dtype: str) -> None:
    """Raise UserError unless features can be stored in ``dtype``."""
    if dtype not in ("float16", "float32"):
        raise UserError(f'Features are stored as float16 or float32, not "{dtype}".')


def lock_path(store: Path) -> Path:
    """Return the lock file of a store."""
    return store.with_name(f"{store.name}.lock")


@contextmanager
def store_lock(path: Path) -> Iterator[None]:
    """Hold a store's lock; wait, with a warning, while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(lock_path(path), timeout_s=0))
        except TimeoutError:
            log.warning(f"Another process is working on {path}; waiting for it.")
            stack.enter_context(lock(lock_path(path)))
        yield


def assemble(
    backbone: Backbone,
    dataset: Dataset,
    plan: EncodingPlan,
    store: FeatureStore | None,
    path: Path,
    skip_unreadable: bool,
) -> Failures:
    """Write the store of ``plan`` from its chunks and the present store, and return the images not read.

    Those are left out; with ``skip_unreadable`` the store records that they were. An existing store stays as it is if
    no image of the plan could be read and none is to be recorded.
    """
    failures: Failures = {}
    records: dict[tuple[str, int], np.ndarray] = {}
    if store is not None:
        for split in store.splits:
            rows = store.indices(split).tolist()
            records |= zip(((split, row) for row in rows), store.files(split), strict=True)
    for chunk in plan.chunks:
        encoded = _read(path, chunk)
        failures |= {(chunk.split, chunk.rows[at]): reason for at, reason in encoded.failures.items()}
        if 0 in chunk.views:  # further views do not say which bytes view 0 was made of
            records |= {(chunk.split, row): one for row, one in zip(chunk.rows, encoded.files, strict=True)}
    planned = {(chunk.split, row) for chunk in plan.chunks for row in chunk.rows}
    if store is not None and planned and failures.keys() == planned and not skip_unreadable:
        return failures
    contents, all_skipped = {}, {}
    for split, rows in plan.index.items():
        failed = np.array([row for name, row in failures if name == split], np.int64)
        index = np.setdiff1d(rows, failed)
        skipped = np.union1d(plan.skipped[split], failed) if skip_unreadable else plan.skipped[split]
        all_skipped[split] = skipped.tolist()
        source = dataset.splits[split]
        files = np.array([records[split, row] for row in index.tolist()], FILE)
        contents[split] = SplitContent(
            SplitRows(index, source.labels[index], files),
            [source.paths[row] for row in index],
            _blocks(plan, split, index, store, path),
        )
    meta = StoreMeta.of(
        backbone,
        dataset,
        recipe=plan.settings.recipe,
        view_seed=plan.settings.view_seed,
        views=plan.settings.views,
        dtype=plan.settings.dtype,
        skipped=all_skipped,
        compute_dtype=dtype_name(backbone),
    )
    write_store(path, meta, contents)
    return failures


def _blocks(
    plan: EncodingPlan, split: str, index: np.ndarray, store: FeatureStore | None, path: Path
) -> Iterator[Block]:
    """Yield the features of a split's ``index``, first those of the present store."""
    if store is not None and split in store.splits:
        old = store.indices(split)
        for start in range(0, len(old), ROWS_AT_ONCE):
            rows = old[start : start + ROWS_AT_ONCE]
            features = store.raw(split, slice(start, start + ROWS_AT_ONCE))
            keep = np.isin(rows, index)
            yield np.searchsorted(index, rows[keep]), slice(0, features.shape[1]), features[keep]
    for chunk in plan.chunks:
        if chunk.split == split:
            keep = np.isin(chunk.rows, index)
            views = slice(chunk.views.start, chunk.views.stop)
            yield np.searchsorted(index, np.array(chunk.rows)[keep]), views, _read(path, chunk).features[keep]


def _read(store: Path, chunk: Chunk) -> Encoded:
    encoded = read_chunk(store, chunk)
    if encoded is None:
        raise UserError(
            f"A part of {store} was removed while the store was being made; run the command again."
        )
    return encoded


def _warn_of_changes(dataset: Dataset, store: FeatureStore | None, plan: EncodingPlan) -> None:
    changed = store.compared.changed if store is not None else {}
    count = sum(int(np.isin(indices, plan.index[split]).sum()) for split, indices in changed.items())
    if count:
        log.warning(
            f"{count} image file(s) of {dataset.name} have changed since they were encoded; encoding them again."
        )


def _report(dataset: Dataset, failures: Failures, skip_unreadable: bool) -> None:
    """Name the images that could not be read, in a warning or an error."""
    if not failures:
        return
    listed = [
        f"\n  {dataset.root / dataset.splits[split].paths[row]}: {reason}"
        for (split, row), reason in list(failures.items())[:LISTED]
    ]
    if len(failures) > LISTED:
        listed.append(f"\n  and {len(failures) - LISTED} more")
    count = f"{len(failures)} image(s) of {dataset.name} could not be read"
    if not skip_unreadable:
        raise UnreadableImages(
            f"{count}; the others are stored. Repair these, or leave them out with --skip-unreadable "
            f"(skip_unreadable=True in Python):{''.join(listed)}"
        )
    log.warning(f"{count} and were left out:{''.join(listed)}")


def _check_coverage(
    dataset: Dataset, store: FeatureStore, shots: Sequence[int | str], seeds: Sequence[int]
) -> None:
    """Refuse a store without test images; warn of subsets without a readable image of some class."""
    if not len(store.indices("test")):
        raise UnreadableImages(
            f"None of the test images of {dataset.name} could be read, so no accuracy can be measured on it."
        )
    skipped = store.meta.skipped.get("train", ())
    for number, seed in ((number, seed) for number in shots for seed in seeds if skipped):
        drawn = few_shot(dataset, number, seed).train
        left = set(dataset.splits["train"].labels[drawn[~np.isin(drawn, skipped)]].tolist())
        absent = [name for label, name in enumerate(dataset.class_names) if label not in left]
        if absent:
            warn_once(
                f"{dataset.name}: none of the training images of {abbreviate(absent)} that {number} shots and seed "
                f"{seed} draw could be read; runs on them do not learn that class."
            )
