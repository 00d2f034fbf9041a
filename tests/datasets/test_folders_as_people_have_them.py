"""Folders with junk, deeper levels, splits of other names, pictures left out, and names of any letters."""

from __future__ import annotations

import csv
import json
import os
import shutil
import unicodedata

import pytest
from PIL import Image

from fastcoop.datasets import few_shot, load_dataset
from fastcoop.datasets.load import check_dataset, survey
from fastcoop.datasets.names import read_config
from fastcoop.errors import UserError
from tests.advice import follows
from tests.datasets.conftest import images, refusal, sizes

JUNK = ["__MACOSX", "$RECYCLE.BIN", "lost+found", "System Volume Information", "@eaDir", ".ipynb_checkpoints"]
JUNK_FILES = ["Thumbs.db", "desktop.ini", "._00.jpg", ".DS_Store"]


def told(folder):
    """The notes, but for the one on a random split."""
    return [note for note in load_dataset(folder).notes if "split at random" not in note]


# --- junk of systems


def test_what_systems_leave_behind_is_passed_over_in_silence(tmp_path, put):
    put(tmp_path / "plain", images("cat", "dog"))
    put(tmp_path / "junk", images("cat", "dog"))
    for name in JUNK:
        put(tmp_path / "junk", [f"{name}/00.jpg", f"cat/{name}/00.jpg"])
    for name in JUNK_FILES:
        put(tmp_path / "junk", [name, f"dog/{name}"])
    plain, junk = load_dataset(tmp_path / "plain"), load_dataset(tmp_path / "junk")
    assert junk.digest == plain.digest
    assert told(tmp_path / "junk") == []
    put(tmp_path, ["__MACOSX/x.jpg", "._list.csv"])
    assert [one.name for one in survey(tmp_path) if one.status == "your own"] == ["junk", "plain"]


def test_junk_beside_splits_and_in_official_folders(tmp_path, put):
    put(tmp_path, images("train/a", "train/b", "test/a", "test/b", "__MACOSX/train/a", "train/__MACOSX", n=3))
    assert sizes(load_dataset(tmp_path)) == {"train": 4, "val": 2, "test": 6}
    put(tmp_path / "eurosat" / "2750", [*images("Forest", "River", "__MACOSX", n=4), "River/._00.jpg"])
    assert load_dataset("eurosat", tmp_path).class_names == ("Forest", "River")


# --- pictures that are not used


@follows(
    "move them into a class folder to use them",
    "let the names of JPEG files end in .jpg",
)
def test_pictures_in_subfolders_and_of_other_endings_are_counted_and_named(tmp_path, put, caplog):
    put(tmp_path, images("cat", "dog", n=4) + images("cat/second camera", n=7) + ["loose.jpg"])
    put(tmp_path / "dog", ["phone.heic", "phone.HEIC", "no ending", "odd.jpg_large", "unseen.jxl"])
    (tmp_path / "cat" / "notes.txt").write_text("BM and other words that begin no picture")
    (tmp_path / "cat" / "weights").write_bytes(b"\0" * 100)
    deeper, unknown = told(tmp_path)
    assert "leaves out 8 images beside or below its class folders, such as loose.jpg and 7 more" in deeper
    assert "leaves out 5 pictures with an unknown ending, such as dog/no ending and 4 more" in unknown
    assert deeper in caplog.text
    check = check_dataset(tmp_path)
    assert check.notes == load_dataset(tmp_path).notes
    # Doing what is said ends it.
    for path in (tmp_path / "cat" / "second camera").iterdir():
        path.rename(tmp_path / "cat" / f"second {path.name}")
    (tmp_path / "loose.jpg").unlink()
    for path in list((tmp_path / "dog").iterdir()):
        if path.suffix != ".jpg":
            path.rename(tmp_path / "dog" / f"{path.name}.jpg")
    assert told(tmp_path) == []
    assert sum(sizes(load_dataset(tmp_path)).values()) == 8 + 7 + 5


