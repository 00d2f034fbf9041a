"""What a results folder says of itself: the grid it came from, and the datasets' sizes and prompts (Table 6)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fastcoop import escape
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError, writing
from fastcoop.files import atomic_write
from fastcoop.grids.grid import Grid

GRID, DATASETS = "grid.yaml", "datasets.json"
SPLITS = ("train", "val", "test")


def write_about(
    folder: Path, grid: Grid, datasets: Iterable[Dataset], data_root: str | Path | None, cache: str | Path
) -> None:
    """Write ``grid.yaml``, the grid as it was run below the command that runs it again, and add ``datasets`` to
    ``datasets.json``."""
    command: list[str | Path] = [
        "fastcoop",
        "sweep",
        folder / GRID,
        "--results",
        folder,
        "--cache",
        Path(cache),
    ]
    command += ["--data-root", Path(data_root)] if data_root is not None else []
    _write(
        folder / GRID,
        f"# {escape.shell_command(*command)}\n" + yaml.safe_dump(dict(grid.source), sort_keys=False),
    )
    add_datasets(folder, datasets)


def grid_of(folder: Path) -> dict[str, Any]:
    """The grid that a results folder came from, as it was written; {} where it does not say."""
    path = folder / GRID
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def add_datasets(folder: Path, datasets: Iterable[Dataset]) -> None:
    """Add ``datasets`` to ``datasets.json``."""
    known = _datasets(folder)
    for dataset in datasets:
        known[dataset.name] = {
            "classes": len(dataset.class_names),
            **{split: len(dataset.splits[split]) if split in dataset.splits else None for split in SPLITS},
            "digest": dataset.digest,
            "prompt": dataset.template.replace("{}", "[CLASS]"),
        }
    _write(folder / DATASETS, json.dumps(known, indent=1))


def merge_about(folder: Path, target: Path) -> None:
    """Add what ``folder`` says of datasets to what ``target`` does, which gains its grid if it has none."""
    if found := _datasets(folder):
        _write(target / DATASETS, json.dumps({**found, **_datasets(target)}, indent=1))
    if (folder / GRID).is_file() and not (target / GRID).exists():
        _write(target / GRID, (folder / GRID).read_text(encoding="utf-8"))


def _datasets(folder: Path) -> dict[str, Any]:
    path = folder / DATASETS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and a sweep writes it again.") from None


def _write(path: Path, text: str) -> None:
    with writing(path), atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
