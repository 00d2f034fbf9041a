"""Few-shot subsets: the official rule, and the files that keep an earlier draw."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from fastcoop.datasets import few_shot, load_dataset, write_draw
from fastcoop.datasets.fewshot import validation_images
from fastcoop.errors import UserError
from tests.advice import follows

WORDNET = ["n01440764", "n01443537"]


@pytest.fixture
def folder(tmp_path, put):
    """A dataset whose classes come in the order 1, 0, 2 and whose class 2 is small."""
    entries = {
        "train": [(f"t{i:03d}.jpg", label) for i, label in enumerate([1, 0, 1] * 12 + [2] * 3)],
        "val": [(f"v{i:03d}.jpg", label) for i, label in enumerate([0] * 6 + [1] * 6 + [2] * 2)],
        "test": [(f"e{i}.jpg", i) for i in range(3)],
    }
    root = tmp_path / "mine"
    put(root / "images", [path for part in entries.values() for path, _ in part])
    split = {key: [[path, label, "abc"[label]] for path, label in part] for key, part in entries.items()}
    (root / "split.json").write_text(json.dumps(split))
    return root


def drawn(dataset, subset):
    return tuple(
        [dataset.splits[key].paths[i] for i in getattr(subset, key)] if key in dataset.splits else []
        for key in ("train", "val")
    )


def official_draw(dataset, shots, seed):
    """The official rule, written apart: one global stream, the classes as they appear."""
    random.seed(seed)
    subsets = []
    for key, k in (("train", shots), ("val", min(shots, 4))):
        split = dataset.splits[key]
        groups = {}
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            groups.setdefault(label, []).append(path)
        subsets.append([p for g in groups.values() for p in (random.sample(g, k) if len(g) >= k else g)])
    return tuple(subsets)


@pytest.mark.parametrize("shots", [1, 2, 3, 4, 8, 16, 100])
@pytest.mark.parametrize("seed", [1, 2, 3, 17])
def test_the_official_rule_draws_the_same_each_time_and_writes_nothing(folder, shots, seed):
    before = sorted(folder.rglob("*"))
    dataset = load_dataset(folder)
    expected = official_draw(dataset, shots, seed)
    assert drawn(dataset, few_shot(dataset, shots, seed)) == expected
    assert drawn(load_dataset(folder), few_shot(load_dataset(folder), shots, seed)) == expected
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("shots", [2, "all"])
def test_a_caller_may_change_a_draw(folder, shots):
    dataset = load_dataset(folder)
    first = few_shot(dataset, shots, 1)
    expected = drawn(dataset, first)
    first.train[:], first.val[:] = 0, 0
    assert drawn(dataset, few_shot(dataset, shots, 1)) == expected


def test_a_known_draw():
    """Python's stream itself, so that a subset never changes between versions."""
    assert random.Random(1).sample(range(100), 4) == [17, 72, 97, 8]


def test_all_of_the_data(folder):
    dataset = load_dataset(folder)
    subset = few_shot(dataset, "all", 1)
    assert subset.train.tolist() == list(range(39))
    assert subset.val.dtype == np.int64
    assert len(subset.val) == 14


def test_small_classes_are_used_whole_and_named_once(folder, caplog):
    dataset = load_dataset(folder)
    few_shot(dataset, 3, 1)
    assert not caplog.text, "no class has fewer"
    for seed in (1, 2):
        subset = few_shot(dataset, 4, seed)
        assert np.bincount(dataset.splits["train"].labels[subset.train]).tolist() == [4, 4, 3]
    assert caplog.text.count("fewer than 4 training images, all used: c (3)") == 1


@pytest.mark.parametrize("shots", [0, -1, True, 1.5, "every"])
def test_impossible_shots(folder, shots):
    with pytest.raises(UserError, match="to be a whole number from 1"):
        few_shot(load_dataset(folder), shots, 1)


def test_a_json_of_an_earlier_split_is_not_used(folder):
    dataset = load_dataset(folder)
    (folder / "split_fewshot").mkdir()
    path = folder / "split_fewshot" / "shot_1-seed_1.json"
    content = {"train": [["t001.jpg", 0, "a"], ["t000.jpg", 1, "b"], ["t036.jpg", 2, "c"]], "val": []}
    path.write_text(json.dumps({"digest": dataset.digest, **content}))
    assert drawn(dataset, few_shot(dataset, 1, 1))[0] == ["t001.jpg", "t000.jpg", "t036.jpg"]
    path.write_text(json.dumps({"digest": "another split's", **content}))
    assert drawn(dataset, few_shot(dataset, 1, 1)) == official_draw(dataset, 1, 1)


