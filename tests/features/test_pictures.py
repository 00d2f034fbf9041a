"""The pictures behind predictions: the right ones in the right order, and none that is not what was tested."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastcoop as fc
from fastcoop.errors import MissingFile, UserError
from fastcoop.methods.data import Data
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/colours``, one of whose test pictures cannot be read, and its store in ``cache``."""
    root = tmp_path_factory.mktemp("pictures")
    write_dataset(root / "data" / "colours")
    (root / "data" / "colours" / "test" / "green" / "1.png").write_bytes(b"no picture")
    backbone = fc.backbone_from_spec(write_backbone(root / "tiny"))
    dataset = fc.load_dataset("colours", root / "data")
    fc.cache_features(backbone, dataset, root / "cache", shots=[1], seeds=[1], views=0, skip_unreadable=True)
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "world"))


def recorded(root: Path, name: str = "colours") -> tuple[Data, str, str | None]:
    """What a run on the dataset records of its test."""
    dataset = fc.load_dataset(name, root / "data")
    data = Data(dataset, fc.FeatureStore.open(root / "cache" / "tiny" / "colours.h5", dataset=dataset))
    return data, data.test_digest, data.test_images


@pytest.mark.parametrize("name", ["colours", "colours:new", "colours:base"])
def test_pictures_stand_in_the_order_of_predictions(world: Path, name: str) -> None:
    data, test, images = recorded(world, name)
    found = fc.PictureFinder(world / "data", world / "cache").find(name, test, images)
    assert (
        len(found.paths) == len(data.test[1]) == {"colours": 19, "colours:new": 10, "colours:base": 9}[name]
    )
    assert "test/green/1.png" not in found.paths
    classes = [path.split("/")[1] for path in found.paths]
    assert classes == [data.class_names[label] for label in data.test[1]]
    small = Image.open(io.BytesIO(found.thumbnail(3)))
    with Image.open(world / "data" / "colours" / found.paths[3]) as picture:
        assert small.format == "JPEG"
        assert small.size == picture.size
        difference = np.asarray(small, float).mean((0, 1)) - np.asarray(picture.convert("RGB"), float).mean(
            (0, 1)
        )
    assert np.abs(difference).max() < 8


@pytest.mark.parametrize("with_store", [True, False])
def test_a_changed_or_missing_picture_is_never_shown(world: Path, with_store: bool) -> None:
    _, test, images = recorded(world)
    finder = fc.PictureFinder(world / "data", world / "cache" if with_store else world / "no-cache")
    if not with_store:  # of the unreadable picture only a store knows that it was left out
        with pytest.raises(UserError, match="are not those that these runs were tested on"):
            finder.find("colours", test, images)
        return
    folder = world / "data" / "colours" / "test" / "green"
    before = os.stat(folder / "0.png")
    Image.new("RGB", (24, 24)).save(folder / "0.png")
    os.utime(folder / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "3.png").touch()  # the same bytes at another time
    found = finder.find("colours", test, images)
    with pytest.raises(UserError, match=r"test/green/0\.png has changed since the run was tested"):
        found.thumbnail(found.paths.index("test/green/0.png"))
    assert found.thumbnail(found.paths.index("test/green/3.png"))
    (folder / "3.png").unlink()
    with pytest.raises(MissingFile, match="is missing"):
        found.thumbnail(found.paths.index("test/green/3.png"))
    with pytest.raises(UserError, match="are not those"):  # one picture fewer is another test
        finder.find("colours", test, images)


@follows("have changed since these runs were tested, and no feature store records which")
def test_without_a_store_all_pictures_are_compared_at_once(tmp_path: Path) -> None:
    root = tmp_path
    write_dataset(root / "data" / "colours")
    backbone = fc.backbone_from_spec(write_backbone(root / "tiny"))
    dataset = fc.load_dataset("colours", root / "data")
    fc.cache_features(backbone, dataset, root / "cache", shots=[1], seeds=[1], views=0)
    _, test, images = recorded(root)
    finder = fc.PictureFinder(root / "data", root / "elsewhere")
    found = finder.find("colours", test, images)
    assert found.thumbnail(0)
    (root / "data").rename(root / "moved")  # the folder may have another name than the dataset
    (root / "moved" / "colours" / "dataset.yaml").write_text("name: colours\n")
    (root / "moved" / "colours").rename(root / "moved" / "pictures")
    elsewhere = fc.PictureFinder(root / "moved", root / "elsewhere")
    assert len(elsewhere.find("colours", test, images, ["other", "pictures"]).paths) == 20
    with pytest.raises(UserError, match="There is no dataset colours under"):
        elsewhere.find("colours", test, images)
    path = root / "moved" / "pictures" / found.paths[7]
    Image.new("RGB", (24, 24)).save(path)
    with pytest.raises(UserError, match="no feature store records which"):
        elsewhere.find("colours", test, images, ["pictures"])
    assert len(elsewhere.find("colours", test, None, ["pictures"]).paths) == 20  # of results of version 1
    found = fc.PictureFinder(root / "moved", root / "cache").find("colours", test, images, ["pictures"])
    assert found.thumbnail(0)
    with pytest.raises(UserError, match="has changed"):
        found.thumbnail(7)
