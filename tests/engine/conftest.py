"""Small backbones with random weights, and runs over them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastcoop.backbones import Backbone, Preprocess
from fastcoop.engine import Run
from fastcoop.engine.runs import LEARNING_RATE
from fastcoop.prompts import PromptLayout
from tests.reference import tiny_model

NAMES = ("cat", "cat fish", "dog", "a big lion")


def tiny_backbone(dtype: torch.dtype = torch.float64, **options) -> Backbone:
    import open_clip

    model = tiny_model(dtype=dtype, **options)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    square = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    return Backbone("tiny", model, "0" * 64, open_clip.get_tokenizer("RN50"), square, 24, quick_gelu=False)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="session")
def backbone32() -> Backbone:
    return tiny_backbone(torch.float32)


@pytest.fixture
def make_run() -> Callable[..., Run]:
    def make(
        layout: PromptLayout | None = None,
        names: tuple[str, ...] = NAMES,
        images: int = 20,
        epochs: int = 6,
        seed: int = 0,
        views: int = 3,
        **options,
    ) -> Run:
        layout = layout or PromptLayout(4)
        draw = torch.Generator().manual_seed(seed)
        contexts = 0.3 * torch.randn(layout.shape(len(names), 32), generator=draw)
        features = torch.randn(images, views, 24, generator=draw)
        labels = torch.randint(len(names), (images,), generator=draw)
        rate = options.pop("learning_rate", LEARNING_RATE)
        run = Run(names, layout, contexts, features, labels, epochs, seed, **options)
        object.__setattr__(run, "learning_rate", rate)  # also one that Run refuses, to see training diverge
        return run

    return make