def test_a_json_of_someone_elses_is_relocated(folder, caplog):
    (folder / "split_fewshot").mkdir()
    content = {
        "train": [["D:\\data\\mine\\images\\t001.jpg", 0, "a"], ["/data/mine/images/t000.jpg", 1, "b"]],
        "val": [["v000.jpg", 0, "a"]],
    }
    (folder / "split_fewshot" / "shot_1-seed_5.json").write_text(json.dumps(content))
    dataset = load_dataset(folder)
    assert drawn(dataset, few_shot(dataset, 1, 5)) == (["t001.jpg", "t000.jpg"], ["v000.jpg"])
    assert "has no training image of c, which runs on it do not learn" in caplog.text


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (["x/t999.jpg", 0, "a"], "another split"),
        (["t001.jpg", 1, "b"], "another split"),
        (["v000.jpg", 0, "a"], "another split"),
        (["t001.jpg", 0], "entry 0 of train"),
    ],
)
def test_a_json_that_does_not_fit(folder, entry, expected):
    (folder / "split_fewshot").mkdir()
    path = folder / "split_fewshot" / "shot_1-seed_1.json"
    path.write_text(json.dumps({"train": [entry], "val": []}))
    with pytest.raises(UserError, match=expected):
        few_shot(load_dataset(folder), 1, 1)
    path.write_text('{"train": [')
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        few_shot(load_dataset(folder), 1, 1)


def test_a_json_with_validation_images_that_the_dataset_lacks(folder):
    dataset = load_dataset(folder)
    dataset.fewshot_dir.mkdir()
    content = {"train": [["t001.jpg", 0, "a"]], "val": [["v000.jpg", 0, "a"]]}
    (dataset.fewshot_dir / "shot_1-seed_1.json").write_text(json.dumps(content))
    splits = {name: split for name, split in dataset.splits.items() if name != "val"}
    with pytest.raises(UserError, match="has val images, but mine has no val split; delete it"):
        few_shot(replace(dataset, splits=splits), 1, 1)


class Datum:
    """Written as the official code's class is; only ``pickle`` ever sees it under that name."""

    def __init__(self, impath, label, classname):
        self._impath = impath
        self._label = label
        self._domain = 0
        self._classname = classname


@pytest.fixture
def official_pickle(monkeypatch):
    """Pickle as the official code does, then make sure that its packages are not there."""

    def write(path, content):
        names = ["dassl", "dassl.data", "dassl.data.datasets", "dassl.data.datasets.base_dataset"]
        with monkeypatch.context() as patch:
            for name in names:
                patch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules[names[-1]].Datum = Datum
            patch.setattr(Datum, "__module__", names[-1])
            data = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        assert "dassl" not in sys.modules

    return write


def test_the_official_pickle_wins_and_is_relocated(folder, official_pickle):
    few_shot(load_dataset(folder), 1, 1)
    content = {
        "train": [Datum("/home/x/data/mine/images/t004.jpg", 0, "a"), Datum("D:\\images\\t000.jpg", 1, "b")],
        "val": [Datum("/home/x/data/mine/images/v013.jpg", 2, "c")],
    }
    official_pickle(folder / "split_fewshot" / "shot_1-seed_1.pkl", content)
    dataset = load_dataset(folder)
    subset = few_shot(dataset, 1, 1)
    assert subset.train.dtype == np.int64
    assert drawn(dataset, subset) == (["t004.jpg", "t000.jpg"], ["v013.jpg"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_pickle_of_anything_else_is_refused_unrun(folder, official_pickle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "split_fewshot" / "shot_1-seed_1.pkl"
    for content in ({"train": [Evil()]}, {"train": [np.zeros(2)]}, Evil()):
        official_pickle(path, content)
        with pytest.raises(UserError, match="is not an official few-shot subset"):
            few_shot(load_dataset(folder), 1, 1)
    assert not (tmp_path / "owned").exists()


DATUM = b"cdassl.data.datasets.base_dataset\nDatum"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"cos\nsystem\n(S'touch owned'\ntR.", "is not an official few-shot subset"),
        (b"(S'touch owned'\nios\nsystem\n.", "is not an official few-shot subset"),
        (b"(cos\nsystem\nS'touch owned'\no.", "is not an official few-shot subset"),
        (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",
            "is not an official few-shot subset",
        ),
        (DATUM + b".__setstate__.__globals__\n.", "is not an official few-shot subset"),
        (DATUM + b"\n(dS'x'\nS'y'\nsb.", "is not an official few-shot subset"),
        (b"\x80\x02\x82\x01.", "is not an official few-shot subset"),
        (b"Pabc\n.", "is not an official few-shot subset"),
        (b"\x80\x04\x8e" + bytes([255] * 6 + [0, 0]) + b"x.", "is not an official few-shot subset"),
        (b"]" * 100_000 + b"a" * 99_999 + b".", "is not an official few-shot subset"),
        (pickle.dumps({"train": [], "val": []}), "has no training images"),
    ],
)
def test_pickles_written_by_hand_run_nothing(folder, tmp_path, monkeypatch, data, expected):
    monkeypatch.chdir(tmp_path)
    (folder / "split_fewshot").mkdir()
    (folder / "split_fewshot" / "shot_1-seed_1.pkl").write_bytes(data)
    with pytest.raises(UserError, match=expected) as caught:
        few_shot(load_dataset(folder), 1, 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"train": ["t000.jpg"]},
        [1, 2],
        {"train": [Datum("t000.jpg", "1", "b")]},
        {"train": [Datum(3, 1, "b")]},
    ],
)
def test_a_pickle_of_another_shape(folder, official_pickle, content):
    official_pickle(folder / "split_fewshot" / "shot_1-seed_1.pkl", content)
    with pytest.raises(UserError, match="is not an official few-shot subset"):
        few_shot(load_dataset(folder), 1, 1)


