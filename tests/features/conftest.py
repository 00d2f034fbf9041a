from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from tests.features.small import make_backbone, make_folder


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_folder(tmp_path / "animals")


@pytest.fixture
def count_encoded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Call it for the number of crops encoded since the last call."""
    seen = [0]
    original = backbone.model.encode_image

    def counted(images: torch.Tensor, normalize: bool) -> torch.Tensor:
        seen[0] += len(images)
        return original(images, normalize)

    def take() -> int:
        seen[0], count = 0, seen[0]
        return count

    monkeypatch.setattr(backbone.model, "encode_image", counted)
    return take