def test_endings_that_are_taken(tmp_path, put):
    put(
        tmp_path,
        [f"{c}/{i}{end}" for c in "ab" for i, end in enumerate((".jfif", ".JPG", ".jpe", ".Jpeg", ".TIF"))],
    )
    dataset = load_dataset(tmp_path)
    assert sum(sizes(dataset).values()) == 10
    assert told(tmp_path) == []


@follows(
    "if it holds masks, move it elsewhere",
    "if these are masks or copies, move them out of the class folders",
)
def test_masks_beside_pictures_are_used_and_said(tmp_path, put):
    put(tmp_path / "stem", images("a", "b", n=4) + [f"{c}/{i:02d}.png" for c in "ab" for i in range(4)])
    (note,) = told(tmp_path / "stem")
    assert "uses 8 images with the name of another one but for its ending" in note
    assert "a/00.jpg and a/00.png" in note
    words = ["a/00_mask.png", "a/01-seg.jpg", "a/02_mask_1.png", "b/00.mask.png"]
    put(tmp_path / "words", images("a", "b", n=4) + words)
    (note,) = told(tmp_path / "words")
    assert "uses 4 images" in note
    for word in words:
        (tmp_path / "words" / word).unlink()
    put(tmp_path / "words", ["a/death_mask.png", "b/mask.png"])  # no picture of the name without the word
    assert told(tmp_path / "words") == []
    put(tmp_path / "folders", images("images", "Masks"))
    (note,) = told(tmp_path / "folders")
    assert "has a class folder Masks/; if it holds masks, move it elsewhere" in note
    shutil.move(tmp_path / "folders" / "Masks", tmp_path / "masks")
    put(tmp_path / "folders", images("other"))
    assert told(tmp_path / "folders") == []


def test_columns_that_are_not_used_are_told(tmp_path, put):
    put(tmp_path, images("a", "b", n=3))
    rows = [f"{path},{path[0]},train,x,1" for path in images("a", "b", n=3)]
    (tmp_path / "list.csv").write_text("\n".join(["path,class,subset,note,width", *rows]))
    (note,) = told(tmp_path / "list.csv")
    assert note.endswith("has columns that are not used: subset, note, width.")


@pytest.mark.parametrize(
    "file", ["dataset.yaml", "split.json", "list.csv", "split_fewshot/shot_1-seed_1.pkl"]
)
def test_files_that_may_not_be_read_are_not_called_damaged(tmp_path, put, monkeypatch, file):
    put(tmp_path, [*images("a", "b"), "split_fewshot/x.jpg"])
    (tmp_path / file).write_text("path,class")

    def refused(path, *arguments, **more):
        raise PermissionError(13, "Permission denied")

    for name in ("open", "read_text", "read_bytes"):
        monkeypatch.setattr(f"pathlib.Path.{name}", refused)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); check that you may read it"):
        few_shot(load_dataset(tmp_path / file if file == "list.csv" else tmp_path), 1, 1)


# --- levels and splits


@pytest.mark.parametrize("inside", ["images", "dataset-resized/data", "train-photos"])
def test_one_folder_around_the_classes_is_looked_through(tmp_path, put, inside):
    put(tmp_path / "deep" / inside, images("cat", "dog"))
    put(tmp_path / "plain", images("cat", "dog"))
    (tmp_path / "deep" / "annotations").mkdir()
    (tmp_path / "deep" / "annotations" / "cat.xml").write_text("<x/>")
    deep = load_dataset("deep", tmp_path)
    assert (deep.name, deep.root) == ("deep", tmp_path / "deep" / inside)
    assert deep.digest == load_dataset("plain", tmp_path).digest
    (tmp_path / "deep" / inside / "dataset.yaml").write_text("class_names: {cat: tabby}")
    assert load_dataset("deep", tmp_path).class_names == ("tabby", "dog")
    assert load_dataset("deep", tmp_path).name == "deep"
    put(tmp_path / "deep", ["loose.jpg"])
    (tmp_path / "deep" / inside / "dataset.yaml").unlink()
    assert (
        "leaves out 1 image beside or below its class folders, such as loose.jpg"
        in told(tmp_path / "deep")[0]
    )


