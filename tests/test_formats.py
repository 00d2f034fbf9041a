"""docs/formats.md is right: its code runs on files that fastcoop wrote, and its rules hold for them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import load_file

from fastcoop.grids import read_grid
from fastcoop.sweeps import sweep
from tests.small_world import write_backbone, write_dataset

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, its feature store, and results of a probe and a CoOp run."""
    root = tmp_path_factory.mktemp("formats")
    write_dataset(root / "data" / "colours")
    write_backbone(root / "tiny")
    grid = {
        "backbones": str(root / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 2,
        "methods": {"linear_probe": None, "coop": {"context_length": 3, "epochs": 2}},
    }  # fmt: skip
    sweep(grid, data_root=root / "data", cache=root / "cache", results=root / "results" / "demo", jobs=1)
    return root


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_results_code_of_the_page_runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    found: dict = {}
    exec(blocks("formats.md", "python")[0], found)
    table: pd.DataFrame = found["table"]
    assert set(table.method) == {"linear_probe", "coop"}
    labels, predicted = (np.frombuffer(blob, "<u2") for blob in (found["labels"], found["predicted"]))
    assert 100 * (labels == predicted).mean() == pytest.approx(table.accuracy[0])
    key = table.key[table.method == "coop"].iloc[0]
    assert load_file(f"results/demo/contexts/{key}.safetensors")["contexts"].shape == (3, 16)


def test_the_feature_store_code_of_the_page_runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    code = blocks("formats.md", "python")[3].replace("cache/RN50/oxford_pets.h5", "cache/tiny/colours.h5")
    found: dict = {}
    exec(code, found)
    assert found["features"].shape == (20, 16)
    assert len(found["names"]) == 20
    meta = found["meta"]
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in meta)
    with h5py.File("cache/tiny/colours.h5") as file:
        text = file["meta"].asstr()[()]
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert dict(file.attrs) == {
            "format": "fastcoop features", "format_version": 2, "meta_sha256": digest,
        }  # fmt: skip
        assert all(f"`{name}`" in page for group in map(file.get, meta["sha256"]) for name in group)
        for split, said in meta["sha256"].items():
            digest = hashlib.sha256()
            for name in ("index", "labels", "features"):
                array = file[split][name][:]
                digest.update(f"{name} {array.shape} {array.dtype.str}\n".encode())
                digest.update(array.tobytes())
            assert digest.hexdigest() == said
        assert file["train/features"].shape[1:] == (3, 16)


def test_every_column_of_the_results_is_on_the_page(world: Path) -> None:
    import sqlite3
    from contextlib import closing

    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    with closing(sqlite3.connect(world / "results" / "demo" / "results.sqlite")) as db, db:
        for table in ("runs", "tests", "scores"):
            for _, column, *_ in db.execute(f"PRAGMA table_info({table})"):
                assert f"`{column}`" in page, column


def test_every_grid_of_the_page_is_one() -> None:
    text = blocks("grids.md", "yaml")
    first = yaml.safe_load(text[0])
    assert sum(1 for _ in read_grid(first).runs()) == 3 + 45 + 180
    assert {block.name for block in read_grid(yaml.safe_load(text[1])).blocks} == {
        "unified", "specific", "probes",
    }  # fmt: skip
    read_grid(first | {"datasets": ["imagenet", "caltech101", "dtd"]} | yaml.safe_load(text[2]))


def test_an_exported_csv_reads_back_as_the_page_says(world: Path, tmp_path: Path, monkeypatch) -> None:
    import pandas as pd

    from fastcoop import escape
    from fastcoop.results.listing import export_results

    names = ["=1+1", "'=1", "-1+2", "2020", "NA", "a\nb", "\tx", "plain", "café", " @x", "1e3", "-5"]
    frame = pd.DataFrame(dict.fromkeys(("key", "backbone", "dataset", "source", "method", "label"), names))
    frame["accuracy"] = [-1.5, *[2.0] * (len(names) - 2), None]
    frame["macro_accuracy"] = frame.accuracy
    monkeypatch.setattr("fastcoop.results.listing.load_results", lambda folder: frame)
    errors = dict.fromkeys(zip(names, names, strict=True), 1.5)
    monkeypatch.setattr("fastcoop.results.listing.calibration_errors", lambda folder: errors)
    assert export_results("results", tmp_path / "runs.csv") == len(names)
    monkeypatch.chdir(tmp_path)
    read, bare = blocks("formats.md", "python")[1:3]
    found: dict = {"pd": pd}
    exec(read, found)
    assert list(found["table"].accuracy[:-1]) == [-1.5, *[2.0] * (len(names) - 2)]
    assert not any(cell[0] in "=@\t" or cell == "-1+2" for cell in found["table"].dataset)
    exec(f"table_dataset = {bare}", found)
    assert list(found["table_dataset"]) == [escape.visible(name, keep="\n\t") for name in names]
