"""CLIPs in Hugging Face's format: their config, preprocessing and weights as open_clip has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcoop.checks import whole_number
from fastcoop.errors import UserError

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"  # a name that only this format has
PREPROCESSING = {
    "size": "{0} or {{'shortest_edge': {0}}}", "crop_size": "the image size", "resample": "2 (bilinear) or 3 (bicubic)",
}  # fmt: skip
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TOKENS = 49408  # CLIP's own vocabulary
LEGACY_END_ID = 2  # in old configs, whose towers are read at the largest token
# The defaults of transformers, which its configs may leave out.
TEXT: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": TOKENS - 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
ACTIVATIONS: dict[str, tuple[bool, dict[str, Any]]] = {  # QuickGELU or not, and open_clip's act_kwargs
    "quick_gelu": (True, {}),
    "gelu": (False, {}),
    "gelu_pytorch_tanh": (False, {"act_kwargs": {"approximate": "tanh"}}),
    "gelu_new": (False, {"act_kwargs": {"approximate": "tanh"}}),
}
# Names of this format and open_clip's, in the order in which they are replaced.
NAMES = (
    (r"^text_model\.", ""),
    (r"^vision_model\.", "visual."),
    (r"\bembeddings\.", ""),
    (r"\bposition_embedding\.weight$", "positional_embedding"),
    (r"\bpatch_embedding\.", "conv1."),
    (r"\bencoder\.layers\.", "transformer.resblocks."),
    (r"\bfinal_layer_norm\.", "ln_final."),
    (r"\bpre_layrnorm\.", "ln_pre."),
    (r"\bpost_layernorm\.", "ln_post."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def is_hf_clip(config: object) -> bool:
    """Return whether the content of a config.json is that of a model in Hugging Face's format."""
    return isinstance(config, dict) and "model_type" in config


def open_clip_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return open_clip's config of a ``CLIPModel`` of transformers, by the content of its config.json at ``path``.

    Raises:
        UserError: It is another model than CLIP, or its settings have no counterpart in open_clip.
    """
    if config["model_type"] != "clip":
        raise UserError(
            f'{path} is the config of a model of type "{config["model_type"]}"; of models in Hugging Face\'s format '
            'only CLIP ("clip") can be read. Use the same model in open_clip\'s format, such as '
            "ViT-B-16-SigLIP:webli for SigLIP."
        )
    text, vision = (
        defaults | part_of(config, f"{tower}_config", path) | part_of(config, f"{tower}_config_dict", path)
        for tower, defaults in (("text", TEXT), ("vision", VISION))
    )
    for part in (text, vision):
        for name, value in part.items():
            if name in TEXT | VISION and isinstance(TEXT.get(name, VISION.get(name)), int):
                whole_number(value, f"{name} in {path}", 1)
    if text["hidden_act"] != vision["hidden_act"] or text["hidden_act"] not in [*ACTIVATIONS]:
        acts = f"{text['hidden_act']} (text) and {vision['hidden_act']} (images)"
        raise UserError(
            f"{path} has the activations {acts}; expected the same of both, one of {', '.join(ACTIVATIONS)}."
        )
    quick_gelu, act = ACTIVATIONS[text["hidden_act"]]
    end = text["eos_token_id"]
    pool = {} if end in (LEGACY_END_ID, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": end}
    return {
        "embed_dim": whole_number(config.get("projection_dim", 512), f"projection_dim in {path}", 1),
        "quick_gelu": quick_gelu,
        "vision_cfg": _tower(vision) | act | {
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": _tower(text) | act | pool | {
            "heads": text["num_attention_heads"], "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
        },
    }  # fmt: skip


def preprocess_settings(config: Mapping[str, Any], image_size: int, path: Path) -> dict[str, Any]:
    """Return open_clip's preprocessing settings from the content of a preprocessor_config.json at ``path``.

    A UserError says if it is another way than resizing, cropping the center and standardizing.
    """

    def side(name: str) -> Any:
        value = config.get(name, image_size)
        if not isinstance(value, dict):
            return value
        square = value.get("height") if value.get("height") == value.get("width") else None
        return value.get("shortest_edge", square) if name == "size" else square

    size, crop, resample = side("size"), side("crop_size"), config.get("resample", 3)
    fixed = isinstance(config.get("size"), dict) and "height" in config["size"]
    wrong = {"size": size != image_size, "resample": resample not in [*RESAMPLING]}
    wrong["crop_size"] = config.get("do_center_crop", True) and crop != image_size
    if odd := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        raise UserError(
            f"{path} has {odd} {config.get(odd)}; expected {PREPROCESSING[odd].format(image_size)} for a model of "
            f"images of {image_size} pixels."
        )
    stated = {name: config[f"image_{name}"] for name in ("mean", "std") if config.get(f"image_{name}")}
    return {"interpolation": RESAMPLING[resample], "resize_mode": "squash" if fixed else "shortest"} | stated


def open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's state dict of a ``CLIPModel`` of transformers."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name in ("text_projection", "visual.proj"):
            value = value.t().contiguous()
        if not name.endswith("position_ids"):  # not weights
            out[name] = value
    for key in [key for key in out if ".attn.q_proj." in key]:
        parts = [out.pop(key.replace("q_proj", f"{part}_proj"), None) for part in "qkv"]
        kept = [part for part in parts if part is not None]
        out[key.replace("q_proj.", "in_proj_")] = torch.cat(kept)
    return out


def part_of(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the keys and values in a config under ``name``, {} if there are none."""
    if not isinstance(part := config.get(name) or {}, dict):
        raise UserError(f"{path}: {name} should hold keys and values.")
    return part


def _tower(part: Mapping[str, Any]) -> dict[str, Any]:
    width, hidden, eps = part["hidden_size"], part["intermediate_size"], part["layer_norm_eps"]
    ratio = hidden / width
    tower = {"width": width, "layers": part["num_hidden_layers"]}
    if ratio != 4:  # open_clip multiplies and cuts, so a rounded ratio may be one too small
        tower["mlp_ratio"] = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    return tower | ({} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}})
