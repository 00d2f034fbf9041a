"""What a results folder says of itself: the grid it came from, and the datasets' sizes and prompts (Table 6)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from fastcoop.datasets import Dataset
from fastcoop.sweeps.grid import Grid

GRID, DATASETS = "grid.yaml", "datasets.json"
SPLITS = ("train", "val", "test")


def write_about(folder: Path, grid: Grid, datasets: Iterable[Dataset]) -> None:
    """Write ``grid.yaml``, the grid as it was run, and add ``datasets`` to ``datasets.json``."""
    plain = grid.model_dump(mode="json", exclude_defaults=True)
    plain["methods"] = [{name: settings} for name, settings in plain["methods"]]
    _write(folder / GRID, yaml.safe_dump(plain, sort_keys=False))
    path = folder / DATASETS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for dataset in datasets:
        known[dataset.name] = {
            "classes": len(dataset.class_names),
            **{split: len(dataset.splits[split]) if split in dataset.splits else None for split in SPLITS},
            "prompt": dataset.template.replace("{}", "[CLASS]"),
        }
    _write(path, json.dumps(known, indent=1))


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
