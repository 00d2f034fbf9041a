"""A store's file: what an open store reads when others write, what is refused, and with which sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import half_of
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, check_store, encode, find_dataset, import_features
from fastcoop.features.store_file import META, META_SHA256, content_sha256
from fastcoop.grids.grid import read_grid
from fastcoop.sweeps.loading import load_grid, open_features
from tests.advice import follows
from tests.features.small import make_folder

FEW = {"shots": [1], "seeds": [1], "views": 1}
ALL = {"shots": ["all"], "seeds": [1], "views": 3}


@pytest.fixture
def path(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> Path:
    return cache_features(backbone, dataset, tmp_path / "cache", **FEW)


def damage(path: Path, split: str = "test") -> None:
    """Reverse half of a split's features, as `dd` or a bad disk could."""
    with h5py.File(path) as file:
        features = file[split]["features"]
        start, size = features.id.get_offset(), features.nbytes // 2
    raw = bytearray(path.read_bytes())
    raw[start : start + size] = raw[start : start + size][::-1]
    path.write_bytes(raw)


def test_an_open_store_reads_what_it_opened_whatever_becomes_of_the_path(
    path: Path, backbone: Backbone, dataset: Dataset
) -> None:
    expected, drawn = FeatureStore.open(path), FeatureStore.open(path).indices("train")
    features = [expected.train(drawn), *expected.split("test")]
    store, removed = FeatureStore.open(path), FeatureStore.open(path)
    cache_features(backbone, dataset, path.parents[1], **ALL)
    assert torch.equal(store.train(drawn), features[0])
    assert all(map(torch.equal, store.split("test"), features[1:]))
    assert len(store.paths("train")) == len(drawn)
    path.unlink()
    assert torch.equal(removed.train(drawn), features[0])
    assert removed.paths("test") == dataset.splits["test"].paths


@follows(
    "since this work was planned; run the same command again",
)
def test_a_store_travels_to_other_processes_and_holds_the_same_there(
    path: Path, backbone: Backbone, dataset: Dataset
) -> None:
    store = FeatureStore.open(path, backbone, dataset)
    sent = pickle.dumps(store.file.version)
    assert len(sent) < 10_000
    version, drawn = pickle.loads(sent), store.indices("train")
    for described in (dataset, half_of(dataset, "base")):
        there, here = (FeatureStore.open(path, backbone, described, one) for one in (version, None))
        assert there.digest == here.digest
        assert all(map(torch.equal, there.split("test"), here.split("test")))
    cache_features(backbone, dataset, path.parents[1], **ALL)  # it holds more now, including the old features
    there = FeatureStore.open(path, backbone, dataset, version)
    assert torch.equal(there.train(drawn), store.train(drawn))
    assert there.indices("train").tolist() == drawn.tolist()
    assert all(map(torch.equal, there.split("val"), store.split("val")))
    assert (there.meta.views, there.digest) == (1, store.digest)
    path.unlink()
    cache_features(
        backbone, make_folder(path.parents[1] / "other" / "animals", seed=1), path.parents[1], **ALL
    )
    with pytest.raises(
        UserError, match=r"Another process has written other features to .* run the same command"
    ):
        FeatureStore.open(path, backbone, dataset, version)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc/self/fd lists")
