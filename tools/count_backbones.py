"""Collect the facts of open_clip's models: ``python -m tools.count_backbones`` writes ``backbones/models.csv``.

Nothing is downloaded, and no memory is used for weights. Run it after an update of open_clip.
"""

from __future__ import annotations

import csv
from typing import Any

import open_clip

from fastcoop.backbones.catalog import MODELS, describe

_ROBERTA = {"model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1}  # fmt: skip
_XLM = _ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002}
_MT5 = {"model_type": "mt5", "vocab_size": 250112, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
_NLLB = {"model_type": "m2m_100", "vocab_size": 256206, "d_model": 1024, "max_position_embeddings": 1024,
         "encoder_attention_heads": 16, "decoder_attention_heads": 16}  # fmt: skip
# The Hugging Face text towers that open_clip's configs name: the sizes in their config.json. The numbers of parameters
# that they give are those that open_clip publishes (docs/model_profile.csv in its repository).
HF_TOWERS = {
    "roberta-base": _ROBERTA | {"vocab_size": 50265},
    "xlm-roberta-base": _XLM,
    "xlm-roberta-large": _XLM | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                                 "intermediate_size": 4096},
    "google/mt5-base": _MT5 | {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "google/mt5-xl": _MT5 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "facebook/nllb-200-distilled-600M": _NLLB | {"encoder_layers": 12, "encoder_ffn_dim": 4096},
    "facebook/nllb-200-distilled-1.3B": _NLLB | {"encoder_layers": 24, "encoder_ffn_dim": 8192},
}  # fmt: skip


def row(model: str) -> dict[str, Any]:
    """Return a model's row: its name and facts."""
    config = open_clip.get_model_config(model)
    return {"model": model} | describe(config, HF_TOWERS.get(config["text_cfg"].get("hf_model_name")))


def main() -> None:
    """Write the table."""
    rows = [row(model) for model in open_clip.list_models()]
    with MODELS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
