"""A study whose every input is the same on any machine: weights and features are drawn by NumPy.

``python -m tests.golden.study`` writes what the study gives to ``golden.json``. Do that only where a change of results
is meant, and say in the commit which and why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.engine import Run, train
from fastcoop.features import import_features
from fastcoop.prompts import PromptLayout
from fastcoop.results import load_results
from fastcoop.sweeps import sweep

GOLDEN = Path(__file__).with_name("golden.json")
NAMES = ("cat", "cat fish", "dog", "a big lion")
DIM, WIDTH, STEPS = 16, 32, 20
LAYOUTS = {
    f"{position}{', class-specific' * specific}": PromptLayout(3, position, specific)
    for position in ("end", "mid", "front")
    for specific in (False, True)
} | {"words": PromptLayout.written("[V]x2 [CLASS], a type of [V]x1 pet.")}


def write_backbone(folder: Path) -> Path:
    """A model folder: the config of a two-layer CLIP and weights drawn by NumPy."""
    import open_clip
    from safetensors.numpy import save_file

    config = {
        "quick_gelu": False,
        "embed_dim": DIM,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 2},
    }
    draw = np.random.default_rng(0)
    weights = {}
    for name, tensor in sorted(open_clip.CLIP(**config).state_dict().items()):
        scale = 0.3 if "embedding" in name else max(tensor.shape, default=1) ** -0.5
        values = scale * draw.standard_normal(tuple(tensor.shape))
        if name.endswith("weight") and tensor.ndim == 1:  # of a layer norm
            values += 1.0
        weights[name] = (np.full((), 4.6) if name == "logit_scale" else values).astype(np.float32)
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def write_features(folder: Path, backbone: Backbone) -> Path:
    """A store of imported features, around a point per class."""
    draw = np.random.default_rng(1)
    centers = draw.standard_normal((len(NAMES), DIM))
    files = {}
    for split, images in (("train", 6), ("val", 3), ("test", 5)):
        labels = np.repeat(np.arange(len(NAMES)), images)
        features = centers[labels] + 0.7 * draw.standard_normal((len(labels), DIM))
        files[split] = folder / f"{split}.npz"
        np.savez(files[split], features=features.astype(np.float32), labels=labels, names=np.array(NAMES))
    return import_features(files, folder / "cache", backbone, name="animals", dtype="float32")


def run_of(number: int, layout: PromptLayout) -> Run:
    """A training of STEPS steps."""
    draw = np.random.default_rng(number)
    contexts = 0.02 * draw.standard_normal(layout.shape(len(NAMES), WIDTH))
    features = draw.standard_normal((12, 2, DIM))
    labels = draw.integers(len(NAMES), size=12)
    tensors = (torch.from_numpy(array) for array in (contexts, features, labels))
    return Run(NAMES, layout, *tensors, epochs=STEPS, seed=number, learning_rate=0.05)


def trained_contexts(backbone: Backbone) -> dict[str, list[float]]:
    """The first numbers of each layout's contexts, all trained in one forest, and their Euclidean norm."""
    runs = [run_of(number, layout) for number, layout in enumerate(LAYOUTS.values())]
    found = {}
    for name, trained in zip(LAYOUTS, train(backbone, runs), strict=True):
        contexts = trained.contexts.double().flatten()
        found[name] = [*contexts[:5].tolist(), float(contexts.norm()), float(trained.losses[-1])]
    return found


def study(folder: Path) -> dict[str, Any]:
    """Run keys, the runs that train together, accuracies and trained contexts, as JSON has them."""
    spec = str(write_backbone(folder / "golden"))
    backbone = backbone_from_spec(spec, device="cpu")
    store = write_features(folder, backbone)
    grid = {
        "backbones": spec,
        "datasets": str(store),
        "shots": [1, 4],
        "seeds": [1, 2],
        "views": 0,
        "methods": {
            "zero_shot": None,
            "ensemble": None,
            "linear_probe": {"search_steps": 2},
            "text_bias": {"epochs": 5},
            "text_transform": {"epochs": 5, "learning_rate": 0.001},
            "coop": {
                "context_length": 3,
                "class_position": ["end", "mid"],
                "class_specific": [False, True],
                "epochs": 10,
            },
        },
    }
    sweep(grid, data_root=None, cache=folder / "cache", results=folder / "results", device="cpu", jobs=1)
    rows = load_results(folder / "results").sort_values(["method", "label", "shots", "seed"])
    columns = [
        "label",
        "shots",
        "seed",
        "epochs",
        "train_images",
        "status",
        "accuracy",
        "macro_accuracy",
        "key",
    ]
    as_json = json.loads(rows[columns].to_json(orient="records"))
    wide = backbone_from_spec(spec, device="cpu")
    wide.model.double()
    return {
        "rows": as_json,
        "contexts_float32": trained_contexts(backbone),
        "contexts_float64": trained_contexts(wide),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(study(Path(temporary)), indent=1) + "\n", encoding="utf-8")