@follows(
    "move the images up into {}, or, if these folders are the classes, pass",
)
def test_several_folders_inside_a_class_are_refused_with_the_folder_to_pass(tmp_path, put):
    put(tmp_path, images("animals/cat", "animals/dog", "vehicles/bus", "vehicles/car"))
    message = refusal(tmp_path)
    assert "remove" not in message
    assert f"or, if these folders are the classes, pass {tmp_path / 'animals'}." in message
    assert load_dataset(tmp_path / "animals").class_names == ("cat", "dog")
    for path in [*(tmp_path / "animals").rglob("*.jpg"), *(tmp_path / "vehicles").rglob("*.jpg")]:
        path.rename(path.parents[1] / f"{path.parent.name}{path.name}")  # "move the images up"
    assert load_dataset(tmp_path).class_names == ("animals", "vehicles")


def test_a_folder_is_advised_to_be_removed_only_if_nothing_lies_in_it(tmp_path, put):
    put(tmp_path, images("cat", "dog"))
    (tmp_path / "owl" / "empty").mkdir(parents=True)
    assert "add some or remove the folder" in refusal(tmp_path)
    put(tmp_path, ["owl/empty/1.heic"])
    message = refusal(tmp_path)
    assert "remove" not in message
    assert "only files such as owl/empty/1.heic" in message
    put(tmp_path / "imagenet" / "images", ["train/n01440764/deep/1.JPEG", "val/n01440764/1.JPEG"])
    message = refusal("imagenet", tmp_path)
    assert "move the images up" in message
    assert "remove" not in message


