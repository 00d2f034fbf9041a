"""Small random backbones whose prompts share nothing, of each kind that open_clip has."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from fastcoop.backbones import Backbone, backbone_from_spec
from tests.tokenizers import WORDS, write_pieces, write_tokenizer

WIDTH, DIM = 16, 24
VISION = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
OWN = {"width": WIDTH, "heads": 2, "layers": 2, "no_causal_mask": True}
SIGLIP = {"pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
M2M = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
# The tokenizer's family, options of it, options of the text tower, and the config of a Hugging Face tower.
MEAN, CLS = ({"hf_pooler_type": pooler} for pooler in ("mean_pooler", "cls_pooler"))
LAST = {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "mlp"}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "siglip": ("siglip", {"clean": "canonicalize"}, OWN | SIGLIP | {"context_length": 16}, {}),
    "siglip without projection": (
        "siglip", {}, OWN | SIGLIP | {"context_length": 16, "proj_type": "none", "width": DIM}, {},
    ),
    "clipa": ("bert", {"strip_sep_token": True}, OWN | {"pool_type": "last", "context_length": 20}, {}),
    "mobileclip": ("openai", {}, OWN | {"context_length": 20}, {}),
    "coca": ("openai", {}, {"width": WIDTH, "heads": 2, "layers": 2, "context_length": 19, "embed_cls": True}, {}),
    "roberta": ("roberta", {}, MEAN | {"hf_proj_type": "mlp"}, {"model_type": "roberta", **BERT}),
    "xlm-roberta": ("xlm-v", {}, MEAN | {"hf_proj_type": "mlp"}, {"model_type": "xlm-roberta", **BERT}),
    "bert": ("bert", {}, LAST, {"model_type": "bert", **BERT}),
    "mt5": ("mt5", {}, MEAN | {"hf_proj_type": "linear"}, {"model_type": "mt5", **T5}),
    "nllb": ("nllb", {}, CLS | {"hf_proj_type": "linear"}, {"model_type": "m2m_100", **M2M}),
}  # fmt: skip


def write_plain(folder: Path, kind: str, words: list[str] = WORDS) -> Path:
    """A model folder of a small random model of this kind, with its tokenizer and its tower's config."""
    folder.mkdir(exist_ok=True)
    family, options, text, hf = KINDS[kind]
    length, vocabulary = text.get("context_length", 24), 49408
    named: dict[str, Any] = {}
    if family != "openai":
        write = write_pieces if family == "roberta" else partial(write_tokenizer, family=family)
        vocabulary = write(folder, words=words)
        named = {"hf_tokenizer_name": "tiny/tokenizer", "tokenizer_kwargs": options}
    text = {"context_length": length, "vocab_size": vocabulary, **text, **named}
    config: dict[str, Any] = {"embed_dim": DIM, "vision_cfg": dict(VISION), "text_cfg": text}
    local: dict[str, Any] = {}
    if hf:
        pad = open_clip.tokenizer.HFTokenizer(str(folder)).tokenizer.pad_token_id
        special = {"pad_token_id": pad, "vocab_size": vocabulary, "max_position_embeddings": 64}
        (folder / "config.json").write_text(json.dumps(hf | special))
        local = {"hf_model_name": str(folder), "hf_model_pretrained": False}
        text["hf_model_name"] = "tiny/tower"
    if kind == "coca":
        sizes = {"width": WIDTH, "heads": 2, "layers": 1, "context_length": length, "vocab_size": vocabulary}
        config["multimodal_cfg"] = sizes
        config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        text["output_tokens"] = True
    else:
        config["custom_text"] = True
    torch.manual_seed(0)
    given = {key: value for key, value in config.items() if key != "custom_text"} | {"text_cfg": text | local}
    model: Any = (open_clip.CoCa if kind == "coca" else open_clip.CustomTextCLIP)(**given)
    for name, weight in model.text.named_parameters():  # far from open_clip's tiny random ones
        if weight.ndim > 1 or "embedding" in name:
            nn.init.normal_(weight, std=0.5 if "embed" in name else weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.2)
    model.logit_scale.data.fill_(4.6)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def plain_backbone(
    folder: Path, kind: str, dtype: torch.dtype = torch.float64, words: list[str] = WORDS
) -> Backbone:
    """The model of `write_plain`, loaded."""
    return backbone_from_spec(str(write_plain(folder, kind, words)), device="cpu", dtype=dtype)
