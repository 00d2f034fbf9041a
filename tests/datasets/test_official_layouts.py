"""The fifteen datasets: a miniature of each, laid out and annotated as the real one is."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from fastcoop.datasets import few_shot, load_dataset
from fastcoop.datasets import load as survey_module
from fastcoop.datasets.load import check_dataset, survey
from fastcoop.datasets.official import OFFICIAL, find_official, wordnet_names
from fastcoop.errors import UserError
from tests.advice import follows

N = 10  # images per class


def numbered(*folders, n=N):
    return [f"{folder}/image_{i:04d}.jpg" for folder in folders for i in range(1, n + 1)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def caltech101(home, put):
    folders = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "airplanes", "car_side"]
    put(home / "101_ObjectCategories", numbered(*folders))
    return ["face", "leopard", "airplane", "car_side"]


def oxford_pets(home, put):
    pets = {"Abyssinian": 1, "american_bulldog": 2, "Bombay": 3}
    put(home / "images", [f"{pet}_{i}.jpg" for pet in pets for i in range(N)])
    (home / "images" / "Abyssinian_100.mat").write_text("the real folder has such files as well")
    lines = {"trainval": range(7), "test": range(7, N)}
    for file, which in lines.items():
        text = "".join(f"{pet}_{i} {y} 1 {y}\n" for pet, y in pets.items() for i in which)
        write(home / "annotations" / f"{file}.txt", text)
    return ["abyssinian", "american_bulldog", "bombay"]


def stanford_cars(home, put):
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    put(home, [f"cars_train/{i:05d}.jpg" for i in range(14)] + [f"cars_test/{i:05d}.jpg" for i in range(6)])
    (home / "devkit").mkdir()
    scipy.io.savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    for file, n in (("devkit/cars_train_annos.mat", 14), ("cars_test_annos_withlabels.mat", 6)):
        rows = np.empty((1, n), dtype=[("bbox_x1", object), ("class", object), ("fname", object)])
        for i in range(n):
            rows[0, i] = (i, i % 2 + 1, f"{i:05d}.jpg")
        scipy.io.savemat(home / file, {"annotations": rows})
    return ["2000 AM General Hummer SUV", "2012 Acura RL Sedan"]


def oxford_flowers(home, put):
    labels = [77, 77, 1, 2] * N
    put(home / "jpg", [f"image_{i:05d}.jpg" for i in range(1, len(labels) + 1)])
    # the classes in use here are 1, 2 and 3: the real file has all of 1 to 102
    labels = [3 if label == 77 else label for label in labels]
    scipy.io.savemat(home / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    write(
        home / "cat_to_name.json", json.dumps({"2": "sweet pea", "1": "pink primrose", "3": "passion flower"})
    )
    return ["pink primrose", "sweet pea", "passion flower"]


def food101(home, put):
    put(home / "images", numbered("apple_pie", "waffles"))
    return ["apple_pie", "waffles"]


def fgvc_aircraft(home, put):
    put(home / "images", [f"{i:07d}.jpg" for i in range(12)])
    write(home / "variants.txt", "707-320\nMD-11\nDouglas DC-3\n")
    for k, key in enumerate(("train", "val", "test")):
        names = ["707-320", "MD-11", "Douglas DC-3"]
        text = "".join(f"{i:07d} {names[i % 3]}\n" for i in range(12) if i // 4 == k)
        write(home / f"images_variant_{key}.txt", text)
    return ["707-320", "MD-11", "Douglas DC-3"]


def sun397(home, put):
    classes = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bar"]
    write(home / "ClassName.txt", "\n".join(classes))
    put(home / "SUN397", [f"{c[1:]}/sun_{i}.jpg" for c in classes for i in range(N)])
    for file, which in (("Training_01.txt", range(5)), ("Testing_01.txt", range(5, N))):
        write(home / file, "\n".join(f"{c}/sun_{i}.jpg" for c in classes for i in which))
    return ["abbey", "outdoor apartment_building", "bar"]


def dtd(home, put):
    put(home / "images", numbered("banded", "zigzagged"))
    return ["banded", "zigzagged"]


def eurosat(home, put):
    put(home / "2750", numbered("AnnualCrop", "Forest", "SeaLake"))
    return ["Annual Crop Land", "Forest", "Sea or Lake"]


def ucf101(home, put):
    actions = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "Biking": "Biking", "YoYo": "Yo_Yo"}
    write(
        home / "ucfTrainTestlist/classInd.txt", "".join(f"{i} {a}\n" for i, a in enumerate(actions, start=1))
    )
    frames = {a: [f"v_{a}_g{i:02d}_c01" for i in range(N)] for a in actions}
    put(home / "UCF-101-midframes", [f"{actions[a]}/{f}.jpg" for a in actions for f in frames[a]])
    train = "".join(f"{a}/{f}.avi {y}\n" for y, a in enumerate(actions, 1) for f in frames[a][:7])
    test = "".join(f"{a}/{f}.avi\n" for a in actions for f in frames[a][7:])
    write(home / "ucfTrainTestlist/trainlist01.txt", train)
    write(home / "ucfTrainTestlist/testlist01.txt", test)
    return list(actions.values())


def imagenet(home, put):
    put(home / "images", numbered("train/n01440764", "train/n01443537", n=40))
    put(home / "images", numbered("val/n01440764", "val/n01443537", n=3))
    return ["tench", "goldfish"]


def imagenetv2(home, put):
    put(home / "imagenetv2-matched-frequency-format-val", numbered("0", "2", "10", "999", n=2))
    return ["tench", "great white shark", "brambling", "toilet paper"]


def shifted(folder):
    def lay_out(home, put):
        put(home / folder, numbered("n01443537", "n01440764", "n15075141", n=2))
        (home / folder / "README.txt").write_text("the real ones come with one")
        return ["tench", "goldfish", "toilet paper"]

    return lay_out


MINIATURES = {
    "imagenet": imagenet,
    "caltech101": caltech101,
    "oxford_pets": oxford_pets,
    "stanford_cars": stanford_cars,
    "oxford_flowers": oxford_flowers,
    "food101": food101,
    "fgvc_aircraft": fgvc_aircraft,
    "sun397": sun397,
    "dtd": dtd,
    "eurosat": eurosat,
    "ucf101": ucf101,
    "imagenetv2": imagenetv2,
    "imagenet_sketch": shifted("images"),
    "imagenet_a": shifted("imagenet-a"),
    "imagenet_r": shifted("imagenet-r"),
}
SIZES = {  # classes are equal in size: per class train, val, test
    "imagenet": (40, 4, 3),
    "oxford_pets": (6, 1, 3),
    "stanford_cars": (6, 1, 3),
    "sun397": (4, 1, 5),
    "ucf101": (6, 1, 3),
}
RANDOM = ("caltech101", "food101", "dtd", "eurosat")
TEST_ONLY = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


@pytest.fixture(params=MINIATURES)
def miniature(request, tmp_path, put):
    row = find_official(request.param)
    home = tmp_path / row.folder
    home.mkdir()
    return row, tmp_path, MINIATURES[row.name](home, put)


def test_there_are_fifteen():
    assert list(OFFICIAL) == list(MINIATURES)
    assert sum(row.split_file is not None for row in OFFICIAL.values()) == 9


def test_loads_from_its_own_files(miniature, caplog):
    row, root, names = miniature
    dataset = load_dataset(row.name, root)
    assert list(dataset.class_names) == names
    assert (dataset.name, dataset.title, dataset.template) == (row.name, row.title, row.template)
    assert dataset.root == root / row.folder / row.images
    counts = {key: Counter(split.labels.tolist()) for key, split in dataset.splits.items()}
    if row.name in SIZES or row.name in RANDOM:
        sizes = SIZES.get(row.name, (5, 2, 3))
        assert counts == {
            key: dict.fromkeys(range(len(names)), n)
            for key, n in zip(("train", "val", "test"), sizes, strict=True)
        }
    elif row.name in TEST_ONLY:
        assert counts == {"test": dict.fromkeys(range(len(names)), 2)}
    elif row.name == "fgvc_aircraft":
        assert counts == {"train": {0: 2, 1: 1, 2: 1}, "val": {1: 2, 2: 1, 0: 1}, "test": {2: 2, 0: 1, 1: 1}}
    else:
        assert counts["train"] == {0: 5, 1: 5, 2: 10}
    for split in dataset.splits.values():
        assert all((dataset.root / path).is_file() for path in split.paths)
    assert ("not the official one" in caplog.text) == (row.split_file is not None)
    assert load_dataset(row.title, root).digest == dataset.digest
    assert load_dataset(root / row.folder).digest == dataset.digest


def test_labels_follow_the_pictures(miniature):
    row, root, _ = miniature
    dataset = load_dataset(row.name, root)
    if row.name in ("oxford_flowers", "stanford_cars", "fgvc_aircraft"):
        return  # their file names do not tell the class; the counts above are of the annotations
    seen = {}
    for split in dataset.splits.values():
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            parts = path.removeprefix("train/").removeprefix("val/").rpartition("/")
            seen.setdefault(parts[0] or parts[2].rpartition("_")[0], set()).add(label)
    assert sorted(map(tuple, seen.values())) == [(label,) for label in range(len(dataset.class_names))]


@follows(
    "numbers will not compare exactly. Get {}.",
)
@pytest.mark.parametrize(
    "miniature", [row.name for row in OFFICIAL.values() if row.split_file], indirect=True
)
def test_loads_from_its_official_split_file(miniature, caplog):
    row, root, names = miniature
    built = load_dataset(row.name, root)
    caplog.clear()
    content = {
        key: [
            [path, label, f"official {names[label]}"]
            for path, label in reversed(list(zip(split.paths, split.labels.tolist(), strict=True)))
        ]
        for key, split in built.splits.items()
    }
    write(root / row.folder / row.split_file, json.dumps(content))
    dataset = load_dataset(row.name, root)
    assert dataset.splits["train"].paths == built.splits["train"].paths[::-1]
    assert list(dataset.class_names) == [f"official {name}" for name in names]
    assert "official one" not in caplog.text
    (dataset.root / dataset.splits["test"].paths[0]).unlink()
    with pytest.raises(UserError, match="names 1 image "):
        load_dataset(row.name, root)
    check = check_dataset(row.name, root)
    assert check.missing == (dataset.splits["test"].paths[0],)
    shutil.rmtree(dataset.root if row.name != "stanford_cars" else dataset.root / "cars_train")
    check = check_dataset(row.name, root)
    assert check.advice
    if row.name != "stanford_cars":  # the counts in its miniature are not those of Table 6
        assert not any(f"get {row.split_file}" in line for line in check.advice)


def test_few_shot_subsets(miniature):
    row, root, names = miniature
    dataset = load_dataset(row.name, root)
    if row.name in TEST_ONLY:
        with pytest.raises(UserError, match="only test images"):
            few_shot(dataset, 1, 1)
        return
    subset = few_shot(dataset, 1, 2)
    assert sorted(dataset.splits["train"].labels[subset.train]) == list(range(len(names)))
    assert sorted(dataset.splits["val"].labels[subset.val]) == list(range(len(names)))
    assert not (root / row.folder / "split_fewshot").exists()


def test_check_compares_with_table_6_and_says_what_to_get(miniature):
    row, root, names = miniature
    check = check_dataset(row.title, root)
    assert check.counts["classes"] == (len(names), row.counts[0])
    assert check.counts["test"][1] == row.counts[3]
    assert f"{len(names)} classes where Table 6 has {row.counts[0]:,}." in check.problems
    assert len(check.advice) == len(row.downloads)
    for line, download in zip(check.advice, row.downloads, strict=True):
        assert download.what in line
        into = (root / download.makes).parent if download.put_into is None else root / download.put_into
        assert f" {into}," in line
        assert line.endswith(f" {root / download.makes}")
        assert ("extract it" in line) == bool(
            re.search(r"(gz|zip|tgz|\.tar)\b", download.what)
        ) or "rename" in line
    folders = {"imagenet": 1996, "imagenetv2": 996, "imagenet_sketch": 997}
    assert len(check.missing) == folders.get(row.name, 0)
    found = {line.name: line.status.startswith("found") for line in survey(root)}
    assert found == {other.name: other is row for other in OFFICIAL.values()}


def test_where_only_the_split_file_lacks_only_that_is_to_be_got(tmp_path, put, monkeypatch):
    (tmp_path / "eurosat").mkdir()
    names = eurosat(tmp_path / "eurosat", put)
    monkeypatch.setattr(survey_module, "_counts", lambda row, sizes: {"classes": (len(names), None)})
    check = check_dataset("eurosat", tmp_path)
    assert check.problems == ("No split_zhou_EuroSAT.json: the split made here is not the official one.",)
    (line,) = check.advice
    assert line.startswith("get split_zhou_EuroSAT.json from https://drive.google.com/")
    (tmp_path / "ucf101").mkdir()
    ucf101(tmp_path / "ucf101", put)
    (tmp_path / "ucf101" / "ucfTrainTestlist" / "classInd.txt").unlink()
    assert "classInd.txt is missing" in check_dataset("ucf101", tmp_path).problems[0]


def test_a_dataset_that_is_not_there(tmp_path):
    for row in OFFICIAL.values():
        with pytest.raises(UserError, match="; get ") as caught:
            load_dataset(row.name, tmp_path)
        assert str(tmp_path / row.folder) in str(caught.value)
        check = check_dataset(row.name, tmp_path)
        assert check.problems == (f"{tmp_path / row.folder / row.images} is not there.",)
        assert len(check.advice) == len(row.downloads)


@follows(
    "cannot be read as a MATLAB file with {} ({}); download it again",
)
def test_annotations_that_are_missing_or_damaged(miniature):
    row, root, _ = miniature
    home = root / row.folder
    files = sorted(path for path in home.rglob("*") if path.suffix in (".txt", ".json", ".mat"))
    for file in files:
        if file.name in ("README.txt", "Abyssinian_100.mat"):
            continue
        content = file.read_bytes()
        file.write_bytes(b"one\xff\n")
        with pytest.raises(UserError, match=file.name):
            load_dataset(row.name, root)
        file.write_text("[]")
        with pytest.raises(UserError):
            load_dataset(row.name, root)
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name} is missing"):
            load_dataset(row.name, root)
        file.write_bytes(content)
    load_dataset(row.name, root)


def test_an_own_folder_with_an_official_name(tmp_path, put):
    put(tmp_path / "dtd", numbered("spotted", "plain"))
    write(tmp_path / "dtd" / "dataset.yaml", "template: 'cloth, {}.'")
    assert load_dataset("dtd", tmp_path).class_names == ("plain", "spotted")
    assert check_dataset("dtd", tmp_path).counts["train"] == (10, None)


def test_names_in_any_spelling():
    for name in ("OxfordPets", "oxford_pets", "oxford-pets", "OXFORDPETS"):
        assert find_official(name).title == "OxfordPets"
    assert find_official("Flowers102") is find_official("oxford_flowers")
    assert find_official("ImageNet-A") is find_official("imagenet-adversarial")
    assert find_official("pets") is None


def test_imagenet_names_come_from_the_users_file_when_there_is_one(tmp_path, put):
    packaged = wordnet_names(tmp_path / "imagenet")
    assert len(packaged) == 1000
    assert list(packaged)[:2] == ["n01440764", "n01443537"]
    put(tmp_path / "imagenet-rendition" / "imagenet-r", numbered("n01440764", "n01443537", n=1))
    write(tmp_path / "imagenet" / "classnames.txt", "n01440764 a tench fish\n\nn01443537 gold fish\n")
    assert load_dataset("imagenet_r", tmp_path).class_names == ("a tench fish", "gold fish")
    write(tmp_path / "imagenet-rendition" / "classnames.txt", "n01440764 own\nn01443537\n")
    with pytest.raises(UserError, match="line 2"):
        load_dataset("imagenet_r", tmp_path)


def test_imagenet_holds_validation_images_out_of_every_draw(tmp_path, put):
    (tmp_path / "imagenet").mkdir()
    imagenet(tmp_path / "imagenet", put)
    dataset = load_dataset("imagenet", tmp_path)
    held_out = set(dataset.splits["val"].paths)
    assert len(held_out) == 8
    assert held_out < set(dataset.splits["train"].paths)
    for shots in (16, 36, "all"):
        subset = few_shot(dataset, shots, 1)
        paths = [dataset.splits["train"].paths[i] for i in subset.train]
        assert len(paths) == (72 if shots == "all" else 2 * shots)
        assert not held_out & set(paths)
        assert len(subset.val) == 8


def test_imagenet_layouts_gone_wrong(tmp_path, put):
    home = tmp_path / "imagenet"
    put(home / "images", numbered("train/n01440764", "train/n01443537", n=2))
    with pytest.raises(UserError, match="val is missing"):
        load_dataset("imagenet", tmp_path)
    put(home / "images", ["val/ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(UserError, match="sort its images into a folder per class"):
        load_dataset("imagenet", tmp_path)
    put(home / "images", ["val/n01440764/1.JPEG"])
    with pytest.raises(UserError, match="only one has n01443537"):
        load_dataset("imagenet", tmp_path)
    put(home / "images", ["val/n00000001/1.JPEG"])
    with pytest.raises(UserError, match="none of ImageNet's 1,000 classes: n00000001"):
        load_dataset("imagenet", tmp_path)
    put(tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val", numbered("0", "1000", n=1))
    with pytest.raises(UserError, match="1,000 classes: 1000"):
        load_dataset("imagenetv2", tmp_path)


def test_survey_says_what_is_there(tmp_path, put):
    put(tmp_path / "dtd" / "images", numbered("a", "b"))
    (tmp_path / "eurosat").mkdir()
    put(tmp_path / "food-101" / "images", numbered("a"))
    write(tmp_path / "food-101" / "split_zhou_Food101.json", "{}")
    put(tmp_path / "mine", numbered("a", "b"))
    write(tmp_path / "list.csv", "path,class\n")
    status = {line.name: line.status for line in survey(tmp_path)}
    assert status["dtd"] == "found, without split_zhou_DescribableTextures.json"
    assert status["eurosat"] == "no images: 2750/ is missing"
    assert status["food101"] == "found, official split"
    assert status["sun397"] == "not found"
    assert status["mine"] == status["list.csv"] == "your own"
    with pytest.raises(UserError, match="not a folder"):
        survey(tmp_path / "nowhere")


def test_the_documented_table_is_of_these_rows():
    lines = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text().splitlines()
    for row in OFFICIAL.values():
        (line,) = [line for line in lines if line.startswith(f"| {row.name} |")]
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        place = f"{row.folder}/{row.images}".rstrip("/")
        sizes = " / ".join("–" if size is None else f"{size:,}" for size in row.counts[1:])
        assert [cells[1], *cells[3:]] == [place, f"{row.counts[0]:,}", sizes, row.template]
        assert row.split_file is None or cells[2] == row.split_file


def test_imagenet_s_family_knows_its_wordnet_ids(tmp_path, put):
    """In label order, whatever a copy's folders and classes are called."""
    for name in ("imagenet", "imagenetv2", "imagenet_r"):
        home = tmp_path / find_official(name).folder
        home.mkdir()
        MINIATURES[name](home, put)
    first, third = "n01440764", "n01484850"
    assert load_dataset("imagenet", tmp_path).class_ids == (first, "n01443537")
    assert load_dataset("imagenetv2", tmp_path).class_ids[:2] == (first, third)
    assert load_dataset("imagenet_r", tmp_path).class_ids == (first, "n01443537", "n15075141")
    put(tmp_path / "own" / "test", numbered(first, third, n=2))
    write(tmp_path / "own" / "dataset.yaml", f"class_names: {{{first}: a fish}}\n")
    own = load_dataset("own", tmp_path)
    assert own.class_ids == (first, third)
    assert own.class_names == ("a fish", third)
    for name, folders in (("listed", (first, third)), ("elsewhere", ("a", "b"))):
        paths = [f"{folder}/{index}.jpg" for folder in folders for index in (1, 2)]
        put(tmp_path / name, paths)
        rows = [f"{path},{one},test" for path, one in zip(paths, (first, first, third, third), strict=True)]
        write(tmp_path / name / f"{name}.csv", "\n".join(["path,class,split", *rows, ""]))
        plain = load_dataset(tmp_path / name / f"{name}.csv", None)
        assert plain.class_ids == (first, third)
        write(tmp_path / name / f"{name}.yaml", f"class_names: {{{first}: a fish}}\n")
        renamed = load_dataset(tmp_path / name / f"{name}.csv", None)
        assert renamed.class_names == ("a fish", third)
        assert renamed.class_ids == ((first, third) if name == "listed" else ())
    put(tmp_path / "pets" / "test", numbered("cat", first, n=2))
    assert load_dataset("pets", tmp_path).class_ids == ()


def test_class_names_that_are_no_utf_8_are_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    (folder / "classnames.txt").write_bytes("n01440764 caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"classnames\.txt is not UTF-8"):
        wordnet_names(folder)
