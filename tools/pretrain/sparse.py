"""Write a small CLIP to one file without the token embeddings that were never trained.

``fastcoop.backbones.weights.read_weights`` reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastcoop.backbones.weights import SEEN_IDS, SEEN_ROWS, TOKEN_TABLE
from fastcoop.files import atomic_write


def write_sparse_model(
    path: Path,
    config: dict[str, Any],
    state_dict: dict[str, torch.Tensor],
    trained_ids: torch.Tensor,
    seed: int,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write an open_clip CLIP's weights to ``path`` (safetensors, float16).

    Args:
        path: The file.
        config: The model's open_clip config (``embed_dim``, ``vision_cfg``, ``text_cfg``, ...), kept as metadata.
        state_dict: Of the model; the key ``token_embedding.weight`` is (vocab, width).
        trained_ids: int64 (n,), the rows of that table to keep.
        seed: Draws the other rows.
        facts: Anything JSON about the training, kept as metadata.
    """
    ids = torch.unique(trained_ids)
    tensors = {
        key: value.to(torch.float16) if value.is_floating_point() else value
        for key, value in state_dict.items()
        if key != TOKEN_TABLE
    }
    tensors[SEEN_IDS] = ids.to(torch.int32)
    tensors[SEEN_ROWS] = state_dict[TOKEN_TABLE][ids].to(torch.float16)
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} holds values that float16 cannot")
    metadata = {
        "config": json.dumps(config),
        "vocab_size": str(state_dict[TOKEN_TABLE].shape[0]),
        "seed": str(seed),
        "facts": json.dumps(facts or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, metadata)
        part.chmod(0o644)  # safetensors writes for the owner only
