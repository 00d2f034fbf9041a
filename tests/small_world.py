"""A world to sweep over in a second: colours as classes, and a small random CLIP in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

COLOURS = {
    "dark red": (150, 20, 20),
    "green": (20, 160, 40),
    "sky blue": (60, 120, 230),
    "grey": (120, 120, 120),
    "purple": (150, 40, 170),
}


def write_dataset(
    folder: Path,
    classes: tuple[str, ...] = ("dark red", "green", "sky blue", "grey"),
    train: int = 4,
    val: int = 2,
    test: int = 5,
    seed: int = 0,
) -> Path:
    """A dataset folder of noisy plain pictures, 24 x 24; ``train=0`` makes one that can only be tested on."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for split, images in (("train", train), ("val", val), ("test", test)):
        for name in classes:
            for index in range(images):
                path = folder / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.array(COLOURS[name]) + rng.normal(0, 40, (24, 24, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def write_backbone(folder: Path, text_layers: int = 1, embed_dim: int = 16) -> Path:
    """A model folder: open_clip config and random weights of a one-layer CLIP with CLIP's tokenizer."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": text_layers,
        },
    }
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
    (folder / f"{folder.name}.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
