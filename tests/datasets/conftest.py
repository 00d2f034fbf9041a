"""Small pictures in any layout."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from fastcoop.datasets.dataset import warn_once


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 120, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()


@pytest.fixture
def put() -> Callable[[Path, Iterable[str]], None]:
    """Write a small JPEG at each of some paths under a folder."""

    def write(root: Path, paths: Iterable[str]) -> None:
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(JPEG)

    return write


@pytest.fixture(autouse=True)
def _warnings_again() -> None:
    """A warning given by one test must not be swallowed in the next."""
    warn_once.cache_clear()
