"""A small CLIP in one file: half-precision weights that leave out the embeddings of words never trained.

A token table of 49,408 rows is most of a small CLIP, and a backbone pretrained on a few thousand words has
trained few of its rows. Such a file stores only those; the others are drawn again from a seed. The ids of the
stored rows tell readers of learned contexts which words mean anything to this backbone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastcoop.errors import UserError

TABLE = "token_embedding.weight"
SEEN_IDS = "token_embedding.seen_ids"
SEEN_ROWS = "token_embedding.seen_rows"
UNSEEN_STD = 0.02


def write_sparse_model(
    path: Path,
    config: dict[str, Any],
    state_dict: dict[str, torch.Tensor],
    trained_ids: torch.Tensor,
    seed: int,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write an open_clip CLIP's weights to ``path`` (safetensors, float16), whole or not at all.

    config: the model's open_clip config (``embed_dim``, ``vision_cfg``, ``text_cfg``, ...), kept as metadata.
    state_dict: of the model; the key ``token_embedding.weight`` is (vocab, width).
    trained_ids: int64 (n,), the rows of that table to keep. seed: draws the rows that are left out.
    facts: anything JSON about the training, kept as metadata.
    """
    ids = torch.unique(trained_ids)
    tensors = {
        key: value.to(torch.float16) if value.is_floating_point() else value
        for key, value in state_dict.items()
        if key != TABLE
    }
    tensors[SEEN_IDS] = ids.to(torch.int32)
    tensors[SEEN_ROWS] = state_dict[TABLE][ids].to(torch.float16)
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} holds values that float16 cannot")
    metadata = {
        "config": json.dumps(config),
        "vocab_size": str(state_dict[TABLE].shape[0]),
        "seed": str(seed),
        "facts": json.dumps(facts or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({key: value.contiguous() for key, value in tensors.items()}, part, metadata)
    part.chmod(0o644)  # safetensors writes for the owner only
    os.replace(part, path)


def read_sparse_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """Read a file of ``write_sparse_model``: (config, state dict, trained tokens).

    The state dict is float32 and complete, ready for ``open_clip.CLIP(**config).load_state_dict``; rows of
    the token table that the file leaves out are N(0, 0.02^2) from the file's seed. trained tokens: bool
    (vocab,), which rows the file holds. Raises UserError if ``path`` is not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} should be a safetensors file of model weights, but cannot be read: {error}."
        ) from error
    missing = {"config", "vocab_size", "seed"} - metadata.keys() | {SEEN_IDS, SEEN_ROWS} - state.keys()
    if missing:
        raise UserError(f"{path} is not a sparse model file: it lacks {', '.join(sorted(missing))}.")
    ids, rows = state.pop(SEEN_IDS).long(), state.pop(SEEN_ROWS).float()
    vocabulary = int(metadata["vocab_size"])
    generator = torch.Generator().manual_seed(int(metadata["seed"]))
    shape = vocabulary, rows.shape[1]
    table = torch.randn(shape, generator=generator, dtype=torch.float32) * UNSEEN_STD
    table[ids] = rows
    trained = torch.zeros(vocabulary, dtype=torch.bool)
    trained[ids] = True
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return json.loads(metadata["config"]), {**state, TABLE: table}, trained


def read_facts(path: Path) -> dict[str, Any]:
    """What the file at ``path`` says of its own training, as given to ``write_sparse_model``."""
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads((file.metadata() or {}).get("facts", "{}"))
    return facts