def test_a_damaged_pickle_at_every_length(folder, official_pickle):
    path = folder / "split_fewshot" / "shot_1-seed_1.pkl"
    official_pickle(path, {"train": [Datum("t001.jpg", 0, "a")], "val": []})
    whole = path.read_bytes()
    dataset = load_dataset(folder)
    assert few_shot(dataset, 1, 1).train.tolist() == [1]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            few_shot(dataset, 1, 1)


def test_a_pickle_of_another_split(folder, official_pickle):
    official_pickle(folder / "split_fewshot" / "shot_1-seed_1.pkl", {"train": [Datum("/x/v000.jpg", 0, "a")]})
    with pytest.raises(UserError, match="drawn from another split"):
        few_shot(load_dataset(folder), 1, 1)


def test_an_official_imagenet_pickle_has_no_validation_set(tmp_path, put, official_pickle):
    home = tmp_path / "imagenet"
    put(home / "images", [f"{s}/{c}/{i}.JPEG" for s in ("train", "val") for c in WORDNET for i in range(10)])
    dataset = load_dataset("imagenet", tmp_path)
    held_out = dataset.splits["val"].paths
    assert len(held_out) == 4
    chosen = [held_out[0], next(p for p in dataset.splits["train"].paths if p not in held_out)]
    data = [Datum(f"/home/x/imagenet/images/{p}", WORDNET.index(p.split("/")[1]), "name") for p in chosen]
    official_pickle(home / "split_fewshot" / "shot_4-seed_1.pkl", {"train": data})
    subset = few_shot(dataset, 4, 1)
    assert [dataset.splits["train"].paths[i] for i in subset.train] == chosen
    assert sorted(held_out[i] for i in subset.val) == sorted(held_out[1:])


@pytest.mark.parametrize("shots", [2, 16])
def test_draws_written_as_jsonl_read_back_and_are_those_of_2sfs(folder, tmp_path, shots):
    dataset = load_dataset(folder)
    subset = few_shot(dataset, shots, 3)
    train, val = write_draw(dataset, shots, 3, tmp_path / "out")
    assert (train.name, val.name) == (f"shot_{shots}-seed_3_train.jsonl", f"shot_{shots}-seed_3_val.jsonl")
    # As the published code reads them: a dictionary per line, opened by its path.
    for path, key, rows in ((train, "train", subset.train), (val, "val", subset.val)):
        data = [json.loads(line) for line in path.read_text().splitlines()]
        split = dataset.splits[key]
        assert [one["_impath"] for one in data] == [str(dataset.root / split.paths[row]) for row in rows]
        assert [one["_label"] for one in data] == split.labels[rows].tolist()
        assert {(one["_domain"], one["_classname"]) for one in data} <= {(0, name) for name in "abc"}
    # Another draw, whose data root was another folder.
    dataset.fewshot_dir.mkdir(parents=True)
    train, val = write_draw(dataset, shots, 9, dataset.fewshot_dir)
    for path in (train, val):
        text = path.read_text().replace(str(dataset.root), "/somewhere/DATA/mine")
        path.with_name(path.name.replace("seed_9", "seed_1")).write_text(text, encoding="utf-8-sig")
        path.unlink()
    assert drawn(dataset, few_shot(dataset, shots, 1)) == drawn(dataset, few_shot(dataset, shots, 9))


