"""Folders and CSV files of the user's own, good and bad."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastcoop.datasets import few_shot, load_dataset
from fastcoop.errors import UserError
from tests.advice import follows
from tests.datasets.conftest import images, refusal, sizes
from tests.small_world import write_dataset


def test_a_folder_per_class_is_split_50_20_30_and_always_alike(tmp_path, put, caplog):
    put(tmp_path / "pets", images("dog", "cat"))
    dataset = load_dataset("pets", tmp_path)
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog")
    assert dataset.template == "a photo of a {}."
    assert sizes(dataset) == {"train": 10, "val": 4, "test": 6}
    assert dataset.splits["test"].labels.dtype == np.int64
    every = [path for split in dataset.splits.values() for path in split.paths]
    assert sorted(every) == images("cat", "dog")
    for split in dataset.splits.values():
        assert all(
            path.startswith(dataset.class_names[y]) for path, y in zip(split.paths, split.labels, strict=True)
        )
    assert "split at random" in caplog.text
    again = load_dataset(tmp_path / "pets")
    assert again.digest == dataset.digest
    assert again.splits["train"].paths == dataset.splits["train"].paths


AB = ("train/a", "train/b")
LAYOUTS = {  # images; class names; images of train, val and test
    "folders of classes": (images("b", "a"), "ab", (10, 4, 6)),
    "train and test": (images(*AB) + images("test/a", "test/b", n=3), "ab", (16, 4, 6)),
    "train and val": (images(*AB) + images("val/a", "val/b", n=3), "ab", (16, 4, 6)),
    "train, val and test": (images(*AB, "val/a", "test/b", n=2), "ab", (4, 2, 2)),
    "capitals": (images("Train/a", "Train/b", "Val/a", "Test/b", n=2), "ab", (4, 2, 2)),
    "longer names": (images("training/a", "training/b", "valid/a", "testing/b", n=2), "ab", (4, 2, 2)),
    "validation and eval": (images("TRAIN/a", "TRAIN/b", "validation/a", "eval/b", n=2), "ab", (4, 2, 2)),
    "dev": (images(*AB, "dev/a", "test/b", n=2), "ab", (4, 2, 2)),
    "eval beside test": (images(*AB, "eval/a", "test/b", n=2), "ab", (4, 2, 2)),
    "a folder in every class": (images("c/Imgs", "d/Imgs/more", "e"), "cde", (15, 6, 9)),
    "a folder in classes of splits": (
        images("train/a/Imgs", "train/b/Imgs", "test/a/Imgs", "test/b", n=2),
        "ab",
        (2, 2, 4),
    ),
    "a folder around splits": (images("data/train/a", "data/train/b", "data/test/a", n=2), "ab", (2, 2, 2)),
    "a folder around a split's classes": (
        images("train/x/a", "train/x/b", "test/x/a", "test/x/b", n=2),
        "ab",
        (2, 2, 4),
    ),
    "a class called train": (
        images("bus", "car", "train") + images("train/2nd camera", n=30),
        ["bus", "car", "train"],
        (15, 6, 9),
    ),
    "a folder in a class called train": (images("bus/Imgs", "train/Imgs"), ["bus", "train"], (10, 4, 6)),
    "train in train": (images("train/train", "train/bus", "test/train", n=3), ["bus", "train"], (4, 2, 3)),
}
REFUSED = {
    "nothing": ([], "has no classes"),
    "one class": (images("a"), "has 1 class, expected at least two"),
    "a class of two images": (images("a") + images("b", n=2), 'Class "b"'),
    "train alone": (images(*AB), "no test/ folder"),
    "a folder beside splits": (images(*AB, "test/a", "extra/a"), "also extra/"),
    "a class of the test set": (images(*AB, "test/a", "test/c", n=3), "no training image for c"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_people_have(tmp_path, put, layout):
    paths, names, counts = LAYOUTS[layout]
    put(tmp_path, paths)
    dataset = load_dataset(tmp_path)
    assert list(dataset.class_names) == list(names)
    assert sizes(dataset) == dict(zip(("train", "val", "test"), counts, strict=True))
    every = [path for split in dataset.splits.values() for path in split.paths]
    assert len(every) == len(set(every))
    root = dataset.root.relative_to(tmp_path)
    assert {(root / path).as_posix() for path in every} <= set(paths)
    for split in dataset.splits.values():
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            assert f"/{dataset.class_names[label]}/" in f"/{path}"
    for path in dataset.splits["test"].paths:
        assert path.split("/")[0].lower() not in ("train", "training") or "train" in names


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_are_refused(tmp_path, put, layout):
    paths, message = REFUSED[layout]
    put(tmp_path, paths)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        *((3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 1, 2)), (7, (4, 1, 2))),
        *((11, (6, 2, 3)), (13, (6, 3, 4)), (45, (22, 9, 14))),
    ],
)
def test_shares_round_as_the_official_rule_does(tmp_path, put, n, expected):
    put(tmp_path, images("a", "b", n=n))
    splits = load_dataset(tmp_path).splits
    assert tuple(len(splits[key]) for key in ("train", "val", "test")) == tuple(2 * size for size in expected)
    assert all(set(split.labels) == {0, 1} for split in splits.values())


def test_a_split_file_with_images_beside_it(tmp_path, put):
    put(tmp_path / "images", ["x/1.jpg", "x/2.jpg", "3.jpg", "4.jpg", "5.jpg"])
    split = {
        "train": [["3.jpg", 1, "sea"], ["x/1.jpg", 0, "land"]],
        "val": [["4.jpg", 1, "sea"]],
        "test": [["5.jpg", 1, "sea"], ["x/2.jpg", 0, "land"]],
    }
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "dataset.yaml").write_text(
        'name: shore\ntemplate: "a satellite photo of {}."\nclass_names: {sea: open sea}\n'
    )
    dataset = load_dataset(tmp_path)
    assert (dataset.name, dataset.root) == ("shore", tmp_path / "images")
    assert dataset.template == "a satellite photo of {}."
    assert dataset.class_names == ("land", "open sea")
    assert dataset.splits["train"].paths == ("3.jpg", "x/1.jpg")
    assert dataset.splits["train"].labels.tolist() == [1, 0]
    assert dataset.splits["val"].paths == ("4.jpg",)


def test_a_csv_with_its_yaml(tmp_path, put):
    put(tmp_path / "pictures", images("p", n=6))
    rows = [f"pictures/p/{i:02d}.jpg,{'ab'[i % 2]},{['train', 'val', 'test'][i // 2]}" for i in range(6)]
    (tmp_path / "mine.csv").write_text("\n".join(["Path,Class,Split", *rows]))
    (tmp_path / "mine.yaml").write_text("class_names:\n  a: apple\n")
    dataset = load_dataset("mine.csv", tmp_path)
    assert dataset.name == "mine"
    assert dataset.class_names == ("apple", "b")
    assert dataset.splits["val"].paths == ("pictures/p/02.jpg", "pictures/p/03.jpg")
    assert dataset.splits["val"].labels.tolist() == [0, 1]


def test_a_csv_without_splits_and_with_absolute_paths(tmp_path, put):
    put(tmp_path / "elsewhere", images("p", n=20))
    rows = [f'"{tmp_path}/elsewhere/p/{i:02d}.jpg",{"ab"[i % 2]}' for i in range(20)]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mine.csv").write_text("\n".join(["path,class", *rows]))
    dataset = load_dataset(tmp_path / "lists" / "mine.csv")
    assert sizes(dataset) == {"train": 10, "val": 4, "test": 6}
    assert all((dataset.root / path).is_file() for split in dataset.splits.values() for path in split.paths)


def test_val_share_and_folders_that_yaml_would_read_as_numbers(tmp_path, put):
    put(tmp_path, images("0", "no"))
    (tmp_path / "dataset.yaml").write_text("val_share: 0.1\nclass_names: {0: zero, no: refusal}\n")
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == ("zero", "refusal")
    assert sizes(dataset) == {"train": 12, "val": 2, "test": 6}


def test_the_digest_is_of_names_and_splits_not_of_the_prompt(tmp_path, put):
    put(tmp_path, images("a", "b"))
    plain = load_dataset(tmp_path).digest
    (tmp_path / "dataset.yaml").write_text('template: "art of {}."')
    assert load_dataset(tmp_path).digest == plain
    (tmp_path / "dataset.yaml").write_text("class_names: {a: apple}")
    assert load_dataset(tmp_path).digest != plain
    (tmp_path / "dataset.yaml").unlink()
    put(tmp_path, ["a/more.jpg"])
    assert load_dataset(tmp_path).digest != plain


def test_training_images_among_the_test_images_are_warned_of(tmp_path, put, caplog):
    put(tmp_path, images("a", "b", n=2))
    rows = ["a/00.jpg,a,train", "b/00.jpg,b,train", "a/00.jpg,a,test", "b/01.jpg,b,test"]
    (tmp_path / "mine.csv").write_text("\n".join(["path,class,split", *rows]))
    load_dataset(tmp_path / "mine.csv")
    assert (
        "mine has 1 image in both train and test, such as a/00.jpg: runs are tested on images" in caplog.text
    )


def test_a_path_needs_no_data_root(tmp_path, put, monkeypatch):
    put(tmp_path / "pets", images("dog", "cat"))
    rows = "".join(f"pets/{name}/{i:02d}.jpg,{name}\n" for name in ("cat", "dog") for i in range(10))
    (tmp_path / "pets.csv").write_text("path,class\n" + rows)
    for spec in (tmp_path / "pets", tmp_path / "pets.csv"):
        assert load_dataset(spec, tmp_path / "nowhere").class_names == ("cat", "dog")
    monkeypatch.chdir(tmp_path)
    assert load_dataset("pets", "nowhere").digest == load_dataset(tmp_path / "pets").digest


def test_unknown_names_get_the_nearest(tmp_path, put):
    put(tmp_path / "my_flowers", images("a", "b"))
    assert 'Did you mean "my_flowers"?' in refusal("my_flower", tmp_path)
    assert 'Did you mean "oxford_pets"?' in refusal("oxfordpet", tmp_path)
    assert "data root" in refusal("my_flowers", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"train": [],\n"test": [}', "line 2 is not valid JSON"),
        ("[]", "must hold"),
        ('{"train": []}', 'no "test" split'),
        ('{"test": [], "vall": []}', 'Did you mean "val"?'),
        ('{"test": [["1.jpg", "0", "a"]]}', "entry 0 of test"),
        ('{"test": [["1.jpg", true, "a"]]}', "entry 0 of test"),
        ('{"test": [["1.jpg", 0, " "]]}', "entry 0 of test"),
        ('{"test": [["1.jpg", 0, "a"], ["2.jpg", 2, "b"]]}', "without gaps; no image has label 1"),
        ('{"test": [["1.jpg", 0, "a"], ["2.jpg", 1000000000000, "b"]]}', "no image has label 1."),
        ('{"test": [["1.jpg", 0, "a"], ["2.jpg", 0, "b"]]}', 'label 0 two names: "a" and "b"'),
        ('{"test": [["1.jpg", 0, "a"], ["9.jpg", 1, "b"]]}', "names 1 image (of 2)"),
        ('{"test": [], "train": [["1.jpg", 0, "a"], ["2.jpg", 1, "b"]]}', "no test images"),
        ('{"test": 5}', "must hold"),
        ("\ufeff" + "[" * 100_000, "too deep"),
        ('{"test": %s}' % ("1" * 5_000), "a number of thousands of digits"),
    ],
)
def test_bad_split_files(tmp_path, put, content, expected):
    put(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "split.json").write_text(content, encoding="utf-8")
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file,class\n", 'Name one of its columns "path"'),
        ("path;class\n", "separated by commas"),
        ("path,clas\n", 'got path, clas. Name one of its columns "class".'),
        ("path,class\n1.jpg,a\n2.jpg\n", "line 3 does not have the 2 columns"),
        ("path,class\n1.jpg,a,train\n", "line 2 does not have the 2 columns"),
        ("path,class\n1.jpg,\n", "line 2 has an empty class"),
        ("path,class,split\n1.jpg,a,trained\n", 'line 2 has the split "trained"'),
        ("path,class,split\n1.jpg,a,train\n7.jpg,b,test\n", "line 3 names 7.jpg"),
        ('path,class\n"1.jpg"x,a\n', "line 2 is not valid CSV"),
        ("path,class\n", "at least two"),
    ],
)
def test_bad_csv_files(tmp_path, put, content, expected):
    put(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "mine.csv").write_text(content)
    assert expected in refusal(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("template: 'x {}'\nname: [a\n", "line 3 is not valid YAML"),
        ("templat: 'x {}'", 'Did you mean "template"?'),
        ("template: a photo", "must have {} once"),
        ("template: 'a {} of {name}'", "must have {} once"),
        ("name: ../x", "name must be"),
        ("name: [a]", "name: Input should be a valid string, got ['a']"),
        ("val_share: 0.7", "val_share: Input should be less than or equal to 0.5, got '0.7'"),
        ("val_share: few", "val_share: Input should be a valid number"),
        ("class_names: {c: see}", 'renames class "c"'),
        ("class_names: [a, b]", "class_names: Input should be a valid dictionary"),
        ("- a", "keys and values"),
        ("name: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("[" * 20_000, "nested too deeply"),
        ("name: a\0b", "special characters are not allowed"),
        ("name:\n a: &a [x,x,x,x]\n b: &b [*a,*a,*a,*a]\n c: [*b,*b,*b,*b]\n", "valid string"),
    ],
)
def test_bad_yaml(tmp_path, put, content, expected):
    put(tmp_path, images("a", "b"))
    (tmp_path / "dataset.yaml").write_text(content)
    message = refusal(tmp_path)
    assert expected in message
    assert len(message) - len(str(tmp_path)) < 600


@follows(
    "have the same prompt, which cannot tell them apart; name them differently",
)
def test_classes_that_read_alike_are_warned_of(tmp_path, put, caplog):
    put(tmp_path, images("dark red", "Dark_red", "green"))
    load_dataset(tmp_path)
    assert "The classes Dark_red, dark red of" in caplog.text
    (tmp_path / "dataset.yaml").write_text("class_names: {Dark_red: ruby}")
    caplog.clear()
    load_dataset(tmp_path)
    assert "same prompt" not in caplog.text


def test_text_that_is_not_utf8(tmp_path, put):
    put(tmp_path, images("a", "b"))
    for file in ("dataset.yaml", "split.json", "mine.csv"):
        (tmp_path / file).write_bytes(b"\xff\xfe\x00path")
        assert "UTF-8" in refusal(tmp_path / file if file == "mine.csv" else tmp_path)
        (tmp_path / file).unlink()
    (tmp_path / "list.txt").write_text("")
    assert "is a file" in refusal(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("../../../../../../../../etc/hosts", "../etc/hosts"),
        ("/etc/hosts", "/etc/hosts"),
        ("C:\\data\\1.jpg", "C:\\data\\1.jpg"),
        ("a\0b/1.jpg", "a\0b/1.jpg"),
        ("\ud800/1.jpg", "\ud800/1.jpg"),
        ("x/../../1.jpg", "../1.jpg"),
    ],
)
def test_paths_of_a_split_file_stay_under_its_images(tmp_path, put, path, shown):
    put(tmp_path, ["1.jpg", "images/1.jpg", "images/2.jpg", "images/x/3.jpg"])
    (tmp_path / "split.json").write_text(json.dumps({"test": [[path, 0, "a"], ["2.jpg", 1, "b"]]}))
    message = refusal(tmp_path)
    assert "names 1 image (of 2) that cannot be found under" in message
    assert shown in message


def test_paths_are_told_apart_by_what_they_lead_to(tmp_path, put):
    put(tmp_path, images("a", "b", n=2))
    split = {"test": [["./a/00.jpg", 0, "a"], ["b//00.jpg", 1, "b"]]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert load_dataset(tmp_path).splits["test"].paths == ("a/00.jpg", "b/00.jpg")
    split["test"].append(["b/../a/00.jpg", 1, "b"])
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert "lists a/00.jpg more than once in test" in refusal(tmp_path)
    rows = ["a/00.jpg,a,train", "b/00.jpg,b,train", "a/01.jpg,a,test", "./a/00.jpg,b,train"]
    (tmp_path / "mine.csv").write_text("\n".join(["path,class,split", *rows]))
    assert "line 5 lists a/00.jpg, as line 2 does" in refusal(tmp_path / "mine.csv")


def test_training_images_that_are_all_validation_images_leave_nothing_to_learn_from(tmp_path, put, caplog):
    put(tmp_path, images("a", "b", n=3))
    part = [["a/00.jpg", 0, "a"], ["b/00.jpg", 1, "b"]]
    more = [*part, ["b/01.jpg", 1, "b"]]
    (tmp_path / "split.json").write_text(json.dumps({"train": more, "val": part, "test": part}))
    assert "has no training image for a that is not in val too" in refusal(tmp_path)
    (tmp_path / "split.json").write_text(
        json.dumps({"train": [*more, ["a/02.jpg", 0, "a"]], "val": part, "test": part})
    )
    dataset = load_dataset(tmp_path)
    assert [dataset.splits["train"].paths[at] for at in few_shot(dataset, "all", 1).train] == [
        "b/01.jpg",
        "a/02.jpg",
    ]
    assert (
        "has 2 images in both train and val, such as a/00.jpg and 1 more: they are used for validation only"
        in caplog.text
    )


def test_a_label_of_any_size_is_refused_at_once(tmp_path, put):
    put(tmp_path, ["1.jpg", "2.jpg"])
    for label in (10**9, 10**30):
        split = {"test": [["1.jpg", 0, "a"], ["2.jpg", label, "b"]]}
        (tmp_path / "split.json").write_text(json.dumps(split))
        assert "without gaps; no image has label 1" in refusal(tmp_path)


def test_a_thousand_classes_and_names_of_any_script(tmp_path, put):
    count = 1000
    put(tmp_path, [f"{split}/класс {i:04d} 猫/é 1.jpg" for split in ("train", "test") for i in range(count)])
    dataset = load_dataset(tmp_path)
    assert len(dataset.class_names) == count
    assert dataset.class_names[7] == "класс 0007 猫"
    assert dataset.splits["train"].labels.tolist() == list(range(count))


@follows(
    "set PYTHONUTF8=1 and run the same command again",
)
def test_names_that_a_locale_misreads_are_refused(tmp_path):
    """Prompts would say other letters; in C, those of the bytes."""
    write_dataset(tmp_path / "data" / "colours", train=1, val=1, test=1)
    for split in ("train", "val", "test"):
        (tmp_path / "data" / "colours" / split / "grey").rename(
            tmp_path / "data" / "colours" / split / "grün"
        )
    command = [sys.executable, "-m", "fastcoop.cli", "datasets", "check", "colours", "--data-root", "data"]
    locale = {
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    for utf8, code in (("0", 2), ("1", 0)):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
            env=os.environ | locale | {"PYTHONUTF8": utf8},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert ("set PYTHONUTF8=1" in done.stderr) == (utf8 == "0")


def test_classes_without_images_in_a_split_are_told(tmp_path, put):
    put(
        tmp_path,
        [f"{split}/{name}/{n}.jpg" for split in ("train", "val", "test") for name in "abc" for n in "12"],
    )
    assert not [note for note in load_dataset(tmp_path).notes if " images of " in note]
    for path in ("val/a", "test/b", "test/c"):
        shutil.rmtree(tmp_path / path)
    notes = "\n".join(load_dataset(tmp_path).notes)
    name = load_dataset(tmp_path).name
    assert (
        f"{name} has no validation images of a: what is chosen on the validation images is chosen without them"
        in notes
    )
    assert f"{name} has no test images of b, c: accuracies do not include them." in notes


def test_a_column_named_twice(tmp_path, put):
    put(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "d.csv").write_text("path,class,split, Class\n1.jpg,a,train,b\n2.jpg,b,test,a\n")
    with pytest.raises(UserError, match='line 1 names the column "class" twice; rename one of them'):
        load_dataset(tmp_path / "d.csv")
