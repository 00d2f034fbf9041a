"""A results folder says which grid it came from and what the datasets were."""

from __future__ import annotations

import json

from fastcoop.datasets import load_dataset
from fastcoop.grids import read_grid
from fastcoop.results.metadata import add_datasets, write_grid
from fastcoop.sweeps.records import describe_datasets


def test_the_grid_reads_back_and_datasets_add_up(world, grid, tmp_path):
    read = read_grid(grid)
    colours, other = (load_dataset(world / "data" / name, None) for name in ("colours", "other"))
    for dataset, data_root in ((colours, "data here"), (other, None)):
        write_grid(tmp_path, read.source, data_root, "cache")
        add_datasets(tmp_path, describe_datasets([dataset]))
    assert (tmp_path / "grid.yaml").read_text().startswith(f"# fastcoop sweep {tmp_path}/grid.yaml --results")
    assert read_grid(tmp_path / "grid.yaml") == read
    stored = json.loads((tmp_path / "datasets.json").read_text())
    assert stored["colours"] == {
        "classes": 4, "train": 16, "val": 8, "test": 20, "digest": colours.digest, "prompt": "a photo of a [CLASS].",
    }  # fmt: skip
    assert stored["other"]["train"] is None