def test_opening_many_times_leaves_no_file_open(path: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(200):
        FeatureStore.open(path)
    assert opened() == before
    store = FeatureStore.open(path)
    for _ in range(20):
        store.split("test")
        store.paths("test")
    assert opened() <= before + 1


@follows(
    "move it away and make it again with `fastcoop cache-features`",
)
def test_damaged_features_are_refused_on_every_way_of_reading(
    path: Path, backbone: Backbone, dataset: Dataset
) -> None:
    FeatureStore.open(path).split("test")  # verified, but as another file
    damage(path)
    damage(path, "train")
    store = FeatureStore.open(path, backbone, dataset)
    drawn = store.indices("train")
    for read in (
        lambda: store.split("test"),
        lambda: store.train(drawn),
        lambda: store.train_labels(drawn),
        lambda: store.train_digest(drawn),
        lambda: store.raw("test", slice(0, 1)),
        lambda: cache_features(backbone, dataset, path.parents[1], **ALL),
    ):
        with pytest.raises(
            UserError, match=r"have changed since they were written: digests differ.*move it away"
        ):
            read()
    store.split("val")
    found = " ".join(check_store(path, backbone, dataset).problems)
    assert all(f"The {split} features have changed since" in found for split in ("train", "test"))
    path.unlink()  # as the sentence says
    cache_features(backbone, dataset, path.parents[1], **ALL)
    assert check_store(path, backbone, dataset).ok


@pytest.mark.parametrize("before", [0, 3])
def test_overwritten_texts_are_refused(path: Path, before: int) -> None:
    """HDF5 itself never returns from a heap of texts with an object of size 0."""
    content = path.read_bytes()
    place = content.index(b"GCOL") + 16
    for _ in range(before):
        place += 16 + -(-int.from_bytes(content[place + 8 : place + 16], "little") // 8) * 8
    path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
    with pytest.raises(UserError, match=r"damaged or cut short \(its texts have been overwritten\)"):
        FeatureStore.open(path)


def test_a_file_is_verified_once_in_a_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcoop.features import store_file

    calls, original = [], store_file.content_sha256
    FeatureStore.open(path).split("test")
    monkeypatch.setattr(store_file, "content_sha256", lambda *a: calls.append(len(a)) or original(*a))
    for _ in range(3):
        FeatureStore.open(path).split("test")
    assert 1 not in calls  # records of files alone


def test_imported_features_are_verified_with_their_names_and_paths(
    backbone: Backbone, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "test.npz",
        features=rng.normal(size=(40, 8)).astype("f4"), labels=np.arange(40) % 2, names=["cat", "dog"],
    )  # fmt: skip
    path = import_features({"test": tmp_path / "test.npz"}, tmp_path / "cache", backbone, name="x")
    whole = path.read_bytes()
    for old, new in (
        (b"test/0000003", b"test/0000004"),
        (b'"cat"', b'"cut"'),
        (b"a photo of", b"A photo of"),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(UserError, match="damaged"):
            find_dataset(path)
    path.write_bytes(whole)
    damage(path)
    with pytest.raises(UserError, match=r"digests differ\..* `fastcoop features import`"):
        find_dataset(path)
    path.unlink()
    assert import_features({"test": tmp_path / "test.npz"}, tmp_path / "cache", backbone, name="x") == path


def forge(path: Path, **changes: Any) -> None:
    """Change what a store says of itself, with the digest of that."""
    with h5py.File(path, "r+") as file:
        text = json.dumps(json.loads(file[META].asstr()[()]) | changes)
        del file[META]
        file.create_dataset(META, data=text, dtype=h5py.string_dtype())
        file.attrs[META_SHA256] = hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dataset": "../../x"}, "name must be letters"),
        ({"template": "{:>99999999999}"}, "template must have {} once"),
        ({"template": "{0.__class__}"}, "template must have {} once"),
    ],
)
def test_a_store_of_another_s_making_names_no_files_and_formats_no_objects(
    tmp_path: Path, backbone: Backbone, changes: dict[str, str], part: str
) -> None:
    np.savez(tmp_path / "x.npz", features=np.ones((2, 8)), labels=[0, 1], names=["cat", "dog"])
    path = import_features({"test": tmp_path / "x.npz"}, tmp_path / "cache", backbone, name="x")
    assert find_dataset(path).name == "x"
    forge(path, **changes)
    with pytest.raises(UserError) as caught:
        find_dataset(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"views": 10**9}, "views is 1000000000: Input should be less than"),
        ({"expected": {"test": 10**12}}, "expected.test is 1000000000000: Input should be less than"),
        ({"skipped": {"test": "x"}}, "skipped.test is 'x': "),
        ({"skipped": [1]}, "skipped is [1]: Input should"),
        ({"class_names": [1, 2]}, "class_names.0 is 1: Input should"),
    ],
    ids=str,
)
def test_a_description_of_other_types_or_sizes_is_damaged(
    path: Path, changes: dict[str, Any], part: str
) -> None:
    forge(path, **changes)
    with pytest.raises(UserError) as caught:
        FeatureStore.open(path)
    assert f"is damaged or cut short (of its description, {part}" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_stored_features_that_are_none_are_refused_though_their_digest_is_right(
    path: Path, value: float
) -> None:
    with h5py.File(path, "r+") as file:
        file["test"]["features"][1] = value
        digest = content_sha256(file["test"])
    forge(path, sha256={**FeatureStore.open(path).meta.sha256, "test": digest})
    with pytest.raises(UserError, match="The test features of 1 images are not finite, or all zeros"):
        FeatureStore.open(path).split("test")
    assert not check_store(path).ok


