"""Facts of the official split files: class names and few-shot draws, without the files themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fastcoop.datasets import Split, few_shot
from fastcoop.datasets.dataset import make_dataset
from fastcoop.datasets.official import OFFICIAL, find_official, paper_class_names

# Images of each class in the order of the split file, whose classes come one after another; the labels in that order
# where it is not 0, 1, ...; and the sha256 of what the official code draws for 4 shots and seed 1, as positions in the
# training and then the validation list.
FACTS = json.loads((Path(__file__).parent / "official_draws.json").read_text())


def test_there_are_class_names_for_the_eleven_datasets_of_figure_3() -> None:
    names = paper_class_names()
    assert {name: len(of_one) for name, of_one in names.items()} == {
        row.name: row.counts[0]
        for row in OFFICIAL.values()
        if row.counts[2] is not None or row.name == "imagenet"
    }


@pytest.mark.parametrize("name", FACTS)
def test_few_shot_subsets_of_official_splits_are_the_official_ones(name: str, tmp_path: Path) -> None:
    row, facts = find_official(name), FACTS[name]
    assert row is not None
    order = facts.get("order") or list(range(row.counts[0]))
    splits = {}
    for split in ("train", "val"):
        labels = np.repeat(order, facts[split])
        splits[split] = Split(tuple(f"{split}/{image}.jpg" for image in range(len(labels))), labels)
    assert (len(splits["train"]), len(splits["val"])) == row.counts[1:3]
    splits["test"] = Split(("test.jpg",), np.zeros(1, np.int64))
    dataset = make_dataset(name, tmp_path, paper_class_names()[name], row.template, splits)
    subset = few_shot(dataset, 4, 1)
    positions = np.concatenate([subset.train, subset.val]).astype("<i8")
    assert hashlib.sha256(positions.tobytes()).hexdigest() == facts["drawn"]
