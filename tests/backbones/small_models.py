"""Every model that open_clip knows, cut to a few megabytes: the same kinds of towers, tokenizers and preprocessing.

Hugging Face configs and tokenizers, which are not on a machine without a network, are replaced by tiny ones of the same
types in a cache folder of Hugging Face's layout.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from open_clip import factory
from safetensors.torch import save_file
from timm.models import vision_transformer_hybrid
from timm.models.vitamin import VitCfg, VitConvCfg

from fastcoop.backbones import load_backbone
from tests.tokenizers import write_tokenizer

NAMES = open_clip.list_models()
CONFIGS = {name: open_clip.get_model_config(name) for name in NAMES}
WIDTH = 16
TOWERS: dict[str, dict[str, Any]] = {
    "roberta": {"model_type": "roberta", "max_position_embeddings": 80},
    "xlm-roberta": {"model_type": "xlm-roberta", "max_position_embeddings": 80},
    "mt5": {
        "model_type": "mt5", "d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1,
        "num_heads": 2,
    },
    "nllb": {
        "model_type": "m2m_100", "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 80,
    },
    "bert": {"model_type": "bert", "max_position_embeddings": 256},
}  # fmt: skip
BERT_LIKE = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def family_of(name: str) -> str:
    """The family of a tokenizer by its name on the hub."""
    patterns = {"nllb": "nllb", "mt5": "mt5", "SigLIP": "siglip", "bert-base-uncased": "bert", "": "xlm-v"}
    return next(family for pattern, family in patterns.items() if pattern in name)


def write_tower(folder: Path, kind: str, vocabulary: int) -> None:
    """Write the config.json of a tiny text tower of one of `TOWERS`."""
    facts = TOWERS[kind] | ({} if "d_model" in TOWERS[kind] else BERT_LIKE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts | {"vocab_size": vocabulary}))


def hub_folder(cache: Path, repository: str) -> Path:
    """The folder of a repository's files in a cache of Hugging Face's layout."""
    root = cache / f"models--{repository.replace('/', '--')}"
    revision = "0" * 40
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    folder = root / "snapshots" / revision
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_hub(cache: Path) -> None:
    """Fill a cache with all tokenizers and text towers that open_clip's configs name."""
    texts = [config["text_cfg"] for config in CONFIGS.values()]
    sizes = {}
    for name in {text["hf_tokenizer_name"] for text in texts if text.get("hf_tokenizer_name")}:
        sizes[name] = write_tokenizer(hub_folder(cache, name), family_of(name))
    for name in {text["hf_model_name"] for text in texts if text.get("hf_model_name")}:
        kind = next(kind for kind in ("xlm-roberta", "roberta", "mt5", "nllb") if kind in name)
        write_tower(hub_folder(cache, name), kind, sizes[name])


def small_config(name: str) -> dict[str, Any]:
    """A config of open_clip with its layers, widths, images and vocabulary cut."""
    config = open_clip.get_model_config(name)
    text, vision = config["text_cfg"], config["vision_cfg"]
    config["embed_dim"] = WIDTH
    if not text.get("hf_model_name"):
        text |= {"width": WIDTH, "heads": 2, "layers": 1}
    if text.get("hf_tokenizer_name"):
        text["vocab_size"] = 100
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 1}
    timm_name = vision.get("timm_model_name")
    if timm_name:
        vision["image_size"] = timm_cuts(timm_name)[1]
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    else:
        vision |= {"layers": 1, "width": 16, "head_width": 8, "image_size": 2 * vision["patch_size"]}
    return config


def timm_cuts(name: str) -> tuple[dict[str, Any], int]:
    """Keyword arguments that cut timm's model ``name``, and the image size."""
    if name.startswith("convnext"):
        return {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 32
    if name.startswith("swin"):
        return {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2), "img_size": 32}, 32
    if name.startswith("fastvit"):
        stages = 5 if name[-1] in "34" else 4
        return {"layers": (1,) * stages, "embed_dims": (8,) * (stages - 2) + (32, 32)}, 64
    if name.startswith("vitamin"):
        conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        stem = VitCfg(embed_dim=(8, 8, 16), depths=(1, 1, 1), stem_width=8, conv_cfg=conv, head_type="1d")
        return {"embed_cfg": stem, "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32}, 32
    found = re.search(r"patch(\d+)", name)
    size = 2 * int(found[1]) if found else 32
    cuts: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": size}
    if re.search("eva|pe_core", name):
        cuts["ref_feat_shape"] = (2, 2)
    return cuts, size


def write_folder(folder: Path, name: str) -> Path:
    """Write a cut model with random weights that tell pictures apart, while `cut_models` holds."""
    model = load_backbone(name, device="cpu").model
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": small_config(name)}))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def cut_models(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    """Cut all of open_clip's models, and let Hugging Face's cache be one of `write_hub`."""
    create, stem = timm.create_model, vision_transformer_hybrid.ConvStem

    def create_small(name: str, **options: Any) -> Any:
        return create(name, **options, **timm_cuts(name)[0])

    def small_stem(channels: Any, **options: Any) -> Any:
        return stem(channels=(4, 4, 16), **options)

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.setattr(vision_transformer_hybrid, "ConvStem", small_stem)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    for name in NAMES:
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, small_config(name))
