"""Pictures that change under the same names: found by size, time and bytes, and encoded again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset, load_dataset
from fastcoop.datasets.dataset import half_of
from fastcoop.errors import UserError
from fastcoop.features import (
    FeatureStore,
    cache_features,
    check_store,
    encode,
    open_current,
    plan,
)
from fastcoop.features.image_files import files_digest, find_changes, read_file, unknown_files
from tests.advice import follows
from tests.features.small import contents, make_folder

ASK = {"shots": ["all"], "seeds": [1], "views": 1}


def invert(path: Path) -> None:
    """Another picture of the same size under the same name."""
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def touch(path: Path) -> None:
    """Another time, the same bytes."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_files_are_compared_by_size_and_time_then_by_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    for path in paths:
        path.write_bytes(b"content of " + path.name.encode())
    recorded = np.append(np.stack([read_file(path)[1] for path in paths[:5]]), unknown_files(1))
    assert files_digest(recorded) is None
    assert files_digest(recorded[:5]) != files_digest(recorded[:4])
    paths[1].write_bytes(b"content of another size")
    time = paths[2].stat().st_mtime_ns
    paths[2].write_bytes(b"CONTENT of 2")
    os.utime(paths[2], ns=(time, time - 1))  # as of a copy made earlier
    touch(paths[3])
    paths[4].unlink()
    paths[5].write_bytes(b"nothing is recorded of it")
    changed, renewed = find_changes(paths, recorded, "")
    assert changed.tolist() == [False, True, True, False, False, False]
    assert renewed["mtime_ns"][3] == paths[3].stat().st_mtime_ns
    os.utime(paths[2], ns=(time, time))
    assert find_changes(paths, recorded, "")[0].tolist() == [False, True, False, False, False, False]
    assert find_changes(paths, recorded, "", hash_all=True)[0].tolist() == changed.tolist()
    os.utime(paths[1], ns=(time, int(recorded["mtime_ns"][1])))  # then times are no sign of old bytes
    assert find_changes(paths, recorded, "")[0].tolist() == changed.tolist()


