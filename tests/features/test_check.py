from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import Dataset, few_shot, load_dataset
from fastcoop.datasets.dataset import half_of
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, check_store, import_features
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset


@pytest.fixture
def path(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> Path:
    return cache_features(backbone, dataset, tmp_path / "cache", shots=[2], seeds=[1], views=2)


def test_a_good_store_has_no_problems(path: Path, backbone: Backbone, dataset: Dataset) -> None:
    report = check_store(path, backbone, dataset, sample=10)
    assert report.ok, report.lines()
    assert report.reencoded == 10
    assert report.counts == {"train": 6, "val": 6, "test": 9}
    assert report.largest_difference is not None
    assert 0 < report.largest_difference < 1e-3
    assert check_store(path).largest_difference is None
    assert check_store(path, backbone, half_of(dataset, "base"), sample=3).lines() == [
        *report.lines()[:3],
        *check_store(path, backbone, dataset, sample=3).lines()[3:],
    ]


def test_the_float16_error_of_logits_is_measured_and_said(
    backbone: Backbone, dataset: Dataset, path: Path, tmp_path: Path
) -> None:
    report = check_store(path, backbone, dataset, sample=1000)
    half = report.half_precision
    assert half is not None
    assert half.predictions == 6 * 3 + 6 + 9
    assert half.changed == 0
    ask = {"shots": [2], "seeds": [1], "views": 2}
    fine = FeatureStore.open(cache_features(backbone, dataset, tmp_path / "fine", dtype="float32", **ask))
    coarse = FeatureStore.open(path)
    text = backbone.encode_text([f"a photo of a {name}." for name in dataset.class_names]).double()
    logits = []
    for store in (fine, coarse):
        rows = [
            store.train(store.indices("train")).flatten(0, 1),
            store.split("val")[0],
            store.split("test")[0],
        ]
        image = torch.cat(rows).double()
        cosine = (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
        logits.append(backbone.logit_scale * cosine)
    moved = (logits[0] - logits[1]).abs()
    assert half.largest == pytest.approx(moved.max().item(), rel=1e-2)
    assert half.mean == pytest.approx(moved.mean().item(), rel=1e-2)
    assert f"float16 moves their logits by {half.largest:.1e} at most" in "\n".join(report.lines())
    assert check_store(path).half_precision is None


def test_a_changed_feature_is_found(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["val"]["features"][1, 0, 3] = np.nan
    assert any("digests differ" in problem for problem in check_store(path).problems)
    assert any("not finite" in problem for problem in check_store(path).problems)


def test_a_changed_image_is_found(path: Path, backbone: Backbone, dataset: Dataset) -> None:
    for name in dataset.splits["test"].paths:
        Image.new("RGB", (20, 20)).save(dataset.root / name)
    report = check_store(path, backbone, dataset, sample=100)
    assert not report.ok
    assert "the images or the weights changed" in report.lines()[-1]


def write_npz(path: Path, count: int, views: int = 0, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    rng = np.random.default_rng(count)
    shape = (count, views, 8) if views else (count, 8)
    features = rng.standard_normal(shape).astype(np.float32)
    np.savez(path, features=features, labels=np.arange(count) % 2, names=np.array(names))
    return path


@follows(
    "exists already; move it away or choose another name",
)
def test_features_computed_elsewhere_become_a_store_and_a_dataset(backbone: Backbone, tmp_path: Path) -> None:
    train = write_npz(tmp_path / "train.npz", 10, views=3)
    with np.load(write_npz(tmp_path / "test.npz", 6)) as content:
        test = {"features": torch.from_numpy(content["features"]), "labels": torch.arange(6) % 2}
    torch.save(test | {"names": ["cat", "dog"]}, tmp_path / "test.pt")
    sources = {"train": train, "test": tmp_path / "test.pt"}
    path = import_features(sources, tmp_path / "cache", backbone, name="elsewhere", dtype="float32")
    store = FeatureStore.open(path, backbone)
    assert (store.meta.views, store.meta.class_names, store.meta.template) == (
        2,
        ("cat", "dog"),
        "a photo of a {}.",
    )
    assert torch.equal(store.split("test")[0], test["features"])
    dataset = store.as_dataset()
    drawn = few_shot(dataset, 2, 1).train
    with np.load(train) as content:
        assert np.array_equal(store.train(drawn).numpy(), content["features"][drawn])
    assert FeatureStore.open(path, backbone, dataset).digest == store.digest
    assert check_store(path).ok
    with pytest.raises(UserError, match="exists already"):
        import_features(sources, tmp_path / "cache", backbone, name="elsewhere")
    import_features(sources, tmp_path / "cache", backbone, name="another")
    path.rename(tmp_path / "away.h5")
    import_features(sources, tmp_path / "cache", backbone, name="elsewhere")


@follows("All features of {} have length 1; import them as the backbone gives them")
def test_imported_features_that_were_scaled_are_told(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(write_npz(tmp_path / "raw.npz", 6)) as content:
        raw = dict(content)
    scaled = raw["features"] / np.linalg.norm(raw["features"], axis=1, keepdims=True)
    np.savez(tmp_path / "scaled.npz", **raw | {"features": scaled.astype(np.float16)})
    for name in ("raw", "scaled"):
        import_features({"test": tmp_path / f"{name}.npz"}, tmp_path / "cache", backbone, name=name)
        assert ("All features of scaled have length 1" in caplog.text) == (name == "scaled")


def test_imported_splits_of_the_same_images_are_told(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        features = rng.normal(size=(6, backbone.embed_dim)).astype(np.float32)
        np.savez(tmp_path / f"{split}.npz", features=features, labels=[0, 1] * 3, names=["a", "b"])
    files = {split: tmp_path / f"{split}.npz" for split in ("train", "val", "test")}
    import_features(files, tmp_path / "cache", backbone, name="apart")
    assert not caplog.text
    import_features(files | {"val": files["test"]}, tmp_path / "cache", backbone, name="same")
    assert "same has 6 images of equal features in val and test: what is chosen on the" in caplog.text


def test_files_that_cannot_be_imported_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    good = write_npz(tmp_path / "good.npz", 4)
    np.savez(tmp_path / "wide.npz", features=np.ones((4, 9), "f4"), labels=np.zeros(4, int), names=["a", "b"])
    np.savez(
        tmp_path / "short.npz", features=np.ones((4, 8), "f4"), labels=np.zeros(3, int), names=["a", "b"]
    )
    np.savez(tmp_path / "bare.npz", features=np.ones((4, 8), "f4"))
    np.savez(tmp_path / "label.npz", features=np.ones((4, 8), "f4"), labels=np.full(4, 2), names=["a", "b"])
    np.savez(tmp_path / "pickle.npz", features=np.array([{}]), labels=np.zeros(1, int), names=["a"])
    for name, message in (
        ("wide", "size 9"),
        ("short", "one integer label for each of its 4"),
        ("bare", "lacks labels, names"),
        ("label", "labels from 2 to 2 for 2 names"),
        ("pickle", "was not loaded: it is damaged, or holds other things than plain arrays"),
        ("absent", "There is no file"),
    ):
        with pytest.raises(UserError, match=message):
            import_features({"test": tmp_path / f"{name}.npz"}, tmp_path, backbone, name="x")
    other = write_npz(tmp_path / "other.npz", 4, names=("cat", "cow"))
    with pytest.raises(UserError, match="different classes"):
        import_features({"train": other, "test": good}, tmp_path, backbone, name="x")
    for name in ("../x", "a/b", ""):
        with pytest.raises(UserError, match="so that it can name files"):
            import_features({"test": good}, tmp_path, backbone, name=name)
    with pytest.raises(UserError, match="template must have"):
        import_features({"test": good}, tmp_path, backbone, name="x", template="a photo")
    torch.save({"features": torch.nn.Linear(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="is damaged, or holds other things than plain arrays"):
        import_features({"test": tmp_path / "model.pt"}, tmp_path, backbone, name="x")
    with pytest.raises(UserError, match="test split"):
        import_features({"train": good}, tmp_path, backbone, name="x")
    with pytest.raises(UserError, match='There is no dtype of features "float8"'):
        import_features({"test": good}, tmp_path, backbone, name="x", dtype="float8")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("features", np.full((4, 8), np.nan), "4 features that are not finite numbers, the first in row 0"),
        (
            "features",
            np.full((4, 8), 1e6),
            "float16 makes infinite or all zeros; scale them, or use --dtype float32",
        ),
        (
            "features",
            np.full((4, 8), 1e-9),
            "float16 makes infinite or all zeros; scale them, or use --dtype float32",
        ),
        ("features", np.ones((4, 0, 8)), r"not float64 \(4, 0, 8\)"),
        ("features", np.ones((4, 8), int), "not int64"),
        ("labels", np.array([0, 1, -1, 0]), "labels from -1 to 1 for 2 names"),
        ("labels", np.zeros(4), "not float64"),
        ("names", np.array("cat"), "a list of class names"),
        ("names", np.array([b"cat", b"dog"]), "a list of class names"),
        ("names", np.array([1, 2]), "a list of class names"),
        ("names", np.array(["cat", " "]), "a list of class names"),
    ],
)
def test_arrays_that_are_no_features_are_refused(
    backbone: Backbone, tmp_path: Path, key: str, value: np.ndarray, message: str
) -> None:
    arrays = {
        "features": np.ones((4, 8), "f4"),
        "labels": np.arange(4) % 2,
        "names": np.array(["cat", "dog"]),
    }
    np.savez(tmp_path / "x.npz", **(arrays | {key: value}))
    with pytest.raises(UserError, match=message):
        import_features({"test": tmp_path / "x.npz"}, tmp_path, backbone, name="x")
    tensors = {
        name: torch.from_numpy(a) if a.dtype.kind in "fi" else a.tolist() for name, a in arrays.items()
    }
    torch.save(tensors | {"features": torch.ones(4, 8, requires_grad=True).bfloat16()}, tmp_path / "good.pt")
    import_features({"test": tmp_path / "good.pt"}, tmp_path, backbone, name="x")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_that_a_file_of_features_brings_along_is_run(backbone: Backbone, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path(tmp_path / "ran").touch, ()

    content = {"features": torch.ones(4, 8), "labels": torch.arange(4) % 2, "names": Hostile()}
    torch.save(content, tmp_path / "hostile.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(content))
    np.savez(tmp_path / "object.npz", features=np.array([Hostile()], dtype=object))
    for name in ("hostile.pt", "plain.pt", "plain.npz", "object.npz"):
        with pytest.raises(UserError, match="was not loaded") as caught:
            import_features({"test": tmp_path / name}, tmp_path, backbone, name="x")
        assert "allow_pickle" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_file_of_features_damaged_anywhere_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    good = write_npz(tmp_path / "good.npz", 4)
    torch.save(
        {"features": torch.ones(4, 8), "labels": torch.arange(4) % 2, "names": ["a", "b"]},
        tmp_path / "good.pt",
    )
    rng = np.random.default_rng(0)
    for source in (good, tmp_path / "good.pt"):
        whole = source.read_bytes()
        for number in range(40):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 + int(rng.integers(255))
            path = tmp_path / f"damaged{source.suffix}"
            path.write_bytes(damaged if number % 2 else whole[: rng.integers(len(whole))])
            with contextlib.suppress(UserError):  # a changed number may still be a number
                import_features({"test": path}, tmp_path / str(number), backbone, name="x")
                assert number % 2


def test_what_was_not_encoded_anew_is_said(path: Path, backbone: Backbone, dataset: Dataset) -> None:
    for arguments in ((), (backbone,), (None, dataset)):
        (note,) = check_store(path, *arguments).notes
        assert note.startswith("No image was encoded again: that takes both")
    assert check_store(path, backbone, dataset, sample=1).notes == []
    for sample in (0, -1, 1.5):
        with pytest.raises(UserError, match="number of images to encode again"):
            check_store(path, backbone, dataset, sample=sample)


def test_imported_classes_of_one_name_or_without_images_are_told(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = np.random.default_rng(0).normal(size=(4, backbone.embed_dim)).astype(np.float32)
    np.savez(tmp_path / "test.npz", features=features, labels=[0, 1, 0, 1], names=["a", "A", "c"])
    import_features({"test": tmp_path / "test.npz"}, tmp_path / "cache", backbone, name="odd")
    assert (
        "odd have the same prompt, which cannot tell them apart; name them differently in the files"
        in caplog.text
    )
    assert "odd has no test images of c: accuracies do not include them" in caplog.text


def test_names_folders_and_objects_are_taken_alike(tmp_path: Path) -> None:
    folder, colors = (
        write_backbone(tmp_path / "tiny"),
        write_dataset(tmp_path / "colors", train=1, val=1, test=1),
    )
    ask = {"shots": [1], "seeds": [1], "views": 0}
    objects = backbone_from_spec(folder), load_dataset(colors)
    path = cache_features(*objects, tmp_path / "cache", **ask)
    for backbone, dataset in (objects, (folder, colors), (str(folder), str(colors))):
        assert cache_features(backbone, dataset, str(tmp_path / "cache"), **ask) == path
        assert FeatureStore.open(str(path), backbone, dataset).digest == FeatureStore.open(path).digest
        assert check_store(path, backbone, dataset, sample=1).ok
        name = f"imported-{type(backbone).__name__}"
        np.savez(tmp_path / "test.npz", features=np.eye(2, 16), labels=[0, 1], names=["a", "b"])
        import_features({"test": tmp_path / "test.npz"}, tmp_path / "cache", backbone, name=name)
