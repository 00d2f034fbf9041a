"""The demo's two backbones, as they ship with the package."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch

from fastcoop.backbones.sparse import read_sparse_model
from fastcoop.errors import UserError, nearest

DEMO_MODELS = ("demo-resnet", "demo-vit")


def weights_path(name: str) -> Path:
    """Where the weights of ``"demo-resnet"`` or ``"demo-vit"`` lie. Raises UserError for another name."""
    if name not in DEMO_MODELS:
        raise UserError(f'There is no demo backbone "{name}".{nearest(name, DEMO_MODELS)}')
    return Path(__file__).parent / "weights" / f"{name}.safetensors"


def load_demo_model(name: str) -> tuple[open_clip.CLIP, torch.Tensor]:
    """A demo backbone and its trained tokens, as ``load_model`` gives them."""
    return load_model(weights_path(name))


def load_model(path: Path) -> tuple[open_clip.CLIP, torch.Tensor]:
    """Build a backbone from a sparse model file.

    Returns the open_clip model (float32, evaluation mode) and bool (49408,), the tokens seen in pretraining.
    """
    config, state, trained = read_sparse_model(path)
    model = open_clip.CLIP(**config)
    model.load_state_dict(state)
    return model.eval(), trained
