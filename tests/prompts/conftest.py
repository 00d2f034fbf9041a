from __future__ import annotations

import open_clip
import pytest

from fastcoop.backbones import Backbone, Preprocess
from tests.reference import tiny_model


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """A tiny random backbone in float32."""
    import torch

    square = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    return Backbone(
        "tiny",
        tiny_model(dtype=torch.float32),
        "0" * 64,
        open_clip.get_tokenizer("RN50"),
        square,
        24,
        quick_gelu=False,
    )
