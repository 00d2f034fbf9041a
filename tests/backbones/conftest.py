from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model that open_clip knows as "tiny-clip" while the test runs."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-clip", TINY)
    return TINY


@pytest.fixture
def tiny_model() -> open_clip.CLIP:
    torch.manual_seed(1)
    return open_clip.CLIP(**TINY).eval()


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_model: open_clip.CLIP) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    save_file(tiny_model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