def test_validation_images_are_the_test_set_where_there_is_no_other(tmp_path, put):
    put(tmp_path, images("train/a", "train/b", n=10) + images("val/a", "val/b", n=3))
    dataset = load_dataset(tmp_path)
    assert sizes(dataset) == {"train": 16, "val": 4, "test": 6}
    assert set(dataset.splits["test"].paths) == set(images("val/a", "val/b", n=3))
    assert not set(dataset.splits["val"].paths) & set(dataset.splits["test"].paths)
    assert any("its validation images are the test set" in note for note in dataset.notes)
    rows = [f"{path},{path[6]},train" for path in images("train/a", "train/b", n=10)]
    rows += [f"{path},{path[4]},validation" for path in images("val/a", "val/b", n=3)]
    (tmp_path / "list.csv").write_text("\n".join(["path,class,split", *rows]))
    assert sizes(load_dataset(tmp_path / "list.csv")) == {"train": 16, "val": 4, "test": 6}
    split = {"val": [["val/a/00.jpg", 0, "a"], ["val/b/00.jpg", 1, "b"]]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert sizes(load_dataset(tmp_path)) == {"test": 2}


@follows(
    ", or pass {}, which is split at random",
    "Add one, or pass {}, which is split at random",
)
def test_train_alone_is_refused_with_what_to_pass(tmp_path, put):
    put(tmp_path, images("train/a", "train/b"))
    message = refusal(tmp_path)
    assert f"pass {tmp_path / 'train'}, which is split at random" in message
    assert sizes(load_dataset(tmp_path / "train")) == {"train": 10, "val": 4, "test": 6}
    put(tmp_path, ["test/1.jpg", "test/2.jpg"])
    message = refusal(tmp_path)
    assert f"{tmp_path / 'test'} holds images but no class folders" in message
    assert f"pass {tmp_path / 'train'}, which is split at random" in message


@follows(
    "merge them, or move one elsewhere",
)
def test_two_folders_for_one_split_are_refused(tmp_path, put):
    put(tmp_path, images("train/a", "train/b", "val/a", "valid/a", "test/a", "test/b", n=2))
    assert "two folders for val, val/ and valid/" in refusal(tmp_path)
    shutil.move(tmp_path / "valid" / "a", tmp_path / "val" / "b")
    (tmp_path / "valid").rmdir()
    assert "val" in load_dataset(tmp_path).splits


@follows(
    "Move what is no split elsewhere",
)
def test_an_extra_folder_beside_splits(tmp_path, put):
    put(tmp_path, images("train/a", "train/b", "test/a", "test/b", n=2) + images("unlabeled", n=2))
    assert "but also unlabeled/ beside it" in refusal(tmp_path)
    shutil.move(tmp_path / "unlabeled", tmp_path.parent / f"{tmp_path.name}-unlabeled")
    assert "train" in load_dataset(tmp_path).splits


@follows(
    "for pictures that lie side by side write a .csv with the columns path, class, split, and load that",
    "add images, or say which image goes where in a split file or CSV",
    "add some, or take such classes out of the other splits too",
)
def test_what_refusals_tell_to_do_can_be_done(tmp_path, put):
    put(tmp_path / "flat", [f"{i}.jpg" for i in range(8)])
    assert "write a .csv with the columns path, class, split, and load that" in refusal(tmp_path / "flat")
    rows = [f"{i}.jpg,{'ab'[i % 2]},{'train' if i < 4 else 'test'}" for i in range(8)]
    assert sizes(write_csv(tmp_path / "flat", rows)) == {"train": 2, "val": 2, "test": 4}
    put(tmp_path / "few", images("a", "b", n=2))
    assert "say which image goes where in a split file or CSV" in refusal(tmp_path / "few")
    rows = [f"{c}/{i:02d}.jpg,{c},{split}" for c in "ab" for i, split in enumerate(("train", "test"))]
    assert sizes(write_csv(tmp_path / "few", rows)) == {"train": 2, "test": 2}
    put(tmp_path / "lacking", images("train/a", "train/b", "test/a", "test/b", "test/c", n=2))
    assert "has no training image for c; add some, or take such classes out" in refusal(tmp_path / "lacking")
    shutil.rmtree(tmp_path / "lacking" / "test" / "c")
    assert load_dataset(tmp_path / "lacking").class_names == ("a", "b")


@follows(
    "is a dataset of your own, put a dataset.yaml into it",
)
def test_an_own_folder_with_the_name_of_a_dataset_of_the_paper(tmp_path, put):
    put(tmp_path / "food101", images("soup", "salad"))
    message = refusal("food101", tmp_path)
    assert "Food101 is not in" in message
    assert f"If {tmp_path / 'food101'} is a dataset of your own, put a dataset.yaml into it" in message
    (tmp_path / "food101" / "dataset.yaml").touch()
    assert load_dataset("food101", tmp_path).class_names == ("salad", "soup")


# --- the same pictures in two splits


def write_csv(folder, rows):
    (folder / "list.csv").write_text("\n".join(["path,class,split", *rows]))
    return load_dataset(folder / "list.csv")


def test_val_and_test_of_the_same_images_are_told(tmp_path, put, caplog):
    put(tmp_path, [f"{i}.jpg" for i in range(12)])
    rows = [
        f"{i}.jpg,{'ab'[i % 2]},{s}" for i in range(12) for s in (["train"] if i < 8 else ["val", "test"])
    ]
    (note,) = write_csv(tmp_path, rows).notes
    assert "has 4 images in both val and test, such as 10.jpg and 3 more: what is chosen" in note
    assert note.endswith("is chosen on the test set.")
    assert caplog.text.count(note) == 1
    assert check_dataset(tmp_path / "list.csv").notes == (note,)


def test_copies_among_files_that_all_have_the_same_size(tmp_path):
    for split in ("train", "val", "test"):
        for i in range(600):  # too many to compare all
            name = f"{'ab'[i % 2]}/{f'{split}{i}' if i else 'copy'}.jpg"
            content = name if i else "mine" if split == "train" else "both"
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).write_bytes(content.encode().ljust(5000, b"."))
    (note,) = load_dataset(tmp_path).notes
    assert "has 1 image in both val and test, such as test/a/copy.jpg (the same as val/a/copy.jpg)" in note