@follows(
    "changed while features were computed; run the same command again",
)
def test_changed_pictures_are_encoded_again_and_no_others(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = cache_features(backbone, dataset, tmp_path / "cache", **ASK)
    before = FeatureStore.open(path, backbone, dataset)
    invert(dataset.root / "test" / "cat" / "1.png")
    invert(dataset.root / "train" / "dog" / "2.png")
    touch(dataset.root / "test" / "owl" / "0.png")
    seen = FeatureStore.open(path, backbone, dataset, only_unchanged=True)
    assert {split: rows.tolist() for split, rows in seen.changed.items()} == {
        "train": [8],
        "test": [1],
    }
    assert seen.digest != before.digest
    assert seen.train_digest(np.array([8])) is None
    assert seen.train_digest(np.array([7])) == before.train_digest(np.array([7]))
    with pytest.raises(UserError, match=r"2 image files of animals changed while features were computed"):
        open_current(path, backbone, dataset)
    count_encoded()
    cache_features(backbone, dataset, tmp_path / "cache", **ASK)
    assert count_encoded() == 1 + 2
    assert [record.getMessage() for record in caplog.records] == [
        "2 image files of animals changed since the last encoding; encoding again."
    ]
    fresh = cache_features(backbone, dataset, tmp_path / "fresh", **ASK)
    assert open_current(path, backbone, dataset).has_new_times is False
    for split, rows in (("train", 18), ("val", 6), ("test", 9)):
        new, whole = (FeatureStore.open(p).raw(split, slice(0, 18)) for p in (path, fresh))
        assert len(new) == rows
        assert np.allclose(new.astype(float), whole.astype(float), rtol=1e-2, atol=1e-3)
    kept = np.setdiff1d(np.arange(18), [8])
    after = FeatureStore.open(path)
    assert torch.equal(after.train(kept), before.train(kept))
    assert after.digest != before.digest
    count_encoded()
    cache_features(backbone, dataset, tmp_path / "cache", **ASK)
    assert count_encoded() == 0


def test_a_new_time_alone_is_noted_where_the_folder_can_be_written(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = cache_features(backbone, dataset, tmp_path / "cache", **ASK)
    digests, store = FeatureStore.open(path).meta.sha256, path.read_bytes()
    for file in dataset.root.rglob("*.png"):
        touch(file)
    count_encoded()
    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.files.FileLock", lambda *_, **__: (_ for _ in ()).throw(OSError(30)))
        assert cache_features(backbone, dataset, tmp_path / "cache", **ASK) == path
    assert path.read_bytes() == store
    cache_features(backbone, dataset, tmp_path / "cache", **ASK)
    assert count_encoded() == 0
    assert FeatureStore.open(path).meta.sha256 == digests
    assert not FeatureStore.open(path, backbone, dataset, only_unchanged=True).has_new_times


def test_half_of_the_classes_share_the_changes_of_the_whole(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, count_encoded: Callable[[], int]
) -> None:
    dataset = load_dataset(make_folder(tmp_path / "four", classes=("cat", "dog", "owl", "pig")).root)
    half = half_of(dataset, "new")
    path = cache_features(backbone, half, tmp_path / "cache", **ASK)
    invert(dataset.root / "test" / "owl" / "1.png")
    invert(dataset.root / "test" / "cat" / "0.png")
    count_encoded()
    seen = FeatureStore.open(path, backbone, half, only_unchanged=True)
    assert seen.changed_images == 2
    assert seen.indices("test").tolist() == [0, 2, 3, 4, 5]
    cache_features(backbone, half, tmp_path / "cache", **ASK)
    assert count_encoded() == 2
    assert open_current(path, backbone, half).indices("test").tolist() == [0, 1, 2, 3, 4, 5]


def test_two_datasets_of_one_name_and_the_same_file_names_are_told_apart_by_bytes(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    other = make_folder(tmp_path / "other" / "animals", seed=1)
    assert other.digest == dataset.digest
    paths = [
        cache_features(backbone, one, tmp_path / one.root.parent.name, **ASK) for one in (dataset, other)
    ]
    alone = [FeatureStore.open(path).split("test")[0] for path in paths]
    for one, expected in ((dataset, alone[0]), (other, alone[1]), (dataset, alone[0])):
        path = cache_features(backbone, one, tmp_path / "shared", **ASK)
        assert torch.equal(FeatureStore.open(path).split("test")[0], expected)


def test_what_became_unreadable_is_named_and_its_old_features_are_not_used(
    backbone: Backbone, dataset: Dataset, tmp_path: Path
) -> None:
    path = cache_features(backbone, dataset, tmp_path, **ASK)
    (dataset.root / "test" / "cat" / "1.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 image of animals could not be read"):
            cache_features(backbone, dataset, tmp_path, **ASK)
        with pytest.raises(UserError, match="changed while"):
            open_current(path, backbone, dataset)
    cache_features(backbone, dataset, tmp_path, skip_unreadable=True, **ASK)
    assert open_current(path, backbone, dataset).split("test")[0].shape == (8, 8)


def test_pictures_that_change_while_they_are_cached_are_found_the_next_time(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, original = dataset.root / "test" / "dog" / "2.png", encode.start_encoding

    def change_then_encode(*arguments, **options):
        if victim.exists() and arguments[1].split == "test":
            invert(victim)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "start_encoding", change_then_encode)
        path = cache_features(backbone, dataset, tmp_path, **ASK)
    with pytest.raises(UserError, match=r"1 image file of animals changed while"):
        open_current(path, backbone, dataset)
    cache_features(backbone, dataset, tmp_path, **ASK)
    fresh = cache_features(backbone, dataset, tmp_path / "fresh", **ASK)
    stores = [open_current(one, backbone, dataset) for one in (path, fresh)]
    assert torch.allclose(*(store.split("test")[0] for store in stores), rtol=1e-2, atol=1e-3)


def test_parts_of_an_interrupted_run_are_not_taken_up_for_other_pictures(
    backbone: Backbone, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CROPS_PER_CHUNK", 8)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.features.cache.assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_features(backbone, dataset, tmp_path / "cut", **ASK)
    for file in dataset.root.rglob("*.png"):
        invert(file)
    stores = [cache_features(backbone, dataset, tmp_path / place, **ASK) for place in ("cut", "whole")]
    assert contents(stores[0]) == contents(stores[1])


@follows(
    "the first {}; delete {} and run `fastcoop cache-features`",
)
def test_check_reads_every_picture(backbone: Backbone, dataset: Dataset, tmp_path: Path) -> None:
    path = cache_features(backbone, dataset, tmp_path, **ASK)
    picture = dataset.root / "test" / "cat" / "1.png"
    before = picture.stat()
    content = bytearray(picture.read_bytes())
    content[-1] ^= 1  # of the same size and, below, of the same time
    picture.write_bytes(content)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert FeatureStore.open(path, backbone, dataset, only_unchanged=True).changed_images == 0
    assert check_store(path, dataset=dataset).problems == [
        f"1 test image file changed since the last encoding, the first {picture}; delete {path} "
        "and run `fastcoop cache-features`."
    ]
    path.unlink()
    cache_features(backbone, dataset, tmp_path, **ASK)
    assert check_store(path, dataset=dataset).ok


def test_dry_runs_of_changed_pictures_count_and_write_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fastcoop.sweeps import sweep
    from tests.small_world import write_backbone, write_dataset

    write_dataset(tmp_path / "data" / "colours")
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")),
        "datasets": "colours",
        "shots": [1],
        "seeds": [1, 2],
    }
    grid |= {"views": 1, "methods": {"linear_probe": {"search_steps": 1}}}
    places = {
        "data_root": tmp_path / "data",
        "cache": tmp_path / "cache",
        "results": tmp_path / "results",
        "jobs": 1,
    }
    sweep(grid, **places)
    store = tmp_path / "cache" / "tiny" / "colours.h5"
    before = store.read_bytes()
    drawn = FeatureStore.open(store).paths("train")
    invert(tmp_path / "data" / "colours" / drawn[0])
    with caplog.at_level(logging.WARNING, "fastcoop"):
        found = sweep(grid, **places, dry_run=True)
    assert (
        "1 image file of colours changed since the last encoding; a sweep would encode again." in caplog.text
    )
    assert found.left == 1  # the other seed does not learn from that picture
    assert found.forecast is not None
    assert found.forecast.crops == 2
    invert(tmp_path / "data" / "colours" / "test" / "green" / "0.png")
    assert sweep(grid, **places, dry_run=True).left == 2
    assert store.read_bytes() == before
    assert sweep(grid, **places).finished == 2
    assert sweep(grid, **places, dry_run=True).left == 0
    invert(tmp_path / "data" / "colours" / drawn[0])
    invert(tmp_path / "data" / "colours" / "test" / "green" / "0.png")
    assert (
        sweep(grid, **places).finished == 0
    )  # the pictures of the first sweep are back, and so are its keys


def test_targets_whose_pictures_changed_are_tested_again_by_evaluate_and_sweep(tmp_path: Path) -> None:
    from fastcoop.results import load_results
    from fastcoop.sweeps import evaluate, sweep
    from tests.small_world import write_backbone, write_dataset

    for seed, name in enumerate(("colours", "other")):
        write_dataset(tmp_path / "data" / name, seed=seed)
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")),
        "datasets": "colours",
        "methods": "zero_shot",
    }
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache"}
    results = tmp_path / "results"
    sweep(grid, results=results, jobs=1, **places)
    backbones = [str(tmp_path / "tiny")]

    def is_new() -> bool:
        (tested,) = evaluate(results, ["other"], backbones=backbones, **places)
        return tested.new

    assert [is_new(), is_new()] == [True, False]
    for file in (tmp_path / "data" / "other" / "test").rglob("*.png"):
        invert(file)
    assert [is_new(), is_new()] == [True, False]
    with_target = grid | {"targets": {"colours": "other"}}
    for file in (tmp_path / "data" / "other" / "test").rglob("*.png"):
        invert(file)
    assert sweep(with_target, results=results, jobs=1, **places).finished == 1
    assert sweep(with_target, results=results, jobs=1, **places).finished == 0
    assert len(load_results(results)) == 2
