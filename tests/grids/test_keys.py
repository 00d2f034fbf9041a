"""What makes two runs the same: what matters changes a run's key, and what does not leaves it as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcoop.datasets import few_shot, load_dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features
from fastcoop.results import load_contexts, load_results
from fastcoop.results.store import ResultsStore
from fastcoop.sweeps import Summary
from tests.small_world import write_dataset

Sweep = Callable[..., Summary]


@pytest.fixture
def small(grid: dict[str, Any]) -> dict[str, Any]:
    """A zero-shot run, a probe and two of CoOp."""
    coop = {"context_length": 2, "epochs": 2, "class_position": ["end", "mid"]}
    return grid | {
        "shots": 1,
        "seeds": 1,
        "methods": {"zero_shot": None, "linear_probe": {"iterations": 5}, "coop": coop},
    }


@pytest.fixture
def folders(world: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy of the world's pictures, with features and results of its own."""
    shutil.copytree(world / "data", tmp_path / "data")
    return {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}


def repaint(folder: Path) -> None:
    """Other pictures of the same names."""
    for path in folder.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


@pytest.mark.parametrize(("split", "anew"), [("train", 3), ("val", 4), ("test", 4)])
def test_other_pictures_of_the_same_names_are_other_runs(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], split: str, anew: int
) -> None:
    """Zero-shot CLIP alone has nothing to do with training pictures."""
    assert run(small, **folders).finished == 4
    repaint(folders["data_root"] / "colours" / split)
    shutil.rmtree(folders["cache"])
    assert run(small, **folders).finished == anew
    assert run(small, **folders).finished == 0


def test_nothing_else_that_is_cached_makes_other_runs(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    assert run(small, **folders).finished == 4
    assert run(small | {"views": 3, "shots": 2}, **folders, only=["coop"]).finished == 2
    store = FeatureStore.open(folders["cache"] / "tiny" / "colours.h5")
    assert store.meta.views == 3
    assert run(small, **folders, dry_run=True).done_before == 4
    assert run(small | {"views": 3}, **folders).finished == 2, "the number of views matters to CoOp alone"


def test_features_that_are_not_cached_yet_are_known_once_they_are(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Runs of more shots are planned before their images are cached."""
    run(small, **folders)
    run(small | {"shots": [1, 2]}, **folders)
    assert run(small | {"shots": [1, 2]}, **folders).finished == 0
    assert load_results(folders["results"]).key.is_unique


def test_places_jobs_memory_and_order_make_no_other_runs(
    run: Sweep, world: Path, small: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    run(small, **folders)
    for name in folders.values():
        shutil.move(name, tmp_path / f"moved-{name.name}")
    moved = {key: tmp_path / f"moved-{path.name}" for key, path in folders.items()}
    shutil.copytree(world / "tiny", tmp_path / "elsewhere" / "tiny")
    turned = small | {"methods": [{name: own} for name, own in reversed(small["methods"].items())]}
    turned |= {"backbones": str(tmp_path / "elsewhere" / "tiny")}
    assert run(turned, **moved | {"jobs": 2}, memory_budget=0.5).finished == 0


def test_a_dataset_that_was_renamed_is_done(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    run(small, **folders)
    (folders["data_root"] / "colours").rename(folders["data_root"] / "tints")
    summary = run(small | {"datasets": "tints"}, **folders)
    assert (summary.done_before, summary.finished) == (4, 0)


def test_a_target_that_changed_is_tested_again(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small |= {
        "targets": {"colours": "other"},
        "methods": {"zero_shot": None, "coop": small["methods"]["coop"]},
    }
    run(small, **folders)
    before = load_results(folders["results"])
    shutil.rmtree(folders["data_root"] / "other")
    write_dataset(folders["data_root"] / "other", ("purple", "green", "grey"), train=0, val=0)
    (folders["cache"] / "tiny" / "other.h5").unlink()
    monkeypatch.setattr("fastcoop.engine.train", lambda *_, **__: pytest.fail("trained again"))
    assert run(small, **folders, dry_run=True).done_before == 0
    assert run(small, **folders).finished == 3
    after = load_results(folders["results"])
    assert len(after) == len(before) == 6
    assert set(after[after.dataset == "other"].chance.round(1)) == {33.3}
    assert run(small, **folders).finished == 0


def test_a_backbone_that_was_renamed_goes_on_with_its_batches(
    run: Sweep, world: Path, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small["methods"] = {"coop": small["methods"]["coop"] | {"class_specific": [False, True]}}
    run(small, results=tmp_path / "whole")
    record = ResultsStore.record

    def interrupted(store: ResultsStore, planned: Any, *rest: Any) -> None:
        record(store, planned, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultsStore, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small, results=tmp_path / "cut")
    shutil.copytree(world / "tiny", tmp_path / "renamed")
    summary = run(small | {"backbones": str(tmp_path / "renamed")}, results=tmp_path / "cut")
    assert (summary.done_before, summary.finished, summary.failed) == (1, 3, {})
    for key in load_results(tmp_path / "whole").key:
        assert np.array_equal(load_contexts(tmp_path / "whole", key), load_contexts(tmp_path / "cut", key))
    both = {"backbones": [str(world / "tiny"), str(tmp_path / "renamed")]}
    with pytest.raises(UserError, match="backbones tiny and renamed have the same weights"):
        run(small | both, results=tmp_path / "cut")


def test_unreadable_test_images_make_another_test(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Labels are kept by test; those of all images are not those of all but one."""
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.methods import Data

    dataset = load_dataset("colours", folders["data_root"])
    backbone = backbone_from_spec(small["backbones"])
    (dataset.root / dataset.splits["test"].paths[0]).write_bytes(b"no picture")
    with suppress(UserError):  # of the image that is left out
        cache_features(
            backbone, dataset, folders["cache"], shots=[1], seeds=[1], views=0, skip_unreadable=True
        )
    path = folders["cache"] / "tiny" / "colours.h5"
    data = Data(dataset, FeatureStore.open(path, backbone, dataset))
    assert len(data.test[1]) == len(dataset.splits["test"]) - 1
    assert data.test_digest != Data(dataset, None).test_digest == dataset.digest


def test_a_schedule_in_steps_counts_the_images_that_can_be_read(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    """An epoch over four images is two steps of two, over three of them one."""
    dataset = load_dataset("colours", folders["data_root"])
    only_first = set(few_shot(dataset, 1, 1).train) - set(few_shot(dataset, 1, 2).train)
    (dataset.root / dataset.splits["train"].paths[min(only_first)]).write_bytes(b"no picture")
    with suppress(UserError):  # of the image that is left out
        cache_features(
            small["backbones"],
            dataset,
            folders["cache"],
            shots=[1],
            seeds=[1, 2],
            views=1,
            skip_unreadable=True,
        )
    small |= {"methods": {"coop": {"context_length": 2, "batch_size": 2, "epochs": "8 steps"}}}
    assert run(small | {"seeds": [1, 2]}, **folders).finished == 2
    assert run(small | {"seeds": [2]}, **folders).finished == 0
    table = load_results(folders["results"]).sort_values("seed")
    assert table.train_images.tolist() == [3, 4]
    assert table.epochs.tolist() == [8, 4]
    assert table.losses.map(lambda text: len(json.loads(text))).tolist() == [8, 4]
