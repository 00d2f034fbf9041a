"""Advice of the datasets package, followed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fastcoop.datasets import Dataset, few_shot, load_dataset
from fastcoop.datasets.load import survey
from fastcoop.datasets.official import OFFICIAL, OfficialDataset
from fastcoop.errors import UserError
from tests.advice import follows
from tests.datasets.conftest import JPEG
from tests.datasets.test_official_layouts import MINIATURES

Lay = Callable[[Path], None]


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(JPEG)


def classes(root: Path, *folders: str, images: int = 4) -> None:
    put(root, *(f"{folder}/{number}.jpg" for folder in folders for number in range(images)))


def write(root: Path, name: str, content: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content, encoding="utf-8")


def split_file(root: Path, **splits: Iterable[str]) -> None:
    content = {
        key: [[path, ord(path[0]) - ord("a"), path[0]] for path in paths] for key, paths in splits.items()
    }
    write(root, "split.json", json.dumps(content))


def refused(part: str, root: Path, spec: str = "") -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(spec or root, root)
    assert part in str(caught.value)


@follows("has {}, expected at least two; add images of others")
def test_a_second_class(tmp_path: Path) -> None:
    classes(tmp_path, "a")
    refused("expected at least two; add images of others", tmp_path)
    classes(tmp_path, "b")
    assert load_dataset(tmp_path).class_names == ("a", "b")


@follows("holds no images; add some or remove the folder")
@pytest.mark.parametrize("follow", [lambda root: classes(root, "c"), lambda root: (root / "c").rmdir()])
def test_an_empty_class_folder(tmp_path: Path, follow: Lay) -> None:
    classes(tmp_path, "a", "b")
    (tmp_path / "c").mkdir()
    refused("add some or remove the folder", tmp_path)
    follow(tmp_path)
    load_dataset(tmp_path)


@follows("Convert or rename the images, or move the folder elsewhere")
@pytest.mark.parametrize(
    "follow",
    [
        lambda root: [file.rename(file.with_suffix(".jpg")) for file in (root / "c").iterdir()],
        lambda root: shutil.move(root / "c", root.parent / "elsewhere"),
    ],
)
def test_a_class_folder_of_unknown_endings(tmp_path: Path, follow: Lay) -> None:
    root = tmp_path / "root"
    classes(root, "a", "b")
    put(root, *(f"c/{number}.picture" for number in range(4)))
    refused("Convert or rename the images, or move the folder elsewhere", root)
    follow(root)
    load_dataset(root)


@follows(
    "cannot be read ({}); check that you may read it, and the disk",
)
@pytest.mark.parametrize("name", ["os.scandir", "pathlib.Path.read_text"])
def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    classes(tmp_path, "a", "b")
    write(tmp_path, "dataset.yaml", "name: x")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(name, forbidden)
        refused("that you may read it", tmp_path)
    load_dataset(tmp_path)


@follows("is not UTF-8 text; save it as UTF-8")
def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    classes(tmp_path, "a", "b")
    (tmp_path / "dataset.yaml").write_bytes("template: 'é {}'".encode("latin-1"))
    refused("save it as UTF-8", tmp_path)
    write(tmp_path, "dataset.yaml", "template: 'é {}'")
    assert load_dataset(tmp_path).template == "é {}"


@follows("sort them into a folder per class")
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_class_folders(tmp_path: Path, split: str) -> None:
    classes(tmp_path, "train/a", "train/b", "test/a", "test/b")
    shutil.rmtree(tmp_path / split)
    put(tmp_path, *(f"{split}/{name}{number}.jpg" for name in "ab" for number in range(4)))
    refused("sort them into a folder per class", tmp_path)
    for file in list((tmp_path / split).iterdir()):
        (tmp_path / split / file.name[0]).mkdir(exist_ok=True)
        file.rename(tmp_path / split / file.name[0] / file.name)
    assert load_dataset(tmp_path).class_names == ("a", "b")


@follows("sort its images into a folder per class (n01440764, ...)")
def test_imagenet_without_class_folders(tmp_path: Path) -> None:
    images = tmp_path / "imagenet" / "images"
    classes(images, "train/n01440764", "train/n01443537")
    put(images, "val/ILSVRC2012_val_1.JPEG", "val/ILSVRC2012_val_2.JPEG")
    refused("sort its images into a folder per class", tmp_path, "imagenet")
    for folder, file in zip(("n01440764", "n01443537"), list((images / "val").iterdir()), strict=True):
        (images / "val" / folder).mkdir()
        file.rename(images / "val" / folder / file.name)
    assert load_dataset("imagenet", tmp_path).class_names == ("tench", "goldfish")


@follows('has no "test" split, nor "val"; add one of them')
@pytest.mark.parametrize("added", ["test", "val"])
def test_a_split_file_of_training_images_alone(tmp_path: Path, added: str) -> None:
    classes(tmp_path, "a", "b")
    train = [f"{name}/{number}.jpg" for name in "ab" for number in (0, 1, 2)]
    split_file(tmp_path, train=train)
    refused("add one of them", tmp_path)
    split_file(tmp_path, train=train, **{added: ["a/3.jpg", "b/3.jpg"]})
    assert len(load_dataset(tmp_path).splits["test"]) == 2


@follows("lists {} more than once in {}; list each image once")
def test_a_split_file_with_an_image_twice(tmp_path: Path) -> None:
    classes(tmp_path, "a", "b")
    split_file(tmp_path, test=["a/0.jpg", "b/0.jpg", "a/0.jpg"])
    refused("list each image once", tmp_path)
    split_file(tmp_path, test=["a/0.jpg", "b/0.jpg"])
    load_dataset(tmp_path)


@follows("extract the whole dataset there, or fix the list")
@pytest.mark.parametrize(
    "follow", [lambda root: put(root, "b/9.jpg"), lambda root: split_file(root, test=["a/0.jpg", "b/0.jpg"])]
)
def test_a_split_file_with_missing_images(tmp_path: Path, follow: Lay) -> None:
    classes(tmp_path, "a", "b")
    split_file(tmp_path, test=["a/0.jpg", "b/9.jpg"])
    refused("extract the whole dataset there, or fix the list", tmp_path)
    follow(tmp_path)
    load_dataset(tmp_path)


@follows("is not valid JSON: {}; download or write the file again")
def test_a_split_file_that_is_not_json(tmp_path: Path) -> None:
    classes(tmp_path, "a", "b")
    write(tmp_path, "split.json", '{"test": [')
    refused("write the file again", tmp_path)
    split_file(tmp_path, test=["a/0.jpg", "b/0.jpg"])
    load_dataset(tmp_path)


@follows(
    "lists {}, as line {} does; list each image once",
    'names the column "{}" twice; rename one of them',
    'Name one of its columns "{}"',
)
@pytest.mark.parametrize(
    ("wrong", "right", "part"),
    [
        (
            "path,class,split\na/0.jpg,a,train\na/0.jpg,a,train",
            "path,class,split\na/0.jpg,a,train",
            "list each",
        ),
        (
            "path,class,split,split\na/0.jpg,a,train,1",
            "path,class,split,old\na/0.jpg,a,train,1",
            "rename one",
        ),
        ("file,class,split\na/0.jpg,a,train", "path,class,split\na/0.jpg,a,train", 'its columns "path"'),
    ],
)
def test_a_csv_with_a_mistake(tmp_path: Path, wrong: str, right: str, part: str) -> None:
    classes(tmp_path, "a", "b")
    rest = "".join(
        f"\n{name}/{number}.jpg,{name},{split}" + ",1" * (right.split("\n")[0].count(",") - 2)
        for name, number, split in (("b", 0, "train"), ("a", 1, "test"), ("b", 1, "test"))
    )
    write(tmp_path, "list.csv", wrong + rest)
    refused(part, tmp_path, "list.csv")
    write(tmp_path, "list.csv", right + rest)
    load_dataset("list.csv", tmp_path)


@follows("is not a folder; pass the folder that holds the datasets")
@pytest.mark.parametrize("call", [survey, lambda root: load_dataset("mine", root)])
def test_a_data_root_that_is_not_there(tmp_path: Path, call: Callable[[Path], object]) -> None:
    classes(tmp_path / "mine", "a", "b")
    with pytest.raises(UserError, match="pass the folder that holds the datasets"):
        call(tmp_path / "date")
    call(tmp_path)


@follows(
    "get {} and extract it in {}, which makes {}",
    "get {} and put it in {}, as {}",
)
@pytest.mark.parametrize("row", OFFICIAL.values(), ids=lambda row: row.name)
def test_an_official_dataset_that_is_not_there(tmp_path: Path, row: OfficialDataset) -> None:
    """Each download is put where the sentence says."""
    makes = {str(tmp_path / one.makes) for one in row.downloads if one.makes.split("/")[-1] != row.split_file}
    with pytest.raises(UserError, match="; get ") as caught:
        load_dataset(row.name, tmp_path)
    assert all(f" {place}" in str(caught.value) for place in makes)
    home = tmp_path / row.folder
    home.mkdir()

    def put_under(root: Path, paths: Iterable[str]) -> None:
        put(root, *paths)

    MINIATURES[row.name](home, put_under)
    assert all(os.path.exists(place) for place in makes)
    load_dataset(row.name, tmp_path)


def _subset(dataset: Dataset, content: bytes, suffix: str) -> Path:
    path = dataset.fewshot_dir / f"shot_1-seed_1.{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@follows(
    "is not an official few-shot subset, or damaged; delete it",
    "but {} has no {} split; delete it",
    "has no training images; delete it, and a subset is drawn",
    "delete it, or use the split file that it was drawn from",
)
@pytest.mark.parametrize(
    ("content", "suffix", "part"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", "pkl", "is not an official few-shot subset"),
        (b"no pickle", "pkl", "is not an official few-shot subset"),
        (
            b'{"train": [["a/0.jpg", 0, "a"]], "val": [["a/1.jpg", 0, "a"]]}',
            "json",
            "has no val split; delete it",
        ),
        (pickle.dumps({"train": [], "val": []}), "pkl", "delete it, and a subset is drawn"),
        (b'{"train": [["c/0.jpg", 0, "a"]]}', "json", "delete it, or use the split file"),
    ],
)
def test_a_few_shot_subset_that_cannot_be_used(
    tmp_path: Path, content: bytes, suffix: str, part: str
) -> None:
    classes(tmp_path, "a", "b")
    split_file(tmp_path, train=["a/0.jpg", "b/0.jpg"], test=["a/2.jpg", "b/2.jpg"])
    dataset = load_dataset(tmp_path)
    dataset = type(dataset)(
        **(vars(dataset) | {"splits": {k: s for k, s in dataset.splits.items() if k != "val"}})
    )
    path = _subset(dataset, content, suffix)
    with pytest.raises(UserError) as caught:
        few_shot(dataset, 1, 1)
    assert part in str(caught.value)
    path.unlink()
    assert len(few_shot(dataset, 1, 1).train) == 2
