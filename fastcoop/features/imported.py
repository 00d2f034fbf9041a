"""Features computed elsewhere, imported as a store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.checks import one_of
from fastcoop.datasets import Split
from fastcoop.datasets.dataset import SPLITS, check_name_and_template, make_dataset
from fastcoop.datasets.notes import OVERLAPS, notes_on_classes
from fastcoop.errors import MissingFile, UserError, writing
from fastcoop.features.cache import store_lock
from fastcoop.features.image_files import unknown_files
from fastcoop.features.plan import Encoding
from fastcoop.features.store import FeatureStore, store_path
from fastcoop.features.store_file import DTYPES, FEATURES, IMPORTED, SplitContent, unusable_rows, write_store
from fastcoop.progress import counted

KEYS = ("features", "labels", "names")

log = logging.getLogger("fastcoop")


def import_features(
    sources: Mapping[str, str | Path],
    cache_root: str | Path,
    backbone: str | Path | Backbone,
    *,
    name: str,
    template: str = "a photo of a {}.",
    dtype: str = "float16",
) -> Path:
    """Make the store of a dataset from files of features, and return its path.

    ``FeatureStore.open(path).as_dataset()`` is the dataset that belongs to it.

    Args:
        sources: Split ("train", "val", "test"; "test" is needed) -> a ``.npz`` or ``.pt`` of ``features``, floating
            (n, dim) or (n, views, dim) with the test-time crop first, raw as ``backbone`` gives them; ``labels``,
            integer (n,); ``names``, the class names in label order, the same in every file. Of "val" and "test"
            the first view is stored.
        cache_root: Folder of feature stores.
        backbone: Backbone that computed the features, as `backbone_from_spec` takes it.
        name: Name of the dataset.
        template: Hand-written prompt with one ``{}`` for the class name.
        dtype: "float16" or "float32".

    Raises:
        UserError: Files of other contents, a name that cannot name a file, a template without one ``{}``, or a store
            of that name that exists already.
    """
    check_name_and_template(name, template)
    one_of(dtype, "dtype of features", DTYPES)
    backbone = backbone_from_spec(backbone, device="cpu")
    for split in sources:
        one_of(split, "split", SPLITS)
    if "test" not in sources:
        raise UserError(f"Expected features of the test split, got {' and '.join(sources) or 'no file'}.")
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
    dataset = make_dataset(name, Path(cache_root), first.names, template, splits)
    _warn_of_shared_images(name, files)
    if all(np.allclose(np.linalg.norm(file.features, axis=2), 1, atol=1e-2) for file in files.values()):
        log.warning(
            f"All features of {name} have length 1; import them as the backbone gives them, unless it scales them "
            "itself: linear_probe learns otherwise from scaled ones, and tip_adapter where images have several views."
        )
    for note in notes_on_classes(name, first.names, splits, "in the files"):
        log.warning(note)
    contents = {}
    for split in dataset.splits:
        features = files[split].features.astype(dtype)
        rows = np.arange(len(features))
        block = (FEATURES, rows, slice(0, features.shape[1]), features)
        contents[split] = SplitContent(rows, unknown_files(len(rows)), [block])
    views = files["train"].features.shape[1] - 1 if "train" in files else 0
    path = store_path(cache_root, backbone, dataset)
    with writing(path), store_lock(path):
        if path.exists():
            raise UserError(f"{path} exists already; move it away or choose another name.")
        encoding = Encoding(backbone, dataset, IMPORTED, views=views, dtype=dtype)
        write_store(path, encoding.meta({}), dataset.splits, contents)
    FeatureStore.open(path, backbone, dataset)
    return path


class _File(NamedTuple):
    path: Path
    features: np.ndarray  # (n, views, dim)
    labels: np.ndarray
    names: tuple[str, ...]


def _warn_of_shared_images(name: str, files: Mapping[str, _File]) -> None:
    """Warn where two splits hold the same features, and so the same images."""
    rows = {split: {row.tobytes() for row in file.features[:, 0]} for split, file in files.items()}
    for (first, second), effect in OVERLAPS.items():
        if shared := len(rows.get(first, set()) & rows.get(second, set())):
            images = f"{counted(shared, 'image')} of equal features"
            log.warning(f"{name} has {images} in {first} and {second}: {effect}.")


def _read(path: Path, split: str, dtype: str) -> _File:
    content = _load(path)
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise UserError(f"{path} should hold {', '.join(KEYS)}; it lacks {', '.join(missing)}.")
    features, labels, names = (content[key] for key in KEYS)
    features = features[:, None] if features.ndim == 2 else features

    def expected(what: str, found: np.ndarray) -> UserError:
        return UserError(f"{path} should hold {what}, not {found.dtype} {found.shape}.")

    if features.ndim != 3 or not np.issubdtype(features.dtype, np.floating) or not features.shape[1]:
        raise expected("floating features (n, dim) or (n, views, dim)", features)
    if names.ndim != 1 or names.dtype.kind != "U" or not all(name.strip() for name in names):
        raise expected("a list of class names", names)
    if labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise expected(f"one integer label for each of its {len(features)} features", labels)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(f"{path} has labels from {labels.min()} to {labels.max()} for {len(names)} names.")
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
        if unusable_rows(features.astype(dtype)).any():
            raise UserError(
                f"{path} holds features that {dtype} makes infinite or all zeros; scale them, or use --dtype float32."
            )
    features = features if split == "train" else features[:, :1]
    return _File(path, features, labels.astype(np.int64), tuple(names.tolist()))


def _load(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file, without running anything that it contains."""
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
    except Exception as error:  # of any type; torch's messages tell how to run what a file contains
        reason = isinstance(error, OSError) and error.strerror
        raise UserError(
            f"{path} was not loaded: {reason or 'it is damaged, or holds other things than plain arrays'}."
        ) from error
    raise UserError(f"{path} should be a .npz, or a .pt of a dictionary, with {', '.join(KEYS)}.")


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    return (value.float() if value.is_floating_point() else value).detach().numpy()
