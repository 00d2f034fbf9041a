"""Features computed elsewhere, taken in as a store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, Split
from fastcoop.datasets.class_names import notes_on_absent_classes, notes_on_names
from fastcoop.datasets.config import check_name_and_template
from fastcoop.datasets.dataset import SPLITS, make_dataset
from fastcoop.errors import MissingFile, UserError, nearest, writing
from fastcoop.features.assemble import package_versions
from fastcoop.features.cache import check_dtype, locked
from fastcoop.features.image_files import ImageFiles
from fastcoop.features.store import FeatureStore, store_path
from fastcoop.features.store_file import IMPORTED, Meta, unusable_rows
from fastcoop.features.write import SplitContent, write_store

log = logging.getLogger("fastcoop")

KEYS = ("features", "labels", "names")


def import_features(
    sources: Mapping[str, str | Path],
    cache_root: str | Path,
    backbone: Backbone,
    *,
    name: str,
    template: str = "a photo of a {}.",
    dtype: str = "float16",
) -> Path:
    """Make the store of dataset ``name`` from files of features, and return its path.

    sources: split ("train", "val", "test"; "test" is needed) -> a ``.npz`` or ``.pt`` of ``features``,
    floating (n, dim) or (n, views, dim) with the test-time crop first, raw as ``backbone`` gives them;
    ``labels``, integer (n,); ``names``, the class names in label order, the same in every file. Val and test
    keep the first view.

    ``FeatureStore.open(path).as_dataset()`` is the dataset to go with it.

    Raises UserError for files that are not so, for a name that cannot name a file or a template without one {},
    or if there is a store of that name already.
    """
    check_name_and_template(name, template)
    check_dtype(dtype)
    unknown = [split for split in sources if split not in SPLITS]
    if unknown:
        raise UserError(f'There is no split "{unknown[0]}".{nearest(unknown[0], SPLITS)}')
    if "test" not in sources:
        raise UserError("Importing features needs those of the test split at least.")
    files = {split: _read(Path(sources[split]), split, dtype) for split in SPLITS if split in sources}
    first = files["test"]
    for file in files.values():
        if file.names != first.names:
            raise UserError(f"{file.path} and {first.path} name different classes.")
        if file.features.shape[2] != backbone.embed_dim:
            raise UserError(
                f"{file.path} holds features of size {file.features.shape[2]}, and {backbone.name} gives "
                f"{backbone.embed_dim}: they cannot be its features."
            )
    splits = {
        split: Split(tuple(f"{split}/{row:07d}" for row in range(len(file.labels))), file.labels)
        for split, file in files.items()
    }
    _warn_of_shared_images(name, files)
    dataset = make_dataset(name, Path(cache_root), first.names, template, splits)
    for note in (
        *notes_on_names(name, first.names, "in the files"),
        *notes_on_absent_classes(name, first.names, splits),
    ):
        log.warning(note)
    path = store_path(cache_root, backbone, dataset)
    _refuse_if_there(path)
    with writing(path), locked(path):
        _refuse_if_there(path)
        write_store(path, _meta(backbone, dataset, files, dtype), _contents(dataset, files, dtype))
    FeatureStore.open(path, backbone, dataset)
    return path


def _warn_of_shared_images(name: str, files: Mapping[str, _File]) -> None:
    """Say where two splits hold the same features, and so the same images."""
    rows = {split: {row.tobytes() for row in file.features[:, 0]} for split, file in files.items()}
    for first, second, what in (
        ("train", "test", "it is tested on what was learned from"),
        ("train", "val", "what is chosen on the validation images is chosen on what was learned from"),
        ("val", "test", "what is chosen on the validation images is chosen on the test set"),
    ):
        shared = len(rows.get(first, set()) & rows.get(second, set()))
        if shared:
            log.warning(f"{name} has {shared} images of equal features in {first} and {second}: {what}.")


def _refuse_if_there(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already; move it away or choose another name.")


@dataclass(frozen=True, eq=False)
class _File:
    path: Path
    features: np.ndarray  # (n, views, dim)
    labels: np.ndarray
    names: tuple[str, ...]


def _read(path: Path, split: str, dtype: str) -> _File:
    content = _load(path)
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise UserError(f"{path} should hold {', '.join(KEYS)}; it lacks {', '.join(missing)}.")
    features, labels, names = (content[key] for key in KEYS)
    features = features[:, None] if features.ndim == 2 else features
    if features.ndim != 3 or not np.issubdtype(features.dtype, np.floating) or not features.shape[1]:
        raise UserError(
            f"{path} should hold floating features (n, dim) or (n, views, dim), "
            f"not {features.dtype} {features.shape}."
        )
    if names.ndim != 1 or names.dtype.kind != "U" or not all(name.strip() for name in names):
        raise UserError(f"{path} should hold a list of class names, not {names.dtype} {names.shape}.")
    if labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path} should hold one integer label for each of its {len(features)} features, "
            f"not {labels.dtype} {labels.shape}."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(f"{path} has labels from {labels.min()} to {labels.max()} for {len(names)} names.")
    _refuse_unless_storable(path, features, dtype)
    features = features if split == "train" else features[:, :1]
    return _File(path, features, labels.astype(np.int64), tuple(names.tolist()))


def _refuse_unless_storable(path: Path, features: np.ndarray, dtype: str) -> None:
    for what, rows in (
        ("not finite numbers", ~np.isfinite(features).all(axis=(1, 2))),
        ("all zeros", (features == 0).all(axis=2).any(axis=1)),
    ):
        if rows.any():
            raise UserError(
                f"{path} holds {rows.sum()} features that are {what}, the first in row {rows.argmax()}; compute them "
                "again."
            )
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    if unusable_rows(stored).any():
        raise UserError(
            f"{path} holds features that {dtype} makes infinite or all zeros; scale them, or use --dtype float32."
        )


def _load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by means that run nothing it holds."""
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.")
    try:
        if path.suffix == ".npz":
            # NumPy leaves a damaged file open if it opened the file itself.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in KEYS if key in arrays}
        if path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(content, dict):
                return {key: _array(content[key]) for key in KEYS if key in content}
    except (
        Exception
    ) as error:  # a damaged file raises anything, and some messages tell how to run what it holds
        reason = isinstance(error, OSError) and error.strerror
        raise UserError(
            f"{path} was not loaded: {reason or 'it is damaged, or holds other things than plain arrays'}."
        ) from error
    raise UserError(f"{path} should be a .npz, or a .pt of a dictionary, with {', '.join(KEYS)}.")


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    return (value.float() if value.is_floating_point() else value).detach().numpy()


def _meta(backbone: Backbone, dataset: Dataset, files: Mapping[str, _File], dtype: str) -> Meta:
    return Meta(
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        dataset=dataset.name,
        dataset_digest=dataset.digest,
        dim=backbone.embed_dim,
        recipe=IMPORTED,
        view_seed=0,
        views=files["train"].features.shape[1] - 1 if "train" in files else 0,
        dtype=dtype,
        class_names=dataset.class_names,
        template=dataset.template,
        expected={split: len(images) for split, images in dataset.splits.items()},
        skipped={},
        sha256={},
        versions=package_versions(),
    )


def _contents(dataset: Dataset, files: Mapping[str, _File], dtype: str) -> dict[str, SplitContent]:
    contents = {}
    for split, images in dataset.splits.items():
        features = files[split].features.astype(dtype)
        rows = np.arange(len(features))
        blocks = [(rows, slice(0, features.shape[1]), features)]
        contents[split] = SplitContent(
            rows, images.labels, images.paths, features.shape[1], ImageFiles.unknown(len(rows)), blocks
        )
    return contents
