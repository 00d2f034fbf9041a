"""``cache_features``: compare a store with the images asked for, encode those it lacks, and write it again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.checks import MOST_VIEWS, one_of, several, whole_number
from fastcoop.datasets import Dataset, few_shot
from fastcoop.datasets.dataset import warn_once
from fastcoop.errors import UserError, abbreviate, writing
from fastcoop.features import encode
from fastcoop.features.encode import Encoded
from fastcoop.features.image_files import unknown_files
from fastcoop.features.images import RECIPES
from fastcoop.features.plan import Chunk, Encoding, EncodingPlan, plan_encoding, view_counts
from fastcoop.features.store import FeatureStore, find_dataset, open_if_there, store_path
from fastcoop.features.store_file import DTYPES, KINDS, ROWS_AT_ONCE, Block, SplitContent, write_store
from fastcoop.files import lock
from fastcoop.progress import counted

LISTED = 50  # unreadable images named in one message

log = logging.getLogger("fastcoop")

Wanted = tuple[str | Path | Dataset, Sequence[int | str], Sequence[int]]  # a dataset, shots and seeds
Failures = dict[tuple[str, int], str]  # (split, index) -> why the image could not be read


class UnreadableImages(UserError):
    """Some images could not be decoded; everything else is stored."""


def cache_all(
    backbones: Iterable[str | Path | Backbone],
    wanted: Sequence[Wanted],
    cache_root: str | Path,
    **options: Any,
) -> Iterator[Path]:
    """Call `cache_features` with ``options`` for each backbone and dataset, yielding each store's path as it is
    done. Errors are as there; unreadable images are reported when all the rest is stored."""
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
    kinds: Sequence[str] = ("coop",),
    recipe: str = "current",
    dtype: str = "float16",
    precision: str | None = None,
    view_seed: int = 0,
    skip_unreadable: bool = False,
    retry_skipped: bool = True,
) -> Path:
    """Make sure that a store holds the images that runs with these shots and seeds use, and return its path.

    The store holds the training images in the few-shot subsets of ``shots`` x ``seeds``, each with view 0 (the
    test-time crop) and the augmented views of ``kinds``, and all validation and test images with view 0. Features of an
    existing store are kept unless the image file has changed; only missing ones are computed. If the process is
    killed, the next call continues where it stopped and ends with the same contents. A second process on the same
    store waits; if everything is there already, nothing is written, and the store may be in a read-only folder.

    Args:
        backbone: Backbone to encode with, as `backbone_from_spec` takes it.
        dataset: Dataset to encode, as `find_dataset` takes it. Of half of a dataset's classes, the whole is stored.
        cache_root: Folder of feature stores.
        shots: Images per class, or "all".
        seeds: Seeds of the few-shot subsets.
        views: Augmented views per training image, of each kind.
        kinds: Kinds of training features: "coop" (CoOp's random crops), "tip" (Tip-Adapter's, which keep at least half
            of the area), "flip" (the test-time crop, mirrored), "pre" (features before the image tower's projection, of
            the test-time crop and of Tip-Adapter's crops, and of validation and test images). Those that a store has
            stay.
        recipe: "current" or "official-2021", the image preprocessing of every view.
        dtype: "float16" or "float32"; an existing float32 store stays one.
        precision: Of the image tower's products: "float32", "tf32" (on a GPU) or "bfloat16". A store has one
            precision. None: that of the existing store, or float32. For the others the difference from float32 is
            measured on the first images, recorded and logged.
        view_seed: Seed of the augmentations.
        skip_unreadable: Leave out images that cannot be decoded, with a warning, instead of raising at the end.
        retry_skipped: Try images again that were left out earlier; ignored with ``skip_unreadable``.

    Raises:
        UserError: An unknown kind, recipe, dtype or precision, an image tower without a projection for "pre", TF32 on a
            CPU, a store made with other weights, images or settings, a disk that cannot be written; and, after
            everything else is stored, images that could not be decoded (``UnreadableImages``), or no test image.
    """
    one_of(recipe, "recipe", RECIPES)
    one_of(dtype, "dtype of features", DTYPES)
    one_of(precision or "float32", "precision of products", encode.PRECISIONS)
    for kind in (kinds := several(kinds)):
        one_of(kind, "kind of features", KINDS)
    view_seed = whole_number(view_seed, "view_seed")
    counts = view_counts(kinds, whole_number(views, "views", 0, MOST_VIEWS))
    draws = list(product(several(shots), several(seeds)))
    backbone, dataset = backbone_from_spec(backbone), find_dataset(dataset)
    dataset = dataset.whole or dataset
    path = store_path(cache_root, backbone, dataset)
    if dataset.store is not None:  # imported features are complete
        FeatureStore.open(path, backbone, dataset)
        return path
    encoding = Encoding(backbone, dataset, recipe, view_seed, dtype=dtype, precision=precision, **counts)
    _ = encoding.before_dim  # refuses a tower without a projection before anything is written
    subsets = [few_shot(dataset, *draw).train for draw in draws] if "train" in dataset.splits else []
    failures: Failures = {}

    def make_plan() -> EncodingPlan:
        store = open_if_there(path, backbone, dataset, only_unchanged=True)
        return plan_encoding(encoding, subsets, store, skip_unreadable or not retry_skipped)

    with writing(path):
        plan = make_plan()
        if plan.chunks or encode.chunks_folder(path).exists():
            with store_lock(path):
                plan = make_plan()
                if plan.chunks:
                    if plan.encoding.precision == "tf32" and not plan.encoding.on_gpu:
                        raise UserError(
                            f"Features of {path} are in tf32, which takes a GPU. On a CPU use float32, and for a store "
                            "in tf32 another cache folder."
                        )
                    _warn_of_changes(plan)
                    encode.encode_missing(plan.encoding, plan.chunks, path)
                    failures = assemble(plan, path, skip_unreadable)
                shutil.rmtree(encode.chunks_folder(path), ignore_errors=True)
        elif plan.store is not None and plan.store.has_new_times:
            # New times of unchanged files are recorded where possible: the next call need not hash them again.
            with suppress(OSError), lock(_lock_path(path), timeout_s=0):
                plan = make_plan()
                if not plan.chunks:
                    assemble(plan, path, skip_unreadable)
    _report(dataset, failures, skip_unreadable)
    if left := sum(map(len, plan.skipped.values())):
        log.warning(
            f"Still left out of {dataset.name}: {counted(left, 'image')} that could not be read earlier; to try "
            "again, run `fastcoop cache-features` without --skip-unreadable."
        )
    _check_coverage(dataset, FeatureStore.open(path), draws, subsets)
    return path


def _lock_path(store: Path) -> Path:
    return store.with_name(f"{store.name}.lock")


@contextmanager
def store_lock(path: Path) -> Iterator[None]:
    """Hold a store's lock; wait, with a warning, while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(_lock_path(path), timeout_s=0))
        except TimeoutError:
            log.warning(f"Another process is working on {path}; waiting for it.")
            stack.enter_context(lock(_lock_path(path)))
        yield


def assemble(plan: EncodingPlan, path: Path, skip_unreadable: bool) -> Failures:
    """Write the store of ``plan`` from its chunks and the present store, and return the images not read: they are
    left out, which the store records with ``skip_unreadable``. An existing store stays as it is if no image of the
    plan could be read and none is to be recorded."""
    failures, contents, skipped = Failures(), {}, {}
    for split, rows in plan.index.items():
        files, readable = unknown_files(len(rows)), np.ones(len(rows), bool)
        if plan.store is not None and split in plan.store.splits:
            files[np.searchsorted(rows, plan.store.indices(split))] = plan.store.files(split)
        for chunk in plan.chunks_of(split):
            encoded, at = _read(path, plan, chunk), np.searchsorted(rows, chunk.rows)
            failures |= {(split, row): problem for row, problem in encoded.failures(chunk).items()}
            readable[at] &= encoded.problems == ""
            if chunk.is_new:  # further views do not determine which bytes view 0 was made of
                files[at] = encoded.files
        unread = rows[~readable] if skip_unreadable else rows[:0]
        skipped[split] = np.union1d(plan.skipped[split], unread).tolist()
        index = rows[readable]
        contents[split] = SplitContent(index, files[readable], _blocks(plan, split, index, path))
    planned = {(chunk.split, row) for chunk in plan.chunks for row in chunk.rows}
    if plan.store is None or not planned or failures.keys() != planned or skip_unreadable:
        meta = plan.encoding.meta(skipped, _measured_difference(plan))
        write_store(path, meta, plan.encoding.dataset.splits, contents)
    return failures


def _measured_difference(plan: EncodingPlan) -> float | None:
    """Return, and log, how far features in the plan's precision are from float32; measured for a new store."""
    precision = plan.encoding.precision or "float32"
    if precision == "float32":
        return None
    known = plan.store.meta.precision_difference if plan.store is not None else None
    largest = encode.precision_difference(plan.encoding, plan.chunks[0]) if known is None else known
    if plan.chunks:
        log.warning(f"{plan.encoding.dataset.name}: {encode.precision_note(precision, largest)}")
    return largest


def _blocks(plan: EncodingPlan, split: str, index: np.ndarray, path: Path) -> Iterator[Block]:
    """Yield the features of a split's ``index``: from the present store, then from the chunks."""

    def block(array: str, rows: np.ndarray, first: int, features: np.ndarray) -> Block:
        keep, views = np.isin(rows, index), slice(first, first + features.shape[1])
        return array, np.searchsorted(index, rows[keep]), views, features[keep]

    if plan.store is not None and split in plan.store.splits:
        old = plan.store.indices(split)
        for array in plan.store.meta.arrays(split):
            for start in range(0, len(old), ROWS_AT_ONCE):
                features = plan.store.raw(split, slice(start, start + ROWS_AT_ONCE), array=array)
                yield block(array, old[start : start + ROWS_AT_ONCE], 0, features)
    for chunk in plan.chunks_of(split):
        encoded = _read(path, plan, chunk)
        for array, (stored, _) in chunk.adds.items():  # views that the store holds are kept
            yield block(array, np.array(chunk.rows), stored, encoded.of(chunk, array))


def _read(store: Path, plan: EncodingPlan, chunk: Chunk) -> Encoded:
    if (encoded := encode.read_chunk(store, plan.encoding, chunk)) is None:
        raise UserError(
            f"A part of {store} was removed while the store was being made; run the command again."
        )
    return encoded


def _warn_of_changes(plan: EncodingPlan) -> None:
    changed = plan.store.changed if plan.store is not None else {}
    if count := sum(int(np.isin(indices, plan.index[split]).sum()) for split, indices in changed.items()):
        images, name = counted(count, "image file"), plan.encoding.dataset.name
        log.warning(f"{images} of {name} changed since the last encoding; encoding again.")


def _report(dataset: Dataset, failures: Failures, skip_unreadable: bool) -> None:
    """Name the images that could not be read, in a warning or an error."""
    if not failures:
        return
    reasons = [f"\n  {dataset.files(split, [row])[0]}: {reason}" for (split, row), reason in failures.items()]
    more = f"\n  and {len(reasons) - LISTED} more" if len(reasons) > LISTED else ""
    listed = "".join(reasons[:LISTED]) + more
    count = f"{counted(len(failures), 'image')} of {dataset.name} could not be read"
    if not skip_unreadable:
        raise UnreadableImages(
            f"{count}; the others are stored. Repair these, or leave them out with --skip-unreadable "
            f"(skip_unreadable=True in Python):{listed}"
        )
    log.warning(f"{count} and were left out:{listed}")


def _check_coverage(
    dataset: Dataset,
    store: FeatureStore,
    draws: Iterable[tuple[int | str, int]],
    subsets: Iterable[np.ndarray],
) -> None:
    """Refuse a store without test images; warn of subsets without a readable image of some class."""
    if not len(store.indices("test")):
        raise UnreadableImages(
            f"None of the test images of {dataset.name} could be read, so no accuracy can be measured on it."
        )
    skipped = store.skipped("train")
    for (number, seed), drawn in zip(draws, subsets, strict=False) if len(skipped) else ():
        left = set(dataset.splits["train"].labels[drawn[~np.isin(drawn, skipped)]].tolist())
        if absent := [name for label, name in enumerate(dataset.class_names) if label not in left]:
            warn_once(
                f"{dataset.name}: none of the training images of {abbreviate(absent)} that {number} shots and seed "
                f"{seed} draw could be read; runs on them do not learn that class."
            )
