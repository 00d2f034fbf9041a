"""Half of a dataset's classes reads the store of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastcoop.backbones import backbone_from_spec
from fastcoop.datasets import few_shot, load_dataset
from fastcoop.features import FeatureStore, cache_features, find_dataset, import_features, store_path
from tests.small_world import write_backbone, write_dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("halves")
    write_dataset(root / "data" / "colours")
    (root / "data" / "colours" / "test" / "sky blue" / "1.png").write_bytes(b"no picture")
    write_backbone(root / "tiny")
    return root


def test_a_half_s_features_are_the_whole_s(place: Path) -> None:
    backbone = backbone_from_spec(str(place / "tiny"))
    whole = load_dataset("colours", place / "data")
    new = load_dataset("colours:new", place / "data")  # grey and sky blue
    path = cache_features(backbone, new, place / "cache", shots=[2], seeds=[1], views=1, skip_unreadable=True)
    assert path == store_path(place / "cache", backbone, whole)
    stores = [FeatureStore.open(path, backbone, dataset) for dataset in (whole, new)]
    assert stores[1].meta.class_names == ("grey", "sky blue")
    assert len({store.digest for store in stores}) == 2
    paths = [dict(zip(store.paths("test"), store.indices("test"), strict=True)) for store in stores]
    inside = [name for name in paths[0] if "grey" in name or "sky blue" in name]
    assert list(paths[1]) == inside
    assert len(inside) == 9  # one of ten could not be read
    features, labels = zip(*(store.split("test") for store in stores), strict=True)
    rows = [list(paths[0]).index(name) for name in inside]
    assert torch.equal(features[0][rows], features[1])
    assert torch.equal(labels[0][rows] - 2, labels[1])
    assert np.array_equal(stores[1].raw("test", slice(0, 3))[:, 0], features[1][:3].half().numpy())
    drawn, within = few_shot(whole, 2, 1).train, few_shot(new, 2, 1).train
    kept = drawn[whole.splits["train"].labels[drawn] >= 2]
    assert torch.equal(stores[0].train(kept), stores[1].train(within))
    assert torch.equal(stores[0].train_labels(kept) - 2, stores[1].train_labels(within))


def test_imported_features_have_halves_too(place: Path) -> None:
    backbone = backbone_from_spec(str(place / "tiny"))
    rng, labels = np.random.default_rng(0), np.arange(8) // 2
    np.savez(
        place / "test.npz", features=rng.normal(size=(8, 16)).astype(np.float32), labels=labels, names=list("abcd")
    )  # fmt: skip
    path = import_features({"test": place / "test.npz"}, place / "imported", backbone, name="letters")
    base = find_dataset(f"{path}:base")
    assert (base.name, base.class_names) == ("letters:base", ("a", "b"))
    store = FeatureStore.open(store_path("elsewhere", backbone, base), backbone, base)
    assert store.split("test")[1].tolist() == [0, 0, 1, 1]
