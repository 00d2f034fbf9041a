"""Further kinds of features in a store: Tip-Adapter's crops, the mirrored test-time crop, and before the projection."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, few_shot
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, check_store, import_features
from fastcoop.features.images import crops, normalize
from fastcoop.methods.data import Data
from tests.advice import follows
from tests.features.small import contents, make_backbone, make_folder

DRAW = {"shots": (2,), "seeds": (1,), "dtype": "float32"}
ALL = ("coop", "tip", "flip", "pre")


def cached(backbone: Backbone, dataset: Dataset, folder: Path, **options: object) -> FeatureStore:
    path = cache_features(backbone, dataset, folder, **(DRAW | options))  # type: ignore[arg-type]
    return FeatureStore.open(path, backbone, dataset)


def test_each_kind_is_the_plain_encoding_of_its_crops(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    store = cached(backbone, dataset, tmp_path, views=2, kinds=ALL)
    subset = few_shot(dataset, 2, 1)
    visual = backbone.model.visual
    for position, row in enumerate(subset.train[:3]):
        name = dataset.splits["train"].paths[row]
        image = Image.open(dataset.root / name).convert("RGB")

        def plain(views: list[int | str], image: Image.Image = image, name: str = name) -> torch.Tensor:
            pixels = crops(image, name, views, backbone.preprocess, "current", 0)
            return normalize(pixels, backbone.preprocess, backbone.device)

        for kind, views in (("coop", [0, 1, 2]), ("tip", [0, "tip 1", "tip 2"]), ("flip", [0, "flip"])):
            expected = backbone.encode_images(plain(views))
            found = store.train(subset.train[position : position + 1], kind=kind)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        before = store.train(subset.train[position : position + 1], kind="pre")[0]
        expected = backbone.encode_images(plain([0, "tip 1", "tip 2"]))
        torch.testing.assert_close(before @ visual.proj, expected, rtol=1e-5, atol=1e-6)
    assert store.train(subset.train, kind="pre").shape == (6, 3, 64)
    for split in ("val", "test"):
        features, labels = store.split(split)
        before, same = store.split(split, "pre")
        torch.testing.assert_close(before @ visual.proj, features, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, same)
        assert torch.equal(store.split(split, "tip")[0], features)


def test_the_flip_mirrors_the_test_crop_and_views_of_one_number_differ(backbone: Backbone) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    test, flip = crops(image, "a", [0, "flip"], backbone.preprocess, "official-2021", 0)
    assert np.array_equal(flip, np.asarray(ImageOps.mirror(Image.fromarray(test))))
    views = crops(image, "a", ["tip 1", 1, "tip 2"], backbone.preprocess, "current", 0)
    assert len({view.tobytes() for view in views}) == 3
    assert np.array_equal(views[0], crops(image, "a", ["tip 1"], backbone.preprocess, "official-2021", 0)[0])


def test_adding_kinds_keeps_the_features_and_the_digest_and_encodes_only_what_is_missing(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_crops: Callable[[], int]
) -> None:
    first = cached(backbone, dataset, tmp_path, views=2)
    assert h5py.File(first.path).attrs["format_version"] == 2
    before, count = contents(first.path), count_crops()
    assert count == 6 * 3 + 6 + 9
    store = cached(backbone, dataset, tmp_path, views=3, kinds=("tip", "flip"))
    assert count_crops() == 6 * (3 + 1)
    assert store.digest == first.digest
    after = contents(store.path)
    assert {name: after[name] for name in before if name != "meta"} == {
        name: value for name, value in before.items() if name != "meta"
    }
    assert store.meta.views == 2
    assert dict(store.meta.kinds) == {"tip": 3, "flip": 1}
    # More seeds: their images get every kind that the store has.
    more = cached(backbone, dataset, tmp_path, views=1, seeds=(1, 2, 3))
    new = len(more.indices("train")) - 6
    assert new
    assert count_crops() == new * (1 + 2 + 3 + 1)
    cached(backbone, dataset, tmp_path, views=3, kinds=("pre",))
    assert count_crops() == len(more.indices("train")) * 4 + 6 + 9  # the test-time and Tip-Adapter's crops
    whole = cached(backbone, dataset, tmp_path / "one pass", views=3, kinds=ALL, seeds=(1, 2, 3))
    assert count_crops() == len(more.indices("train")) * (1 + 3 + 3 + 1) + 6 + 9
    mixed = FeatureStore.open(store.path)
    for split in mixed.splits:
        for array in mixed.meta.arrays(split):
            views = len(mixed.meta.arrays(split)[array])
            both = [one.raw(split, slice(None), views, array) for one in (mixed, whole)]
            np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)
    assert check_store(mixed.path, backbone, dataset, sample=9).lines()[-1] == "no problems found"


@pytest.fixture
def count_crops(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Call it for the number of crops encoded since the last call."""
    seen: list[int] = []
    for name in ("encode_images", "encode_images_both"):

        def counted(self: Backbone, images: torch.Tensor, *args: str, original: object = None) -> object:
            seen.append(len(images))
            return original(self, images, *args)  # type: ignore[operator]

        original = getattr(Backbone, name)
        monkeypatch.setattr(
            Backbone,
            name,
            lambda *args, original=original, counted=counted: counted(*args, original=original),
        )

    def take() -> int:
        total = sum(seen)
        seen.clear()
        return total

    return take