@pytest.mark.parametrize("how", ["symlink", "hardlink", "copy", "renamed"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("val", "test", "has 2 images in both val and test"),
        ("train", "test", "has 2 images in both train and test"),
        ("train", "val", "has 2 images in both train and val"),
    ],
)
def test_links_and_copies_are_the_same_images(tmp_path, how, first, second, expected):
    for split in ("train", "val", "test"):
        for k, name in enumerate("ab"):
            for i in range(2):
                path = tmp_path / split / name / f"{split}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (90 * k, 100 * i, len(split) * 30)).save(path)
    assert load_dataset(tmp_path).notes == ()
    for name in "ab":
        source = tmp_path / first / name / f"{first}0.png"
        target = tmp_path / second / name / ("photo (1).png" if how == "renamed" else source.name)
        {"symlink": os.symlink, "hardlink": os.link}.get(how, shutil.copy)(source, target)
    (note,) = load_dataset(tmp_path).notes
    assert expected in note
    assert f"(the same as {first}/a/{first}0.png)" in note


@follows(
    "There are both {} and {}; leave one of them",
)
def test_val_share_that_changes_nothing_is_told(tmp_path, put):
    put(
        tmp_path,
        images("train/a", "train/b", n=4)
        + [f"val/{c}/v.jpg" for c in "ab"]
        + [f"test/{c}/t.jpg" for c in "ab"],
    )
    (tmp_path / "dataset.yml").write_text("val_share: 0.1\nname: mine")
    dataset = load_dataset(tmp_path)
    assert dataset.name == "mine"
    assert [note for note in dataset.notes if "val_share in" in note and "changes nothing" in note]
    (tmp_path / "dataset.yaml").write_text("name: other")
    assert "both" in refusal(tmp_path)
    (tmp_path / "dataset.yml").unlink()
    assert load_dataset(tmp_path).notes == ()


# --- names


def test_a_folder_of_plain_pictures_beside_its_csv_is_no_dataset(tmp_path, put):
    put(tmp_path, images("birds"))
    (tmp_path / "birds.csv").write_text(
        "path,class\n" + "".join(f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(images("birds")))
    )
    assert told(tmp_path / "birds.csv") == []


@follows(
    "Give another name, for a folder or CSV under name: of its YAML",
)
@pytest.mark.parametrize("name", ["con", "NUL", "aux.v2", "lpt1", "x.", "x" * 121])
def test_names_that_no_file_can_have_everywhere(tmp_path, put, name):
    put(tmp_path / "d", images("a", "b"))
    (tmp_path / "d" / "dataset.yaml").write_text(f"name: {name}")
    assert "so that it can name files on every system" in refusal(tmp_path / "d")
    if not name.endswith("."):
        (tmp_path / "d" / "dataset.yaml").unlink()
        (tmp_path / "d").rename(tmp_path / name)
        assert "under name: of its YAML" in refusal(tmp_path / name)
        (tmp_path / name / "dataset.yaml").write_text("name: fine")
        assert load_dataset(tmp_path / name).name == "fine"


@follows(
    "rename it, or give it a name under class_names of the dataset's YAML",
)
@pytest.mark.parametrize("name", ["_", " ", "__ _"])
def test_class_names_that_read_as_nothing(tmp_path, put, name):
    put(tmp_path, images(name, "b"))
    assert "is empty in a prompt" in refusal(tmp_path)
    (tmp_path / "dataset.yaml").write_text(json.dumps({"class_names": {name: "something"}}))
    assert "something" in load_dataset(tmp_path).class_names


