"""Small pictures in any layout."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from fastcoop.datasets import Dataset, load_dataset
from fastcoop.datasets.dataset import warn_once
from fastcoop.errors import UserError


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 120, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder that is alone in its own: a dataset is compared with all that lie beside it, so that those of other
    tests would take seconds."""
    alone = tmp_path / tmp_path.name
    alone.mkdir()
    return alone


@pytest.fixture
def put() -> Callable[[Path, Iterable[str]], None]:
    """Write a small JPEG at each of some paths under a folder."""

    def write(root: Path, paths: Iterable[str]) -> None:
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(JPEG + os.fsencode(path))  # no two are alike

    return write


@pytest.fixture(autouse=True)
def _warnings_again() -> None:
    """A warning given by one test must not be swallowed in the next."""
    warn_once.cache_clear()


def images(*folders: str, n: int = 10) -> list[str]:
    """Paths of n images in each folder."""
    return [f"{folder}/{i:02d}.jpg" for folder in folders for i in range(n)]


def refusal(spec: str | Path, data_root: Path | None = None) -> str:
    """The one sentence that refuses a dataset."""
    with pytest.raises(UserError) as caught:
        load_dataset(spec, data_root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sizes(dataset: Dataset) -> dict[str, int]:
    return {key: len(split) for key, split in dataset.splits.items()}
