"""The official split files as users have them on disk, where they lie beside the checkout."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from fastcoop.datasets import few_shot
from fastcoop.datasets.dataset import make_dataset, make_splits
from fastcoop.datasets.official import find_official, read_official

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# What the official code draws from each for 4 shots and seed 1: sha256 of the training, then the validation paths.
DRAWN = {
    "caltech101": "7ce6f159e04ee796",
    "dtd": "66867d9e55744d06",
    "eurosat": "ca004ed658fe0884",
    "oxford_flowers": "f13baf21485c58f5",
    "oxford_pets": "9b1693c9400587e5",
    "stanford_cars": "c893fb9285d75e50",
    "ucf101": "f5a20d64a672f1bd",
}


@pytest.mark.skipif(not (DATA / "splits").is_dir(), reason="the official split files are not on this machine")
@pytest.mark.parametrize("name", DRAWN)
def test_an_official_split_file_gives_table_6_s_counts_and_the_official_draw(
    name: str, tmp_path: Path
) -> None:
    row = find_official(name)
    assert row is not None
    assert row.split_file is not None
    (tmp_path / row.images).mkdir(exist_ok=True)
    shutil.copyfile(DATA / "splits" / row.split_file, tmp_path / row.split_file)
    names, items, split_file = read_official(row, tmp_path)
    assert split_file is not None
    assert (len(names), *map(len, items.values())) == row.counts
    assert names == json.loads((DATA / "classnames" / f"{name}.json").read_text())
    dataset = make_dataset(name, tmp_path, names, row.template, make_splits(items))
    subset = few_shot(dataset, 4, 1)
    paths = [dataset.splits["train"].paths[at] for at in subset.train]
    paths += [dataset.splits["val"].paths[at] for at in subset.val]
    assert hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16] == DRAWN[name]
