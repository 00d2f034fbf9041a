"""A backbone and a dataset small enough to encode hundreds of images in a second."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import open_clip
import torch
from PIL import Image

from fastcoop.backbones import Backbone, Preprocess
from fastcoop.backbones.backbone import fingerprint
from fastcoop.datasets import Dataset, load_dataset

CLASSES = ("cat", "dog", "owl")


def make_backbone(seed: int = 0) -> Backbone:
    """A CLIP small enough to encode hundreds of 16 x 16 images in a second."""
    torch.manual_seed(seed)
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(8, vision, text).eval().requires_grad_(False)
    preprocess = Preprocess(16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    digest = fingerprint(model.state_dict(), False, preprocess)
    return Backbone("tiny", model, digest, open_clip.tokenize, preprocess, 8, False)


def make_folder(
    root: Path, train: int = 6, val: int = 2, test: int = 3, seed: int = 0, classes: tuple[str, ...] = CLASSES
) -> Dataset:
    """A dataset of small noise pictures, a folder per split and class."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = tuple(rng.integers(12, 30, 2))
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return load_dataset(root)


def contents(path: Path) -> dict[str, bytes]:
    """Everything in an HDF5 file."""
    found: dict[str, bytes] = {}

    def visit(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            data = item[()]
            found[name] = data if isinstance(data, bytes) else repr(data.tolist()).encode()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found