@follows(
    "set PYTHONUTF8=1 where the locale is not UTF-8, else rename its folder",
)
def test_class_folders_that_are_not_utf8(tmp_path, put):
    put(tmp_path, images("a", "b"))
    shutil.copytree(os.fsencode(tmp_path / "a"), os.fsencode(tmp_path) + b"/caf\xe9")
    assert "is not UTF-8 text" in refusal(tmp_path)
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9", tmp_path / "café")
    os.rename(tmp_path / "b" / "00.jpg", os.fsencode(tmp_path) + b"/b/\xe9.jpg")  # a file may be called so
    assert "b/\udce9.jpg" in [
        path for split in load_dataset(tmp_path).splits.values() for path in split.paths
    ]


NFC, NFD = "café", unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(("written", "on_disk"), [(NFC, NFD), (NFD, NFC)])
def test_letters_composed_otherwise_are_the_same(tmp_path, put, written, on_disk):
    put(tmp_path / on_disk, images(on_disk, "b", n=4))
    dataset = load_dataset(written, tmp_path)
    assert dataset.name == NFC
    (tmp_path / on_disk / "dataset.yaml").write_text(f"class_names: {{{written}: coffee}}", encoding="utf-8")
    assert "coffee" in load_dataset(written, tmp_path).class_names
    (tmp_path / on_disk / "dataset.yaml").unlink()
    entries = [[f"{written}/{i:02d}.jpg", 0, "coffee"] for i in range(4)] + [["b/00.jpg", 1, "b"]]
    (tmp_path / on_disk / "split.json").write_text(json.dumps({"test": entries}))
    assert load_dataset(tmp_path / on_disk).splits["test"].paths[0] == f"{on_disk}/00.jpg"
    lines = [f"{on_disk}/{written}/{i:02d}.jpg,c" for i in range(4)] + [
        f"{on_disk}/b/{i:02d}.jpg,b" for i in range(4)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,class", *lines]), encoding="utf-8")
    assert sum(sizes(load_dataset(tmp_path / "list.csv")).values()) == 8


def test_class_folders_composed_otherwise_in_train_and_test_are_one_class(tmp_path, put):
    put(tmp_path, images(f"train/{NFC}", "train/b", f"test/{NFD}", "test/b", n=3))
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == ("b", NFC)
    assert dataset.splits["test"].labels.tolist() == [0] * 3 + [1] * 3
    put(tmp_path, images(f"train/{NFD}", f"test/{NFC}", n=3))  # two folders beside each other are two classes
    dataset = load_dataset(tmp_path)
    assert len(dataset.class_names) == 3
    assert any("have the same prompt" in note for note in dataset.notes)


def test_few_shot_files_written_where_letters_are_composed_otherwise(tmp_path, put):
    put(tmp_path, [f"train/{c}/{NFC}.jpg" for c in "ab"] + [f"test/{c}/1.jpg" for c in "ab"])
    (tmp_path / "split_fewshot").mkdir()
    kept = {"train": [[f"/Users/x/train/{c}/{NFD}.jpg", k, c] for k, c in enumerate("ab")], "val": []}
    (tmp_path / "split_fewshot" / "shot_1-seed_1.json").write_text(json.dumps(kept))
    assert few_shot(load_dataset(tmp_path), 1, 1).train.tolist() == [0, 1]


ODD = ["IMG\\1", "a\nb", 'say "x"', "-rf", " 1 ", "a\tb", "{}", "[CLASS]", "'", "a;b", "%s", "a,b"]


def test_file_names_of_any_characters(tmp_path, put):
    put(tmp_path, [f"{c}/{odd}.jpg" for c in "ab" for odd in ODD])
    plain = load_dataset(tmp_path)
    assert sum(sizes(plain).values()) == 2 * len(ODD)
    entries = [[f"{c}/{odd}.jpg", k, c] for k, c in enumerate("ab") for odd in ODD]
    (tmp_path / "split.json").write_text(json.dumps({"train": entries, "test": entries}))
    dataset = load_dataset(tmp_path)
    assert set(dataset.splits["test"].paths) == {path for path, *_ in entries}
    (tmp_path / "split_fewshot").mkdir()
    train = dataset.splits["train"]
    kept = [
        [f"/far/away/{path}", k, "ab"[k]] for path, k in zip(train.paths, train.labels.tolist(), strict=True)
    ]
    (tmp_path / "split_fewshot" / "shot_1-seed_1.json").write_text(json.dumps({"train": kept, "val": []}))
    assert few_shot(dataset, 1, 1).train.tolist() == list(range(len(train)))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "class"), *((path, name) for path, _, name in entries)])
    assert sum(sizes(load_dataset(tmp_path / "list.csv")).values()) == 2 * len(ODD)


