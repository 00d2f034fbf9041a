"""``cache_features``: encode what is missing of a dataset, in pieces that survive being killed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.checks import LARGEST_BATCH, MOST_VIEWS, several, whole_number
from fastcoop.datasets import Dataset, few_shot
from fastcoop.datasets.dataset import warn_once
from fastcoop.datasets.files import some
from fastcoop.errors import UserError, nearest, writing
from fastcoop.features.assemble import Failures, assemble
from fastcoop.features.encode import encode_parts
from fastcoop.features.images import RECIPES
from fastcoop.features.parts import discard_parts, parts_folder
from fastcoop.features.plan import Plan, Settings, make_plan
from fastcoop.features.store import FeatureStore, open_if_there, store_path
from fastcoop.files import lock

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
    an existing store holds is kept, unless an image file holds other bytes than when it was encoded; only what is
    missing is computed. Killed at any instant, the next call
    goes on where the last one was and ends with the same contents. A second process on the same store waits,
    unless all that it asks for is there: then nothing is written, and the store may lie in a read-only folder.

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
            (``UnreadableImages``), or not one test image that could.
    """
    if recipe not in RECIPES:
        raise UserError(f'There is no recipe "{recipe}".{nearest(recipe, RECIPES)}')
    check_dtype(dtype)
    views = whole_number(views, "views", 0, MOST_VIEWS)
    batch_size = whole_number(batch_size, "batch_size", 1, LARGEST_BATCH)
    view_seed = whole_number(view_seed, "view_seed")
    shots, seeds = several(shots), several(seeds)
    dataset = dataset.whole or dataset
    path = store_path(cache_root, backbone, dataset)
    if dataset.store is not None:
        FeatureStore.open(path, backbone, dataset)  # it holds all there is
        return path
    wanted = _wanted(dataset, shots, seeds)
    failures: Failures = {}
    settings = Settings(recipe, view_seed, views, dtype, batch_size)

    def compared() -> tuple[FeatureStore | None, Plan]:
        store = open_if_there(path, backbone, dataset, only_unchanged=True)
        leave_skipped = skip_unreadable or not retry_skipped
        return store, make_plan(backbone, dataset, wanted, settings, store, leave_skipped)

    with writing(path):
        store, plan = compared()
        if plan.parts or parts_folder(path).exists():
            with locked(path):
                store, plan = compared()
                if plan.parts:
                    _warn_of_changes(dataset, store, plan)
                    encode_parts(backbone, dataset, plan, path)
                    failures = assemble(backbone, dataset, plan, store, path, skip_unreadable)
                discard_parts(path)
        elif store is not None and store.compared.renewed:
            with (
                suppress(OSError),  # TimeoutError included
                lock(path.with_name(f"{path.name}.lock"), timeout_s=0),
            ):  # only saves reading them again
                store, plan = compared()
                if not plan.parts:
                    assemble(backbone, dataset, plan, store, path, skip_unreadable)
    _report(dataset, failures, skip_unreadable)
    _look_at_what_is_left(dataset, FeatureStore.open(path), shots, seeds)
    return path


def open_current(path: Path, backbone: Backbone, dataset: Dataset) -> FeatureStore:
    """Open a store whose features have just been cached.

    Raises UserError if an image file holds other bytes than when it was encoded, or as ``FeatureStore.open`` does.
    """
    store = FeatureStore.open(path, backbone, dataset, only_unchanged=True)
    if store.compared.count:
        raise UserError(
            f"{store.compared.count} image file(s) of {dataset.name} changed while features were computed; run the "
            "same command again."
        )
    return store


def check_dtype(dtype: str) -> None:
    """Refuse what features are not stored as."""
    if dtype not in ("float16", "float32"):
        raise UserError(f'Features are stored as float16 or float32, not "{dtype}".')


def _wanted(dataset: Dataset, shots: Sequence[int | str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """For each split of the dataset the ascending indices to store."""
    wanted = {split: np.arange(len(images)) for split, images in dataset.splits.items()}
    if "train" in wanted:
        drawn = [few_shot(dataset, number, seed).train for number in shots for seed in seeds]
        wanted["train"] = np.unique(np.concatenate([np.zeros(0, np.int64), *drawn]))
    return wanted


def _warn_of_changes(dataset: Dataset, store: FeatureStore | None, plan: Plan) -> None:
    changed = store.compared.changed if store is not None else {}
    count = sum(int(np.isin(indices, plan.index[split]).sum()) for split, indices in changed.items())
    if count:
        logging.getLogger("fastcoop").warning(
            f"{count} image file(s) of {dataset.name} have changed since they were encoded; encoding them again."
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the store's lock, which the system frees if the process dies; wait for another process's work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f"{path.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(lock_path, timeout_s=0))
        except TimeoutError:
            logging.getLogger("fastcoop").warning(f"Another process is working on {path}; waiting for it.")
            stack.enter_context(lock(lock_path))
        yield


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
        f"{count}; the others are stored. Repair these, or leave them out with --skip-unreadable "
        f"(skip_unreadable=True in Python):{''.join(listed)}{more}"
    )


def _look_at_what_is_left(
    dataset: Dataset, store: FeatureStore, shots: Sequence[int | str], seeds: Sequence[int]
) -> None:
    """Refuse a store whose test images were all left out; say where a subset has lost all images of a class."""
    if not len(store.indices("test")):
        raise UnreadableImages(
            f"Not one test image of {dataset.name} could be read, so no accuracy could be measured on it."
        )
    skipped = store.meta.skipped.get("train", ())
    for number, seed in ((number, seed) for number in shots for seed in seeds if skipped):
        drawn = few_shot(dataset, number, seed).train
        left = set(dataset.splits["train"].labels[drawn[~np.isin(drawn, skipped)]].tolist())
        lost = [name for label, name in enumerate(dataset.class_names) if label not in left]
        if lost:
            warn_once(
                f"{dataset.name}: none of the training images of {some(lost)} that {number} shots and seed {seed} "
                "draw could be read; runs on them do not learn that class."
            )
