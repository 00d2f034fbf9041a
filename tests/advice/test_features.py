"""Advice of the features package, followed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, check_store, encode, import_features
from tests.advice import follows
from tests.features.small import make_backbone, make_folder

ASK: dict[str, Any] = {"shots": [1], "seeds": [1], "views": 0}


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_folder(tmp_path / "animals")


@follows("There is no feature store {}; make it with `fastcoop cache-features`")
def test_a_store_that_is_not_there(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tiny" / "animals.h5"
    with pytest.raises(FileNotFoundError, match="make it with `fastcoop cache-features`"):
        FeatureStore.open(path)
    assert cache_features(backbone, dataset, tmp_path / "cache", **ASK) == path
    FeatureStore.open(path)


@follows("run `fastcoop cache-features` for them first")
def test_images_that_are_not_cached(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    path = cache_features(backbone, dataset, tmp_path, **ASK)
    with pytest.raises(UserError, match="run `fastcoop cache-features` for them first"):
        FeatureStore.open(path).train(range(18))
    cache_features(backbone, dataset, tmp_path, **ASK | {"shots": ["all"]})
    assert len(FeatureStore.open(path).train(range(18))) == 18


@follows("was removed while the store was being made; run the command again")
def test_parts_that_were_removed(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = encode.encode_missing

    def encode_and_remove(*arguments: Any) -> None:
        original(*arguments)
        shutil.rmtree(tmp_path / "tiny" / "animals.h5.parts")

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_missing", encode_and_remove)
        with pytest.raises(UserError, match="run the command again"):
            cache_features(backbone, dataset, tmp_path, **ASK)
    cache_features(backbone, dataset, tmp_path, **ASK)


@follows("The store lacks {}; run `fastcoop cache-features` again")
def test_test_images_that_are_missing(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    picture = dataset.root / "test" / "cat" / "0.png"
    content = picture.read_bytes()
    picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match="could not be read"):
        cache_features(backbone, dataset, tmp_path, **ASK)
    path = tmp_path / "tiny" / "animals.h5"
    assert check_store(path).problems == [
        "The store lacks 1 test image; run `fastcoop cache-features` again."
    ]
    picture.write_bytes(content)
    cache_features(backbone, dataset, tmp_path, **ASK)
    assert check_store(path).ok


@follows(
    "and {} was asked for; use another cache folder or move the file away",
    "({}) was asked for; use another cache folder or move the file away",
)
@pytest.mark.parametrize("how", ["move the file away", "use another cache folder"])
@pytest.mark.parametrize("what", ["dtype", "recipe", "view seed", "weights", "images"])
def test_a_store_made_with_other_settings(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, what: str, how: str
) -> None:
    path = cache_features(backbone, dataset, tmp_path / "cache", **ASK)
    ask: dict[str, Any] = {
        "dtype": {"dtype": "float32"}, "recipe": {"recipe": "official-2021"}, "view seed": {"view_seed": 1},
    }.get(what, {})  # fmt: skip
    if what == "weights":
        backbone = make_backbone(1)
    if what == "images":
        dataset = make_folder(tmp_path / "more" / "animals", test=4)
    with pytest.raises(UserError, match="use another cache folder or move the file away"):
        cache_features(backbone, dataset, tmp_path / "cache", **ASK | ask)
    place = tmp_path / "another" if how == "use another cache folder" else tmp_path / "cache"
    if how == "move the file away":
        path.rename(tmp_path / "away.h5")
    cache_features(backbone, dataset, place, **ASK | ask)


@follows("update fastcoop, or use another cache folder")
@pytest.mark.parametrize("how", ["update", "another cache folder"])
def test_a_store_of_a_newer_version(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = cache_features(backbone, dataset, tmp_path, **ASK)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(UserError, match="update fastcoop, or use another cache folder"):
        cache_features(backbone, dataset, tmp_path, **ASK)
    if how == "update":
        monkeypatch.setattr("fastcoop.features.store_file.FORMAT_VERSION", 99)
    cache_features(backbone, dataset, tmp_path if how == "update" else tmp_path / "another", **ASK)


@follows("so it cannot stand for its dataset; name the dataset {} itself")
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_store_that_leaves_images_out(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, split: str
) -> None:
    from fastcoop.features import find_dataset

    if split == "test":
        (dataset.root / "test" / "cat" / "0.png").write_bytes(b"no picture")
    shots = ["all"] if split == "test" else [1]
    path = cache_features(backbone, dataset, tmp_path, **ASK | {"shots": shots}, skip_unreadable=True)
    with pytest.raises(UserError, match=f"of .* {split} images.*; name the dataset animals itself"):
        find_dataset(path)
    assert find_dataset("animals", dataset.root.parent).digest == dataset.digest


@follows("makes infinite or all zeros; scale them, or use --dtype float32")
def test_imported_features_that_cannot_be_stored(backbone: Backbone, tmp_path: Path) -> None:
    def write(features: np.ndarray) -> None:
        np.savez(tmp_path / "x.npz", features=features, labels=[0, 1], names=["cat", "dog"])

    def bring(name: str, **options: Any) -> Callable[[], Path]:
        return lambda: import_features({"test": tmp_path / "x.npz"}, tmp_path, backbone, name=name, **options)

    features = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).numpy()
    write(features * 1e6)
    with pytest.raises(UserError, match="scale them, or use --dtype float32"):
        bring("a")()
    bring("b", dtype="float32")()
    write(features)
    bring("c")()
    write(features * np.nan)
    with pytest.raises(UserError, match="compute them again"):
        bring("d")()
    write(features)
    bring("d")()
