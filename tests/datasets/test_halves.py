"""Halves of a dataset's classes follow the official rule, written plainly here."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fastcoop.datasets import few_shot, load_dataset, write_draw
from fastcoop.datasets.dataset import half_of
from fastcoop.datasets.fewshot import validation_images
from fastcoop.errors import UserError

NAMES = ("ant", "bee", "cat", "dog", "eel")


def write_pictures(folder, put, images=7):
    for split in ("train", "val", "test"):
        put(folder / split, [f"{name}/{i}.jpg" for name in NAMES for i in range(images)])


def officially(items, half):
    """The official ``subsample_classes`` over (path, label) pairs."""
    labels = sorted({label for _, label in items})
    middle = math.ceil(len(labels) / 2)
    selected = labels[:middle] if half == "base" else labels[middle:]
    relabelled = {label: new for new, label in enumerate(selected)}
    return [(path, relabelled[label]) for path, label in items if label in selected]


def pairs(split, rows=slice(None)):
    return list(zip(np.array(split.paths)[rows], split.labels[rows].tolist(), strict=True))


@pytest.mark.parametrize("half", ["base", "new"])
def test_halves_are_the_official_ones(tmp_path, put, half):
    write_pictures(tmp_path / "animals", put)
    whole, part = load_dataset("animals", tmp_path), load_dataset(f"animals:{half}", tmp_path)
    assert part.name == f"animals:{half}"
    assert part.class_names == (NAMES[:3] if half == "base" else NAMES[3:])
    for name, split in whole.splits.items():
        assert pairs(part.splits[name]) == officially(pairs(split), half)
    assert len({whole.digest, part.digest}) == 2
    ids = tuple(f"n0000000{number}" for number in range(5))
    assert half_of(replace(whole, class_ids=ids), half).class_ids == (ids[:3] if half == "base" else ids[3:])
    (tmp_path / "animals").rename(tmp_path / "more:animals")
    assert load_dataset(f"{tmp_path}/more:animals:{half}").class_names == part.class_names


@pytest.mark.parametrize("shots", [2, 7, "all"])
def test_subsets_of_a_half_are_those_of_the_whole_within_it(tmp_path, put, shots):
    write_pictures(tmp_path / "animals", put)
    whole, part = load_dataset("animals", tmp_path), load_dataset("animals:new", tmp_path)
    drawn, within = few_shot(whole, shots, 1), few_shot(part, shots, 1)
    for name, rows, kept in (("train", drawn.train, within.train), ("val", drawn.val, within.val)):
        assert pairs(part.splits[name], kept) == officially(pairs(whole.splits[name], rows), "new")
    assert {label for _, label in pairs(part.splits["train"], within.train)} == {0, 1}


def test_validation_images_of_a_half_are_those_of_the_whole_within_it(tmp_path, put):
    write_pictures(tmp_path / "animals", put)
    whole, part = load_dataset("animals", tmp_path), load_dataset("animals:new", tmp_path)
    drawn, within = (validation_images(one, np.zeros(0, np.int64), 5, 1) for one in (whole, part))
    assert pairs(part.splits["val"], within) == officially(pairs(whole.splits["val"], drawn), "new")
    assert len(within) == 10


def test_a_half_reads_the_subset_file_of_the_whole_unless_it_is_left_unread(tmp_path, put):
    write_pictures(tmp_path / "animals", put)
    whole, part = load_dataset("animals", tmp_path), load_dataset("animals:new", tmp_path)
    expected = few_shot(part, 2, 1)
    for path in write_draw(whole, 2, 4, whole.fewshot_dir):
        path.rename(path.with_name(path.name.replace("seed_4", "seed_1")))
    assert (
        few_shot(part, 2, 1).train.tolist() == few_shot(part, 2, 4).train.tolist() != expected.train.tolist()
    )
    assert few_shot(part, 2, 1, read=False).train.tolist() == expected.train.tolist()


def test_a_half_of_too_few_classes_is_refused(tmp_path, put):
    for split in ("train", "test"):
        put(tmp_path / "pair" / split, [f"{name}/{i}.jpg" for name in ("a", "b") for i in range(5)])
    with pytest.raises(UserError, match=r"pair:new in .* has 1 class, expected at least two"):
        load_dataset("pair:new", tmp_path)
    with pytest.raises(UserError, match="There is no dataset pears"):
        load_dataset("pears:base", tmp_path)
