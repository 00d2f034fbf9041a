from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, few_shot, load_dataset
from fastcoop.datasets.dataset import warn_once
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_all, cache_features, check_store, plan, store_path
from fastcoop.features.images import crops, normalize, read_rgb
from tests.advice import follows
from tests.features.small import contents, make_backbone


def reference(backbone: Backbone, dataset: Dataset, split: str, row: int, views: range) -> torch.Tensor:
    """Features of one image's views, one crop at a time."""
    name = dataset.splits[split].paths[row]
    image = read_rgb(dataset.root / name)
    rows = []
    for view in views:
        crop = crops(image, name, [view], backbone.preprocess, "current", 0)
        rows.append(backbone.encode_images(normalize(crop, backbone.preprocess, torch.device("cpu")))[0])
    return torch.stack(rows)


def test_backbones_share_one_draw_of_each_subset(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, sample = [], random.Random.sample
    monkeypatch.setattr(random.Random, "sample", lambda *given: drawn.append(given) or sample(*given))
    backbones, shots, seeds = (backbone, replace(make_backbone(1), name="other")), [1, 2], [1, 2, 3]
    assert len(list(cache_all(backbones, [(dataset, shots, seeds)], tmp_path, views=0))) == 2
    few_shot(dataset, 2, 3)
    assert len(drawn) == len(shots) * len(seeds) * 2 * 3  # training and validation images of three classes


def test_a_store_holds_what_the_shots_and_seeds_draw_and_nothing_more(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int]
) -> None:
    path = cache_features(backbone, dataset, tmp_path / "cache", shots=[1, 2], seeds=[1, 2], views=3)
    assert path == store_path(tmp_path / "cache", backbone, dataset)
    assert sorted(p.name for p in path.parent.iterdir()) == ["animals.h5", "animals.h5.lock"]
    drawn = np.unique(np.concatenate([few_shot(dataset, k, s).train for k in (1, 2) for s in (1, 2)]))
    store = FeatureStore.open(path, backbone, dataset)
    assert np.array_equal(store.indices("train"), drawn)
    assert len(drawn) < len(dataset.splits["train"])
    assert count_encoded() == 4 * len(drawn) + 6 + 9

    subset = few_shot(dataset, 2, 2).train
    features = store.train(subset)
    assert features.shape == (6, 4, 8)
    assert features.dtype == torch.float32
    for at, row in enumerate(subset):
        expected = reference(backbone, dataset, "train", row, range(4))
        assert torch.allclose(features[at], expected, rtol=1e-3, atol=1e-5)
    assert store.train_labels(subset).tolist() == dataset.splits["train"].labels[subset].tolist()
    for split in ("val", "test"):
        features, labels = store.split(split)
        assert labels.tolist() == dataset.splits[split].labels.tolist()
        expected = torch.cat([reference(backbone, dataset, split, i, range(1)) for i in range(len(labels))])
        assert torch.allclose(features, expected, rtol=1e-3, atol=1e-5)
    missing = np.setdiff1d(np.arange(18), drawn)
    with pytest.raises(UserError, match="lacks"):
        store.train(missing[:1])


def test_asking_for_more_adds_only_what_is_missing(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int]
) -> None:
    cache = tmp_path / "cache"
    path = cache_features(backbone, dataset, cache, shots=[1], seeds=[1], views=1)
    first = FeatureStore.open(path)
    before, digest = first.train(first.indices("train")), first.digest
    count_encoded()
    cache_features(backbone, dataset, cache, shots=[1], seeds=[1], views=1)
    assert count_encoded() == 0
    cache_features(backbone, dataset, cache, shots=[1, "all"], seeds=[1], views=1)
    assert count_encoded() == 2 * (18 - 3)
    more = FeatureStore.open(path)
    assert torch.equal(more.train(first.indices("train")), before)
    assert more.digest == digest
    cache_features(backbone, dataset, cache, shots=[1], seeds=[1], views=3)
    assert count_encoded() == 2 * 18
    views = FeatureStore.open(path)
    assert torch.equal(views.train(first.indices("train"))[:, :2], before)
    assert views.digest == digest
    drawn = first.indices("train")
    assert first.train_digest(drawn) == more.train_digest(drawn) == views.train_digest(drawn) is not None
    assert more.train_digest(drawn[::-1]) != more.train_digest(drawn)
    assert first.train_digest(more.indices("train")) is None
    assert torch.equal(first.train(drawn), before)  # of the file that was opened, which is not there any more
    expected = reference(backbone, dataset, "train", 17, range(4))
    assert torch.allclose(views.train([17])[0], expected, rtol=1e-3, atol=1e-5)
    count_encoded()
    cache_features(backbone, dataset, cache, shots=[1], seeds=[1], views=2)
    assert count_encoded() == 0
    assert FeatureStore.open(path).meta.views == 3