def test_backslashes_are_separators_only_where_no_file_is_called_so(tmp_path, put):
    put(tmp_path, ["a/1.jpg", "a\\2.jpg", "b/1.jpg", "b/2.jpg"])
    split = {"test": [["a\\1.jpg", 0, "a"], ["a\\2.jpg", 0, "a"], ["b\\1.jpg", 1, "b"]]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert load_dataset(tmp_path).splits["test"].paths == ("a/1.jpg", "a\\2.jpg", "b/1.jpg")
    split["test"].append(["b/1.jpg", 1, "b"])
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert "lists b/1.jpg more than once" in refusal(tmp_path)


def test_links_that_lead_to_themselves_and_paths_too_long(tmp_path, put):
    put(tmp_path, images("cat", "dog"))
    plain = load_dataset(tmp_path).digest
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    os.symlink("..", tmp_path / "cat" / "up")
    assert load_dataset(tmp_path).digest == plain
    os.unlink(tmp_path / "cat" / "up")
    assert "There is no dataset xxx" in refusal("x" * 5000, tmp_path)
    assert "There is no dataset ~nobody-here" in refusal("~nobody-here/x", tmp_path)
    (tmp_path / "long.csv").write_text(f"path,class\n{'y' * 5000}.jpg,a\n")
    assert "line 2 names yyy" in refusal(tmp_path / "long.csv")


def test_lists_of_paths_that_join_to_one_text_have_digests_of_their_own(tmp_path, put):
    put(tmp_path, ["a\nb", "c", "a", "b\nc"])
    digests = set()
    for first, second in (("a\nb", "c"), ("a", "b\nc")):
        split = {"test": [[first, 0, "x"], [second, 1, "y"]]}
        (tmp_path / "split.json").write_text(json.dumps(split))
        digests.add(load_dataset(tmp_path).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("again", ["0", '"0"'])
def test_a_key_given_twice_in_the_yaml(tmp_path, put, again):
    put(tmp_path, images("0", "1"))
    (tmp_path / "dataset.yaml").write_text(f"class_names:\n  0: x\n  {again}: y\n")
    assert 'line 3: "0" was given before, in line 2; leave one.' in refusal(tmp_path)


def test_the_names_of_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcoop.yaml_text.MAX_VALUES", 5)
    shown = {f"n{i}": "x" for i in range(10)}
    (tmp_path / "dataset.yaml").write_text(f"class_names: {json.dumps(shown)}")
    assert read_config(tmp_path).class_names == shown


@pytest.mark.parametrize(
    "names",
    [("training_set", "test_set"), ("Train_Data", "Test-Data"), ("train images", "validation_images")],
)
def test_splits_with_a_word_behind(tmp_path, put, names):
    train, test = names
    put(tmp_path, images(f"{train}/{train}/a", f"{train}/{train}/b", f"{test}/{test}/a", f"{test}/{test}/b"))
    assert sizes(load_dataset(tmp_path)) == {"train": 16, "val": 4, "test": 20}
    put(tmp_path / "classes", images("set", "train set of railways"))  # no names of splits
    assert load_dataset(tmp_path / "classes").class_names == ("set", "train set of railways")
