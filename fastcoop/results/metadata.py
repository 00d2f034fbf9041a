"""Where a results folder comes from: ``grid.yaml``, its grid, and ``datasets.json``, its datasets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fastcoop import escape
from fastcoop.errors import UserError, writing
from fastcoop.files import atomic_write, begins_with, refuse_foreign
from fastcoop.results.database import DATABASE

GRID, DATASETS = "grid.yaml", "datasets.json"
PLACES, CLASS_NAMES = ("--cache", "--data-root"), "--class-names"


def write_grid(
    folder: Path,
    grid: Mapping[str, Any],
    data_root: str | Path | None,
    cache: str | Path,
    class_names: str | Path | None = None,
) -> None:
    """Write a grid as plain values to ``grid.yaml``, below a comment with the command that runs it again."""
    command = ["fastcoop", "sweep", folder / GRID, "--results", folder, "--cache", Path(cache)]
    command += ["--data-root", Path(data_root)] if data_root is not None else []
    command += ["--class-names", Path(class_names)] if class_names is not None else []
    text = yaml.safe_dump(dict(grid), sort_keys=False)
    _write(folder / GRID, f"# {escape.shell_command(*command)}\n{text}")


def refuse_foreign_grid(folder: Path) -> None:
    """Raise UserError for a ``grid.yaml`` that no sweep wrote, in a folder that holds no results."""
    if not (folder / DATABASE).exists():
        refuse_foreign(folder / GRID, lambda path: begins_with(path, "# fastcoop sweep "))


def recorded_grid(folder: str | Path) -> dict[str, Any]:
    """Return the content of a results folder's ``grid.yaml``; {} where there is none. It must not be changed."""
    path = Path(folder) / GRID
    content = _parsed(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}


_parsed = lru_cache(4)(yaml.safe_load)  # a report asks for the grid many times


def recorded_places(folder: str | Path, options: Sequence[str] = PLACES) -> list[str | Path]:
    """Return options of a results folder's sweep that are paths, with these, as ``grid.yaml`` has them."""
    path = Path(folder) / GRID
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found: list[str | Path] = []
    with suppress(ValueError):
        for word, place in pairwise(shlex.split(text.partition("\n")[0].removeprefix("# "))):
            found += [word, Path(place)] if word in options else []
    return found


def add_datasets(folder: Path, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Add datasets to ``datasets.json``, or replace those of the same names.

    Args:
        folder: a results folder.
        datasets: by name ``classes``, their number; ``train``, ``val`` and ``test``, numbers of images, or None;
            ``digest``; and ``prompt``, with ``[CLASS]`` for the class name.
    """
    _write(folder / DATASETS, json.dumps({**recorded_datasets(folder), **datasets}, indent=1))


def recorded_datasets(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return the content of a results folder's ``datasets.json``: as `add_datasets` takes it; {} without one.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / DATASETS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: dict(about) for name, about in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and a sweep writes it again.") from None


def merge_metadata(folder: Path, target: Path) -> None:
    """Add the datasets of ``folder`` to those of ``target``, and its grid where ``target`` has none."""
    if found := recorded_datasets(folder):
        _write(target / DATASETS, json.dumps(found | recorded_datasets(target), indent=1))
    if (folder / GRID).is_file() and not (target / GRID).exists():
        with writing(target / GRID), atomic_write(target / GRID) as part:
            part.write_bytes((folder / GRID).read_bytes())


def _write(path: Path, text: str) -> None:
    with writing(path), atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