def test_float32_holds_features_exactly_and_float16_within_its_precision(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    stores = [
        FeatureStore.open(
            cache_features(backbone, dataset, tmp_path / dtype, shots=[1], seeds=[1], views=0, dtype=dtype)
        )
        for dtype in ("float32", "float16")
    ]
    fine, coarse = (store.split("test")[0] for store in stores)
    assert torch.equal(fine.half().float(), coarse)
    assert not torch.equal(fine, coarse)
    assert stores[0].digest != stores[1].digest
    with pytest.raises(UserError, match="made with features in float16 and float32"):
        cache_features(
            backbone, dataset, tmp_path / "float16", shots=[1], seeds=[1], views=0, dtype="float32"
        )


def test_other_weights_images_or_settings_are_refused_naming_both(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    ask = {"shots": [1], "seeds": [1], "views": 1}
    path = cache_features(backbone, dataset, tmp_path, **ask)
    before = path.read_bytes()
    other = make_backbone(seed=1)
    with pytest.raises(UserError, match=f"{backbone.digest[:12]}.*{other.digest[:12]}"):
        cache_features(other, dataset, tmp_path, **ask)
    with pytest.raises(UserError, match=f"{backbone.digest[:12]}.*{other.digest[:12]}"):
        FeatureStore.open(path, other)
    (dataset.root / "test" / "cat" / "0.png").unlink()
    changed = load_dataset(dataset.root)
    with pytest.raises(UserError, match=f"{dataset.digest[:12]}.*{changed.digest[:12]}"):
        FeatureStore.open(path, backbone, changed)
    with pytest.raises(UserError, match="recipe current and official-2021"):
        cache_features(backbone, dataset, tmp_path, recipe="official-2021", **ask)
    with pytest.raises(UserError, match='Did you mean "current"'):
        cache_features(backbone, dataset, tmp_path, recipe="curent", **ask)
    with pytest.raises(UserError, match="float8"):
        cache_features(backbone, dataset, tmp_path, dtype="float8", **ask)
    assert path.read_bytes() == before


@follows(
    "Repair these, or leave them out with --skip-unreadable",
)
def test_unreadable_images_are_listed_after_the_rest_is_done(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bad = [dataset.root / "test" / "dog" / "1.png", dataset.root / "train" / "cat" / "2.png"]
    good = bad[1].read_bytes()
    for path in bad:
        path.write_bytes(b"no picture")
    ask = {"shots": ["all"], "seeds": [1], "views": 1}
    with pytest.raises(
        UserError, match=r"2 images of animals could not be read; the others are stored"
    ) as raised:
        cache_features(backbone, dataset, tmp_path, **ask)
    assert all(str(path) in str(raised.value) for path in bad)
    path = store_path(tmp_path, backbone, dataset)
    store = FeatureStore.open(path, backbone, dataset)
    assert len(store.indices("train")) == 17
    with pytest.raises(UserError, match="lacks 1 of the 9 test"):
        store.split("test")

    count_encoded()
    bad[1].write_bytes(good)
    with caplog.at_level(logging.WARNING, "fastcoop"):
        cache_features(backbone, dataset, tmp_path, skip_unreadable=True, **ask)
    assert str(bad[0]) in caplog.text
    assert count_encoded() == 2
    store = FeatureStore.open(path, backbone, dataset)
    features, labels = store.split("test")
    assert features.shape == (8, 8)
    assert labels.bincount().tolist() == [3, 2, 3]
    assert len(store.train(range(18))) == len(store.train_labels(range(18))) == 18


def test_where_no_test_image_is_left_or_no_image_of_a_drawn_class_it_is_said(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    ask = {"shots": [6], "seeds": [3], "views": 0, "skip_unreadable": True}
    for path in (dataset.root / "train" / "dog").iterdir():
        path.write_bytes(b"")
    cache_features(backbone, dataset, tmp_path, **ask)
    assert "none of the training images of dog that 6 shots and seed 3 draw could be read" in caplog.text
    for path in (dataset.root / "test").rglob("*.png"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="None of the test images of animals could be read"):
            cache_features(backbone, dataset, tmp_path / "other", **ask)


def test_images_left_out_earlier_are_tried_again_only_where_asked(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    picture = dataset.root / dataset.splits["test"].paths[0]
    content = picture.read_bytes()
    picture.write_bytes(b"")
    ask = {"shots": [1], "seeds": [1], "views": 0}
    cache_features(backbone, dataset, tmp_path, skip_unreadable=True, **ask)
    picture.write_bytes(content)
    for retry, images in ((False, 8), (True, 9)):
        path = cache_features(backbone, dataset, tmp_path, retry_skipped=retry, **ask)
        assert len(FeatureStore.open(path).indices("test")) == images


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_file_names_that_are_no_utf_8_are_kept_as_they_are(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        folder = os.fsencode(dataset.root / split / "cat")
        os.rename(folder + b"/0.png", folder + b"/caf\xe9 0.png")
    dataset = load_dataset(dataset.root)
    path = cache_features(backbone, dataset, tmp_path, shots=["all"], seeds=[1], views=1)
    assert check_store(path, backbone, dataset, sample=100).ok
    assert "test/cat/caf\udce9 0.png" in FeatureStore.open(path).paths("test")


def test_damaged_newer_and_foreign_files_are_refused_and_kept(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    ask = {"shots": [1], "seeds": [1], "views": 0}
    path = cache_features(backbone, dataset, tmp_path, **ask)
    whole = path.read_bytes()
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    newer = path.read_bytes()
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    foreign = (tmp_path / "foreign.h5").read_bytes()
    for content, message in (
        (whole[: len(whole) * 2 // 3], "damaged or cut short"),
        (b"", "damaged or cut short"),
        (newer, "version 99"),
        (foreign, "not a feature store"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            cache_features(backbone, dataset, tmp_path, **ask)
        assert path.read_bytes() == content


def test_a_store_with_a_byte_changed_anywhere_never_ends_in_a_traceback(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    ask = {"shots": ["all"], "seeds": [1], "views": 1}
    path = cache_features(backbone, dataset, tmp_path, **ask)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 + int(rng.integers(255))
        path.write_bytes(damaged)
        try:
            noticed += not check_store(path, backbone, dataset, sample=0).ok
            store = FeatureStore.open(path, backbone, dataset)
            store.train(store.indices("train"))
            store.split("test")
            cache_features(backbone, dataset, tmp_path, **ask)
        except UserError:
            noticed += 1
        assert path.read_bytes() == damaged
    assert noticed > 50


def test_a_store_that_was_compressed_is_refused_and_not_read_as_zeros(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    path = cache_features(backbone, dataset, tmp_path, shots=[1], seeds=[1], views=0)
    with h5py.File(path, "r+") as file:
        features = file["test"]["features"][:]
        del file["test"]["features"]
        file["test"].create_dataset("features", data=features, compression="gzip")
    with pytest.raises(UserError, match="its test features do not lie in it in one piece"):
        FeatureStore.open(path)


def test_an_interrupted_run_goes_on_where_it_stopped(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan, "CROPS_PER_CHUNK", 8)
    ask = {"shots": ["all"], "seeds": [1], "views": 1}
    expected = contents(cache_features(backbone, dataset, tmp_path / "whole", **ask))
    everything = count_encoded()
    original, calls = backbone.encode_images, [0]

    def interrupted(images: torch.Tensor, precision: str) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(images)

    object.__setattr__(backbone, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_features(backbone, dataset, tmp_path / "cut", **ask)
    assert not store_path(tmp_path / "cut", backbone, dataset).exists()
    count_encoded()
    path = cache_features(backbone, dataset, tmp_path / "cut", **ask)
    assert count_encoded() == everything - 3 * 8
    assert contents(path) == expected


@follows(
    "use --dtype float32, or other weights",
)
def test_features_that_float16_cannot_hold_are_refused(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    backbone.model.visual.proj.data *= 1e6
    with pytest.raises(UserError, match="float16 cannot hold; use --dtype float32, or other weights"):
        cache_features(backbone, dataset, tmp_path, shots=[1], seeds=[1], views=0)
    cache_features(backbone, dataset, tmp_path, shots=[1], seeds=[1], views=0, dtype="float32")


def test_images_of_every_kind_go_through(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    for number, mode in enumerate(("L", "P", "RGBA")):
        Image.new(mode, (20, 20)).save(dataset.root / "test" / "owl" / f"{number}.png")
    path = cache_features(backbone, dataset, tmp_path, shots=[1], seeds=[1], views=0)
    assert FeatureStore.open(path).split("test")[0].isfinite().all()
