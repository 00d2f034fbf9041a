"""``cache_features``: encode what is missing of a dataset, in pieces that survive being killed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, few_shot
from fastcoop.errors import UserError, nearest
from fastcoop.features.assemble import Failures, assemble
from fastcoop.features.encode import encode_parts
from fastcoop.features.images import RECIPES
from fastcoop.features.parts import discard_parts
from fastcoop.features.plan import Settings, make_plan
from fastcoop.features.store import FeatureStore, store_path

LISTED = 50  # unreadable images named in one message

Wanted = tuple[Dataset, Sequence[int | str], Sequence[int]]  # a dataset with the shots and seeds to cache for


class UnreadableImages(UserError):
    """Some images could not be decoded; everything else is stored."""


def cache_all(
    backbones: Iterable[Backbone],
    wanted: Sequence[Wanted],
    cache_root: str | Path,
    *,
    views: int = 8,
    recipe: str = "current",
    dtype: str = "float16",
    skip_unreadable: bool = False,
    retry_skipped: bool = True,
) -> Iterator[Path]:
    """``cache_features`` for each backbone and dataset in turn, yielding each store's path as it is done.

    Raises UserError as ``cache_features`` does; for unreadable images only when all the rest is stored.
    """
    unreadable = []
    for backbone in backbones:
        for dataset, shots, seeds in wanted:
            try:
                yield cache_features(
                    backbone, dataset, cache_root, shots=shots, seeds=seeds, views=views, recipe=recipe,
                    dtype=dtype, skip_unreadable=skip_unreadable, retry_skipped=retry_skipped,
                )  # fmt: skip
            except UnreadableImages as error:
                unreadable.append(str(error))
    if unreadable:
        raise UnreadableImages("\n".join(unreadable))


def cache_features(
    backbone: Backbone,
    dataset: Dataset,
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
    """Make sure the store holds what runs with these shots and seeds can draw, and return its path.

    Stored are the training images in the few-shot subsets of ``shots`` x ``seeds``, each with view 0 (the
    test-time crop) and ``views`` augmented views, and all of the validation and test images with view 0. What
    an existing store holds is kept; only what is missing is computed. Killed at any instant, the next call
    goes on where the last one was and ends with the same contents. A second process on the same store waits.

    Args:
        dataset: where it is half of another's classes, that one's images are stored, all of them.
        shots: images per class, or "all".
        recipe: "current" or "official-2021", for every view.
        dtype: "float16" or "float32"; a store that is float32 already stays so.
        batch_size: crops encoded at once.
        view_seed: of the augmentations.
        skip_unreadable: leave images out that cannot be decoded, and say so, instead of raising at the end.
        retry_skipped: try those again that were left out earlier; never done with ``skip_unreadable``.

    Raises:
        UserError: unknown recipe or dtype; a store made with other weights, images or settings; a disk that
            cannot be written; and, after everything else is stored, images that could not be decoded
            (``UnreadableImages``).
    """
    if recipe not in RECIPES:
        raise UserError(f'There is no recipe "{recipe}".{nearest(recipe, RECIPES)}')
    if dtype not in ("float16", "float32"):
        raise UserError(f'Features are stored as float16 or float32, not "{dtype}".')
    if views < 0:
        raise UserError(f"views must be 0 or more, got {views}.")
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}.")
    dataset = dataset.whole or dataset
    path = store_path(cache_root, backbone, dataset)
    if dataset.store is not None:
        FeatureStore.open(path, backbone, dataset)  # it holds all there is
        return path
    wanted = _wanted(dataset, shots, seeds)
    failures: Failures = {}
    with disk_errors(path), _locked(path):
        store = FeatureStore.open(path, backbone, dataset) if path.exists() else None
        settings = Settings(recipe, view_seed, views, dtype, batch_size)
        plan = make_plan(backbone, dataset, wanted, settings, store, skip_unreadable or not retry_skipped)
        if plan.parts:
            encode_parts(backbone, dataset, plan, path)
            failures = assemble(backbone, dataset, plan, store, path, skip_unreadable)
        discard_parts(path)
    _report(dataset, failures, skip_unreadable)
    return path


def _wanted(dataset: Dataset, shots: Sequence[int | str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """For each split of the dataset the ascending indices to store."""
    wanted = {split: np.arange(len(images)) for split, images in dataset.splits.items()}
    if "train" in wanted:
        drawn = [few_shot(dataset, number, seed).train for number in shots for seed in seeds]
        wanted["train"] = np.unique(np.concatenate([np.zeros(0, np.int64), *drawn]))
    return wanted


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the store's lock, which the system frees if the process dies; wait for another process's work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger("fastcoop").warning(f"Another process is working on {path}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or missing disk raises while ``path`` is made into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); free space or choose another cache "
            "folder, and run again: what was finished is kept."
        ) from error


def _report(dataset: Dataset, failures: Failures, skip_unreadable: bool) -> None:
    if not failures:
        return
    listed = [
        f"\n  {dataset.root / dataset.splits[split].paths[row]}: {reason}"
        for (split, row), reason in list(failures.items())[:LISTED]
    ]
    more = f"\n  and {len(failures) - LISTED} more" if len(failures) > LISTED else ""
    count = f"{len(failures)} image(s) of {dataset.name} could not be read"
    if skip_unreadable:
        logging.getLogger("fastcoop").warning(f"{count} and were left out:{''.join(listed)}{more}")
        return
    raise UnreadableImages(
        f"{count}; the others are stored. Repair or remove these, or pass --skip-unreadable:"
        f"{''.join(listed)}{more}"
    )