@follows(
    "use other weights",
)
def test_features_of_zeros_are_not_stored(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    weights = backbone.model.visual.proj.data.clone()
    backbone.model.visual.proj.data *= 0
    with pytest.raises(UserError, match="that are all zeros; use --dtype float32, or other weights"):
        cache_features(backbone, dataset, tmp_path, **FEW)
    with pytest.raises(UserError, match="that are all zeros; use other weights"):
        cache_features(backbone, dataset, tmp_path, dtype="float32", **FEW)
    backbone.model.visual.proj.data.copy_(weights)
    cache_features(backbone, dataset, tmp_path, **FEW)
    np.savez(tmp_path / "x.npz", features=np.zeros((2, 8)), labels=[0, 1], names=["cat", "dog"])
    with pytest.raises(
        UserError, match="2 features that are all zeros, the first in row 0; compute them again"
    ):
        import_features({"test": tmp_path / "x.npz"}, tmp_path, backbone, name="x")


@follows(
    "close that program and run the same command again",
    "got a folder; move it away or use another cache folder",
    "change its permissions or use another cache folder",
    "close other programs or allow more open files (ulimit -n), and run the same command again",
    "check the disk and run the same command again",
)
def test_each_reason_why_a_store_cannot_be_read_has_its_sentence(
    path: Path, backbone: Backbone, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = path.read_bytes()
    code = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for use in (
            lambda: FeatureStore.open(path),
            lambda: cache_features(backbone, dataset, tmp_path / "cache", **FEW),
        ):
            with pytest.raises(
                UserError, match="is open for writing in another program; close that program and run"
            ):
                use()
        other.communicate(b"\n")
    with h5py.File(path):  # another reader
        FeatureStore.open(path)
    original = Path.open

    def failing(code: int) -> Any:
        def open_(self: Path, *arguments: Any, **options: Any) -> Any:
            if self == path:
                raise OSError(code, os.strerror(code))
            return original(self, *arguments, **options)

        return open_

    for code, sentence in (
        (
            errno.EACCES,
            r"cannot be read \(Permission denied\); change its permissions or use another cache folder",
        ),
        (
            errno.EMFILE,
            r"cannot be read \(Too many open files\); close other programs or allow more open files",
        ),
        (errno.EIO, r"cannot be read \(Input/output error\); check the disk"),
        (errno.ENOENT, "There is no feature store"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", failing(code))
            with pytest.raises(UserError, match=sentence) as caught:
                FeatureStore.open(path)
            assert "damaged" not in str(caught.value)
            if code != errno.ENOENT:
                with pytest.raises(UserError, match=sentence):
                    cache_features(backbone, dataset, tmp_path / "cache", **FEW)
            cache_features(backbone, dataset, tmp_path / "another", **FEW)
        FeatureStore.open(path)
    assert path.read_bytes() == whole
    path.unlink()
    path.mkdir()
    for use in (
        lambda: FeatureStore.open(path),
        lambda: cache_features(backbone, dataset, tmp_path / "cache", **FEW),
    ):
        with pytest.raises(UserError, match="got a folder; move it away or use another cache folder"):
            use()
    path.rename(tmp_path / "away")
    cache_features(backbone, dataset, tmp_path / "cache", **FEW)


def test_the_caller_s_torch_settings_do_not_reach_features(dataset: Dataset, tmp_path: Path) -> None:
    expected = cached(dataset, tmp_path / "plain")
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert cached(dataset, tmp_path / str(dtype)) == expected
            assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(before)
        torch.set_float32_matmul_precision("medium")
        assert cached(dataset, tmp_path / "medium") == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(before)
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert cached(dataset, tmp_path / "autocast") == expected


def test_a_caller_who_tells_pillow_to_fill_up_truncated_files_caches_none_of_them(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    picture = dataset.root / "test" / "cat" / "0.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    with pytest.raises(UserError, match="1 image of animals could not be read"):
        cache_features(backbone, dataset, tmp_path, **FEW)
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (True, 1)


def test_threads_and_batches_move_features_by_rounding_alone_and_the_digest_covers_them(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, before, stores = backbone_from_spec("demo-resnet"), torch.get_num_threads(), []
    try:
        for threads, batch_size in ((1, 64), (2, 64), (1, 3)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(encode, "CPU_BATCH", batch_size)
            ask = {"dtype": "float32", **FEW}
            path = cache_features(backbone, dataset, tmp_path / f"{threads}-{batch_size}", **ask)
            stores.append(FeatureStore.open(path))
    finally:
        torch.set_num_threads(before)
    features = [store.split("test")[0] for store in stores]
    for store, one in zip(stores[1:], features[1:], strict=True):
        assert torch.allclose(one, features[0], rtol=1e-4, atol=1e-3)
        same = torch.equal(one, features[0]) and torch.equal(store.split("val")[0], stores[0].split("val")[0])
        assert (store.digest == stores[0].digest) == same


def cached(dataset: Dataset, cache: Path) -> dict[str, str]:
    """Digests of features in float32, which rounding would hide in float16."""
    backbone = backbone_from_spec("demo-resnet")
    path = cache_features(backbone, dataset, cache, dtype="float32", **FEW)
    return dict(FeatureStore.open(path).meta.sha256)


def test_features_computed_in_another_dtype_are_not_mixed(dataset: Dataset, tmp_path: Path) -> None:
    fine, coarse = backbone_from_spec("demo-vit"), backbone_from_spec("demo-vit", dtype=torch.bfloat16)
    assert fine.digest == coarse.digest
    path = cache_features(fine, dataset, tmp_path, **FEW)
    before = path.read_bytes()
    for ask in (FEW, ALL):
        with pytest.raises(UserError, match="made with a backbone in float32 and bfloat16 was asked for"):
            cache_features(coarse, dataset, tmp_path, **ask)
    assert path.read_bytes() == before
    cache_features(coarse, dataset, tmp_path / "coarse", **FEW)
    with pytest.raises(UserError, match="made with a backbone in bfloat16 and float32 was asked for"):
        cache_features(fine, dataset, tmp_path / "coarse", **FEW)


def test_the_precision_of_products_is_recorded_and_not_mixed(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="in tf32, which takes a GPU"):
        cache_features(backbone, dataset, tmp_path, precision="tf32", **FEW)
    with pytest.raises(UserError, match='There is no precision of products "int8"'):
        cache_features(backbone, dataset, tmp_path, precision="int8", **FEW)
    exact = FeatureStore.open(cache_features(backbone, dataset, tmp_path, precision="float32", **FEW))
    assert (exact.meta.precision, exact.meta.precision_difference) == ("float32", None)
    with pytest.raises(UserError, match="products in float32 and bfloat16 was asked for"):
        cache_features(backbone, dataset, tmp_path, precision="bfloat16", **FEW)
    other = tmp_path / "another cache folder"
    rough = FeatureStore.open(cache_features(backbone, dataset, other, precision="bfloat16", **FEW))
    rough = FeatureStore.open(cache_features(backbone, dataset, other, **ALL))  # keeps its precision
    measured = rough.meta.precision_difference
    assert rough.meta.precision == "bfloat16"
    assert measured is not None
    assert 1e-4 < measured < 0.1
    assert f"differ from float32's by up to {measured:.1e} of their length" in caplog.text
    found = check_store(rough.path, backbone, dataset)
    assert found.ok
    assert found.largest_difference is not None
    assert found.largest_difference < 1e-3
    assert any("Computed in bfloat16" in line for line in found.lines())


def test_a_grid_of_stores_of_two_precisions_gets_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for name, precision in (("animals", "float32"), ("others", "bfloat16")):
        dataset = make_folder(tmp_path / "data" / name)
        cache_features("demo-resnet", dataset, tmp_path / "cache", precision=precision, **FEW)
    grid = {
        "backbones": "demo-resnet",
        "datasets": ["animals", "others"],
        "shots": 1,
        "methods": ["zero_shot"],
    }
    open_features(load_grid(read_grid(grid), tmp_path / "data", "cpu"), tmp_path / "cache")
    assert (
        "precision of this grid's feature stores is not the same: bfloat16 in 1, float32 in 1." in caplog.text
    )