# Separators of lines; a byte that is no UTF-8; and letters composed or not, as another file's of the same class.
@pytest.mark.parametrize("odd", [["\u2028"], ["\x85"], ["\udcff"], ["\u00e9", "e\u0301"]])
def test_draws_read_back_whatever_the_letters_of_a_name(folder, odd):
    names = [f"t{one}000.jpg" for one in odd]
    split = json.loads((folder / "split.json").read_text())
    for entry, name in zip(split["train"][::2], names, strict=False):
        (folder / "images" / entry[0]).rename(folder / "images" / name)
        entry[0] = name
    (folder / "split.json").write_text(json.dumps(split))
    dataset = load_dataset(folder)
    expected = drawn(dataset, few_shot(dataset, 24, 1))
    write_draw(dataset, 24, 1, dataset.fewshot_dir)
    assert {*names} <= {*expected[0]}
    assert drawn(dataset, few_shot(dataset, 24, 1)) == expected


@follows("delete the file, or download it again")
def test_a_damaged_line_of_jsonl_is_named(folder):
    dataset = load_dataset(folder)
    dataset.fewshot_dir.mkdir(parents=True)
    path, _ = write_draw(dataset, 2, 1, dataset.fewshot_dir)
    expected = drawn(dataset, few_shot(dataset, 2, 1))
    path.write_text(path.read_text().replace('"_label": 0', '"_label": "zero"', 1))
    with pytest.raises(
        UserError, match=r"train\.jsonl line [1-9]+ should be a JSON object with _impath, _label"
    ):
        few_shot(dataset, 2, 1)
    path.unlink()
    assert drawn(dataset, few_shot(dataset, 2, 1)) == expected


def test_validation_images_that_a_file_lacks_are_drawn_from_the_seed(folder):
    dataset = load_dataset(folder)
    train, val = write_draw(dataset, 6, 2, dataset.fewshot_dir)
    kept = drawn(dataset, few_shot(dataset, 6, 2))[0]
    val.unlink()
    labels, rng = dataset.splits["val"].labels, random.Random(2)
    groups = [np.flatnonzero(labels == label).tolist() for label in (0, 1, 2)]
    expected = [row for group in groups for row in (rng.sample(group, 4) if len(group) >= 4 else group)]
    subset = few_shot(dataset, 6, 2)
    assert (drawn(dataset, subset)[0], subset.val.tolist()) == (kept, expected)
    assert train.exists()


@pytest.mark.parametrize("seed", [1, 2])
def test_as_many_validation_images_as_shots_are_a_draw_of_their_own(folder, seed):
    dataset, none = load_dataset(folder), np.zeros(0, np.int64)
    labels, rng = dataset.splits["val"].labels, random.Random(f"validation {seed}")
    groups = [np.flatnonzero(labels == label).tolist() for label in (0, 1, 2)]
    expected = [row for group in groups for row in (rng.sample(group, 5) if len(group) >= 5 else group)]
    assert validation_images(dataset, none, 5, seed).tolist() == expected
    assert validation_images(dataset, none, "all", seed).tolist() == list(range(14))
    train = dataset.splits["train"]
    shared = replace(
        train, paths=(*train.paths[:-1], dataset.splits["val"].paths[0])
    )  # as in ImageNet's files
    dataset = replace(dataset, splits={**dataset.splits, "train": shared})
    learned = np.array([0, len(shared) - 1])
    assert validation_images(dataset, learned, "all", seed).tolist() == list(range(1, 14))


def test_a_draw_replaces_no_other_file(folder, tmp_path):
    dataset, out = load_dataset(folder), tmp_path / "out"
    first, *others = write_draw(dataset, 2, 3, out)
    assert write_draw(dataset, 2, 3, out) == [first, *others]
    published = first.read_text() + "\n"
    first.write_text(published)
    with pytest.raises(UserError, match="is already there and is not known as this command's own"):
        write_draw(dataset, 2, 3, out)
    assert first.read_text() == published


def test_a_subset_in_a_file_can_be_left_unread(folder, tmp_path):
    dataset = load_dataset(folder)
    expected = drawn(dataset, few_shot(dataset, 2, 1))
    write_draw(dataset, 2, 4, dataset.fewshot_dir)
    for part in ("train", "val"):
        one = dataset.fewshot_dir / f"shot_2-seed_4_{part}.jsonl"
        if one.exists():
            one.rename(one.with_name(f"shot_2-seed_1_{part}.jsonl"))
    assert drawn(dataset, few_shot(dataset, 2, 1)) == drawn(dataset, few_shot(dataset, 2, 4)) != expected
    assert drawn(dataset, few_shot(dataset, 2, 1, read=False)) == expected