def test_the_bits_of_pooled_features_do_not_depend_on_the_kinds(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    plain = cached(backbone, dataset, tmp_path / "a", views=2, kinds=("coop", "tip"))
    both = cached(backbone, dataset, tmp_path / "b", views=2, kinds=ALL)
    assert plain.meta.sha256["test"] == both.meta.sha256["test"]


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm"])
def test_features_before_the_projection_of_every_kind_of_tower(tower: str) -> None:
    torch.manual_seed(0)
    vision = {
        "vit": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "timm": {
            "image_size": 32, "timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg",
            "timm_proj": "linear",
        },
    }[tower]  # fmt: skip
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(8, vision, text).eval().requires_grad_(False)
    small = make_backbone()
    backbone = Backbone(tower, model, "", small.tokenizer, small.preprocess, 8, False)
    images = torch.randn(5, 3, vision["image_size"], vision["image_size"])  # type: ignore[arg-type]
    for precision in ("float32", "bfloat16"):
        features, before = backbone.encode_images_both(images, precision)
        assert torch.equal(features, backbone.encode_images(images, precision))
    features, before = backbone.encode_images_both(images)
    projection = backbone.image_projection
    bias = 0 if projection.bias is None else projection.bias
    torch.testing.assert_close(before @ projection.weight + bias, features, rtol=1e-4, atol=1e-5)
    assert (projection.bias is not None) == (tower == "resnet")
    assert before.shape[1] == projection.before_dim


@follows("so there are no features before it; use another backbone")
def test_a_tower_without_projection_is_refused_before_anything_is_written(
    dataset: Dataset, tmp_path: Path
) -> None:
    backbone = make_backbone()
    backbone.model.visual.proj = None
    with pytest.raises(UserError, match="tiny does not end in a linear projection"):
        cache_features(backbone, dataset, tmp_path / "cache", **DRAW, kinds=("pre",))  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()
    cached(make_backbone(), dataset, tmp_path / "cache", kinds=("pre",))


def test_a_changed_picture_and_a_changed_byte_are_noticed_in_every_kind(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    store = cached(backbone, dataset, tmp_path, views=1, kinds=ALL)
    row = int(store.indices("train")[0])
    old = {kind: store.train([row], kind=kind) for kind in ALL}
    pixels = np.random.default_rng(5).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(dataset.root / dataset.splits["train"].paths[row])
    again = cached(backbone, dataset, tmp_path, views=1)
    assert all(not torch.equal(again.train([row], kind=kind), old[kind]) for kind in ALL)
    with h5py.File(again.path, "r+") as file:
        file["train/tip"][0, 0, 0] += 1
    damaged = FeatureStore.open(again.path)
    damaged.train([row])
    with pytest.raises(UserError, match=r"The train \(tip\) features have changed"):
        damaged.train([row], kind="tip")
    assert not check_store(again.path).ok


def test_a_store_keeps_its_numbers_and_refuses_views_of_another_seed(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    cached(backbone, dataset, tmp_path, views=3, kinds=("coop", "tip"))
    more = cached(backbone, dataset, tmp_path, views=1, kinds=("tip",), seeds=(1, 2), dtype="float16")
    assert (more.meta.dtype, more.meta.views, dict(more.meta.kinds)) == ("float32", 3, {"tip": 3})
    for array, views in (("features", 4), ("tip", 3)):
        found = more.raw("train", slice(None), array=array)
        assert (found.dtype, found.shape[:2]) == (np.float32, (len(more.indices("train")), views))
    with pytest.raises(UserError, match="made with view seed 0 and 1 was asked for"):
        cached(backbone, dataset, tmp_path, view_seed=1)


def test_the_digest_before_the_projection_is_of_the_images_tested_on(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    store = cached(backbone, dataset, tmp_path, kinds=("pre",))
    more = cached(backbone, dataset, tmp_path, kinds=("pre", "tip"), seeds=(1, 2))
    assert store.before_digest is not None
    assert more.before_digest == store.before_digest
    Image.new("RGB", (9, 9)).save(dataset.root / dataset.splits["test"].paths[0])
    unchanged = FeatureStore.open(store.path, backbone, dataset, only_unchanged=True)
    assert unchanged.changed_images == 1
    assert more.before_digest != unchanged.before_digest
    assert more.digest != unchanged.digest


def test_workers_read_what_the_store_held_when_it_was_planned(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    store = cached(backbone, dataset, tmp_path, views=1, kinds=("coop", "tip"))
    rows, version = store.indices("train"), store.file.version
    old = {kind: store.train(rows, kind=kind) for kind in ("coop", "tip")}
    cached(backbone, dataset, tmp_path, views=2, kinds=ALL, seeds=(1, 2))
    reopened = FeatureStore.open(store.path, version=version)
    assert all(torch.equal(reopened.train(rows, kind=kind), old[kind]) for kind in old)


def test_data_offers_the_views_of_each_kind(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    store = cached(backbone, dataset, tmp_path, views=3, kinds=ALL)
    data, none = Data(dataset, store, views=2), Data(dataset, store, views=0)
    subset = data.subset(2, 1)
    for kind, views in (("coop", 2), ("tip", 2), ("flip", 1), ("pre", 2)):
        features, labels = data.train(subset, kind)
        stored, same = data.train_views(subset, kind)
        assert features.shape[1] == 1 + views
        assert np.array_equal(labels, same)
        assert np.array_equal(stored, features[:, 1:])
        assert none.train_views(subset, kind)[0].shape[1] == 1
    assert np.array_equal(data.train(subset, "tip")[0][:, 0], data.train(subset)[0][:, 0])
    assert data.train_files(subset)
    assert data.train_files(data.subset("all", 1)) is None, "not all of these images are stored"
    backwards = subset.train[::-1].copy()
    assert torch.equal(store.train(backwards), store.train(subset.train).flip(0))
    assert store.train_labels(backwards).tolist() == dataset.splits["train"].labels[backwards].tolist()
    assert data.validation(subset, "pre")[0].shape[1] == data.split("test", "pre")[0].shape[1] == 64


@follows("add them with `fastcoop cache-features --kinds {}`", "name a dataset of images")
def test_a_store_without_a_kind_names_the_command_and_imported_views_stand_for_every_crop(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    store = cached(backbone, dataset, tmp_path)
    with pytest.raises(UserError, match="fastcoop cache-features --kinds tip"):
        store.train(store.indices("train"), kind="tip")
    cached(backbone, dataset, tmp_path, kinds=("tip",)).train(store.indices("train"), kind="tip")
    with pytest.raises(UserError, match=r'There is no kind of features "tips"\. Did you mean "tip"\?'):
        cached(backbone, dataset, tmp_path, kinds=("tips",))
    rng = random.Random(0)
    for split in ("test", "train"):
        features = np.array([[[rng.random() for _ in range(8)] for _ in range(3)] for _ in range(4)])
        rest = {"labels": np.array([0, 1, 0, 1]), "names": np.array(["cat", "dog"])}
        np.savez(tmp_path / f"{split}.npz", features=features, **rest)
    sources = {split: tmp_path / f"{split}.npz" for split in ("train", "test")}
    imported = FeatureStore.open(import_features(sources, tmp_path, backbone, name="birds"))
    for kind in ("tip", "flip"):
        assert torch.equal(imported.train([0, 3], kind=kind), imported.train([0, 3]))
    features[:, 2] += 1  # the digest is of all views
    np.savez(sources["train"], features=features, **rest)
    other = FeatureStore.open(import_features(sources, tmp_path / "other", backbone, name="birds"))
    assert other.digest != imported.digest
    assert other.train_digest(np.arange(4)) == imported.train_digest(np.arange(4))
    with pytest.raises(UserError, match="name a dataset of images"):
        imported.split("test", "pre")
    assert cached(backbone, dataset, tmp_path, kinds=("pre",)).split("test", "pre")[0].shape == (9, 64)


def test_no_augmented_views_leave_the_test_crop(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    store = cached(backbone, dataset, tmp_path, views=0, kinds=ALL)
    data = Data(dataset, store, views=0)
    subset = data.subset(2, 1)
    for kind in ("coop", "tip", "flip"):
        assert np.array_equal(data.train_views(subset, kind)[0], store.train(subset.train)[:, :1])
    assert np.array_equal(data.train(subset, "pre")[0], store.train(subset.train, kind="pre"))
    assert check_store(store.path, backbone, dataset).ok
    more = cached(backbone, dataset, tmp_path, views=2, kinds=ALL)
    assert more.train(subset.train, kind="tip").shape[1] == 3


def test_without_augmented_views_a_store_of_coop_serves_every_method(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    # The second call adds no array, since it has no view to add.
    for kinds in (("coop",), ("coop", "tip", "flip")):
        store = cached(backbone, dataset, tmp_path, views=0, kinds=kinds)
        data = Data(dataset, store, views=0)
        for kind in ("tip", "flip"):
            found = data.train(data.subset(2, 1), kind)[0]
            assert np.array_equal(found, data.train(data.subset(2, 1))[0])


def test_half_of_the_classes_read_their_part_of_every_kind(backbone: Backbone, tmp_path: Path) -> None:
    dataset = make_folder(tmp_path / "more", classes=("a", "b", "c", "d"))
    store = cached(backbone, dataset, tmp_path, views=1, kinds=("tip", "pre"))
    base = FeatureStore.open(store.path, dataset=f"{dataset.root}:base")
    row = int(store.indices("train")[0])
    assert torch.equal(base.train([row], kind="tip"), store.train([row], kind="tip"))
    assert torch.equal(base.split("test", "pre")[0], store.split("test", "pre")[0][:6])
