"""Load a backbone from a name, a tag, a file, a folder or the hub. Its activation is known, never guessed."""

from __future__ import annotations

import functools
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastcoop
from fastcoop.backbones import hf_clip, sources
from fastcoop.backbones.backbone import RESIZE_MODES, Backbone, Preprocess, fingerprint
from fastcoop.backbones.devices import resolve_device
from fastcoop.backbones.late import open_clip
from fastcoop.backbones.precision import torch_defaults
from fastcoop.backbones.sources import HUB_PREFIX
from fastcoop.backbones.text_tower import text_tower
from fastcoop.backbones.tokenizer import (
    DEFAULT_LENGTH,
    NEEDS_TRANSFORMERS,
    check_tokenizer,
    load_tokenizer,
    tokenizer_facts,
)
from fastcoop.backbones.weights import Weights, known_activation, read_weights
from fastcoop.checks import shortened, whole_number
from fastcoop.errors import UserError, nearest

PAPER_BACKBONES = ("RN50", "RN101", "ViT-B-32", "ViT-B-16")
EMBEDDED_WEIGHTS = Path(fastcoop.__path__[0]) / "demo" / "weights"
# Settings of open_clip's configs that change features and no shape of any weight, except the number of heads.
WITHOUT_WEIGHTS = {
    "text_cfg": "act_kwargs norm_kwargs pool_type eos_id hf_tokenizer_name tokenizer_mode tokenizer_kwargs "
    "no_causal_mask hf_pooler_type",
    "vision_cfg": "act_kwargs norm_kwargs pool_type final_ln_after_pool attn_pooler_heads",
}
# Width of a head by that of a tower, where it is not 64 in open_clip's configs and the demo's.
HEAD_WIDTHS = {
    "text_cfg": {128: 32, 1152: 72},
    "vision_cfg": {128: 32, 1280: 80, 1408: 88, 1664: 104, 1792: 112},
}
SMALL_HEAD_WIDTH = 8  # of towers whose width is no multiple of 64, which only other configs have
# In text_cfg: the digest covers the tokenizer too.
OF_OTHER_TOWERS = ("no_causal_mask", "embed_cls", "hf_model_name")
OLD_POSITIONS = "text.transformer.embeddings.position_ids"  # in checkpoints of older versions of transformers
INTERPOLATIONS = {
    "bicubic": "bicubic",
    "bilinear": "bilinear",
    "random": "bicubic",
}  # open_clip's, at test time
ACTIVATION_SUFFIXES = {"-quickgelu": True, "-gelu": False}
ACTIVATIONS = {True: "QuickGELU", False: "GELU"}

log = logging.getLogger("fastcoop")


@dataclass(eq=False)
class _Source:
    """What a backbone is made from; without a weights file its weights are random. ``config`` is open_clip's, with
    the activation under "quick_gelu"; ``config_file`` names it in messages."""

    name: str
    config: dict[str, Any]
    weights: Weights | None = None
    weights_file: Path | None = None
    config_file: Path | str = "open_clip"
    preprocess: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # may hold the config and the tokenizer of a Hugging Face text tower


def backbone_from_spec(
    spec: str | Path | Backbone, *, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load the backbone that a grid file or a command line names.

    Args:
        spec: One of the paper's four ("RN50", "RN101", "ViT-B/32", "ViT-B/16", with OpenAI's weights), an embedded one
            ("demo-resnet", "demo-vit"), "MODEL:TAG" or "MODEL:FILE", "hf-hub:ORGANIZATION/NAME", or the path of a
            model folder or of a weights file that carries its config. A MODEL may end in "-quickgelu" or "-gelu": its
            activation. A backbone is returned as it is.
        device: The device to load it to: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:<index>".
        dtype: The dtype of its weights and features.

    Raises:
        UserError: There is no such backbone; the message suggests the nearest name.
    """
    if isinstance(spec, Backbone):
        return spec
    path, spec = Path(spec).expanduser(), str(spec)

    def load(name: str, pretrained: str | Path | None = None) -> Backbone:
        place = str(path.resolve()) if pretrained == path else str(spec)
        return replace(load_backbone(name, pretrained, device=device, dtype=dtype), spec=place)

    embedded = EMBEDDED_WEIGHTS / f"{spec}.safetensors"
    if spec.startswith(HUB_PREFIX):
        return load(spec)
    if is_model_path(path):
        return load(path.stem if path.is_file() else path.resolve().name, path)
    if embedded.is_file():
        return load(spec, embedded)
    name, colon, pretrained = spec.partition(":")
    if colon and len(name) > 1:  # "C:\\..." is a path of Windows that does not exist
        return load(name, pretrained)
    model, models = _clean(spec), open_clip.list_models()
    if model in PAPER_BACKBONES:
        return load(spec, "openai")
    if model in models:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise UserError(
            f'The backbone "{spec}" needs its weights named, as "{spec}:TAG" or "{spec}:FILE"; tags: {tags}.'
        )
    if path.is_dir():
        return load(path.resolve().name, path)  # raises an error that says what the folder lacks
    embedded_names = [file.stem for file in EMBEDDED_WEIGHTS.glob("*.safetensors")]
    raise UserError(
        f'There is no backbone "{spec}": neither a model, nor "MODEL:TAG", nor a folder or file on disk.'
        + nearest(spec, [*PAPER_BACKBONES, *embedded_names, *models])
    )


def is_model_path(path: Path) -> bool:
    """Return whether ``path`` is a model folder or any file; a folder with a model's name may be a cache's."""
    return path.is_file() or sources.is_model_folder(path)


@torch_defaults()
def load_backbone(
    name: str,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    force_quick_gelu: bool | None = None,
) -> Backbone:
    """Load a frozen CLIP through open_clip.

    Args:
        name: An open_clip model ("ViT-B/32" and "ViT-B-32" are the same), "hf-hub:ORGANIZATION/NAME" with its weights,
            or any name for a model whose config is in its folder.
        pretrained: A tag of open_clip's; a weights file (OpenAI's TorchScript archive, a plain state dict, a
            checkpoint, safetensors, big_vision's .npz); a model folder (config and weights, in open_clip's format or
            Hugging Face's); or None: random weights drawn from ``seed``.
        device: The device to load it to: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:<index>".
        dtype: The dtype of its weights and features.
        seed: Seed of random weights.
        force_quick_gelu: Whether the activation is QuickGELU; None: stated by name, tag, archive, config or digest.

    Raises:
        UserError: Unknown model or tag, weights that do not fit or cannot be read, or an unknown activation.
    """
    device = resolve_device(device)
    if name.startswith(HUB_PREFIX):
        if pretrained is not None:
            raise UserError(
                f'"{name}" has its own weights; leave out pretrained, or name the model without "{HUB_PREFIX}".'
            )
        name = name.removeprefix(HUB_PREFIX)
        pretrained = sources.fetch_model(name)
    if pretrained is None:
        whole_number(seed, "the seed")
        model_name, config, stated = _named_config(name, force_quick_gelu)
        source = _Source(f"{model_name}-random{seed}", _with_activation(config, stated))
    elif seed != 0:
        raise UserError("A seed draws random weights, and these are given (pretrained); leave it out.")
    else:
        source = _find_source(name, pretrained, force_quick_gelu)
    config, text_cfg, weights = source.config, source.config["text_cfg"], source.weights
    hf_name = text_cfg.get("hf_model_name")
    hf_config = sources.read_tower_config(hf_name, source.folder) if hf_name else None
    tokenizer = load_tokenizer(text_cfg, source.folder)
    model = _build(config, source.config_file, seed, hf_config)
    if weights is not None:
        _fill(model, weights.state, source.weights_file)
    tower = text_tower(model, text_cfg.get("context_length", DEFAULT_LENGTH))
    end_id = text_cfg.get("eos_id", 2) if text_cfg.get("pool_type") == "eos" else None
    check_tokenizer(tokenizer, tower.vocabulary, end_id, tower.context_length)
    preprocess = _preprocess(model, source.preprocess, source.config_file)
    unusual = _unusual(config) | ({"hf_config": hf_config} if hf_name else {})
    if any(text_cfg.get(name) for name in OF_OTHER_TOWERS):
        unusual |= {"tokenizer": tokenizer_facts(tokenizer), "pad_id": text_cfg.get("pad_id", 0)}
    digest = fingerprint(model.state_dict(), config["quick_gelu"], preprocess, unusual)
    facts = source.name, digest[:12], ACTIVATIONS[config["quick_gelu"]], preprocess.size
    log.debug("%s: weights %s, %s, images of %d pixels.", *facts)
    places = source.weights_file, source.config_file
    return Backbone(
        source.name, model.eval().requires_grad_(False).to(device=device, dtype=dtype), digest, tokenizer, preprocess,
        config["embed_dim"], config["quick_gelu"], weights.trained_tokens if weights else None,
        tuple(path.resolve() for path in places if isinstance(path, Path)),
    )  # fmt: skip


def _find_source(name: str, pretrained: str | Path, force_quick_gelu: bool | None) -> _Source:
    path, is_named = Path(pretrained).expanduser(), False
    tags = (tag for _, tag in open_clip.list_pretrained())  # a folder may have a tag's name
    if sources.is_model_folder(path) or (path.is_dir() and str(pretrained) not in tags):
        path = sources.find_weights(path)
    elif path.is_file():
        is_named = _open_clip_model(name) is not None
    else:
        return _from_tag(name, str(pretrained), force_quick_gelu)
    folder, weights = path.parent, read_weights(path)
    if weights.config is not None:
        return _Source(_clean(name), _with_activation(weights.config, force_quick_gelu), weights, path)
    if not is_named:
        config, preprocess, config_file = sources.read_folder_config(folder)
        quick_gelu = _activation(force_quick_gelu, weights, config, path)
        other_parts = config["text_cfg"].get("hf_model_name") and config["vision_cfg"].get("timm_model_name")
        if quick_gelu is None and not other_parts:  # the activations of other libraries' towers are their own
            _warn_defaulting_to_gelu(config_file)
        config = _with_activation(config, quick_gelu)
        return _Source(_clean(name), config, weights, path, config_file, preprocess, folder)
    model, config, stated = _named_config(name, force_quick_gelu)
    usual, unlike = sources.usual_settings(model)
    quick_gelu = _activation(stated, weights, config, path)
    quick_gelu = usual.get("quick_gelu") if quick_gelu is None else quick_gelu
    if quick_gelu is None:
        raise UserError(
            f"{path} does not state which activation it was trained with, and a wrong one gives wrong features without "
            f'an error: pass force_quick_gelu=True or False, or name the model "{model}-quickgelu" or "{model}-gelu" '
            "(OpenAI's weights use QuickGELU)."
        )
    label = model if path.stem.startswith(model) else f"{model}-{path.stem}"
    if unlike:
        log.warning(
            f"Images for {path} are prepared as for most weights of {model}, but not as for {', '.join(unlike)}; if "
            "the file is one of these, name the folder of the file with its open_clip_config.json instead."
        )
    return _Source(
        label, _with_activation(config, quick_gelu), weights, path, preprocess=usual, folder=folder
    )


def _from_tag(name: str, tag: str, force_quick_gelu: bool | None) -> _Source:
    model, config, stated = _named_config(name, force_quick_gelu)
    known = open_clip.get_pretrained_cfg(model, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise UserError(f'"{tag}" is neither a file, nor a folder, nor a tag of {model}.{nearest(tag, tags)}')
    path = sources.fetch_weights(model, tag, known)
    config = _with_activation(config, known.get("quick_gelu") if stated is None else stated)
    label = model if tag == "openai" else f"{model}-{tag}"
    return _Source(label, config, read_weights(path), path, preprocess=known)


def _with_activation(config: dict[str, Any], stated: bool | None) -> dict[str, Any]:
    """Return the config with the activation stated elsewhere, else its own; a config without one means GELU."""
    return config | {"quick_gelu": bool(config.get("quick_gelu") if stated is None else stated)}


def _activation(stated: bool | None, weights: Weights, config: dict[str, Any], path: Path) -> bool | None:
    """Return whether the activation is QuickGELU, by the user, the archive, the config or the file's digest."""
    if stated is not None:
        return stated
    by_archive, by_config = weights.quick_gelu, config.get("quick_gelu")
    if by_archive is None:
        return known_activation(path) if by_config is None else bool(by_config)
    if by_config is not None and by_archive != by_config:
        raise UserError(
            f"{path} was traced with {ACTIVATIONS[by_archive]} and its config says {ACTIVATIONS[bool(by_config)]}; "
            "correct the config's quick_gelu."
        )
    return by_archive


@functools.cache
def _warn_defaulting_to_gelu(config: Path) -> None:
    """Warn once per process: an open_clip config without ``quick_gelu`` means GELU, but may lack it by mistake."""
    log.warning(
        f'{config} does not state the activation, which means GELU; if it is QuickGELU, add "quick_gelu": true.'
    )


def _clean(name: str) -> str:
    return name.replace("/", "-")


def _open_clip_model(name: str) -> tuple[str, bool | None] | None:
    """Return open_clip's name of a model, and whether the name's ending states QuickGELU; None for other names."""
    plain, models = _clean(name), open_clip.list_models()
    for suffix, quick_gelu in ACTIVATION_SUFFIXES.items():
        if plain.endswith(suffix) and plain.removesuffix(suffix) in models:
            return plain.removesuffix(suffix), quick_gelu
    return (plain, None) if plain in models else None


def _named_config(name: str, force_quick_gelu: bool | None) -> tuple[str, dict[str, Any], bool | None]:
    """Return open_clip's name of a model, its config, and the activation if caller or name state it."""
    if found := _open_clip_model(name):
        model, by_name = found
        stated = by_name if force_quick_gelu is None else force_quick_gelu
        return model, open_clip.get_model_config(model), stated
    embedded = (EMBEDDED_WEIGHTS / f"{name}.safetensors").is_file()
    if embedded or ":" in name or Path(name).expanduser().exists():
        raise UserError(
            f'"{name}" is not the name of an open_clip model. For included backbones, MODEL:TAG, folders and files, '
            f'use backbone_from_spec("{name}").'
        )
    raise UserError(f'open_clip has no model "{name}".{nearest(_clean(name), open_clip.list_models())}')


def _build(
    config: dict[str, Any], origin: Path | str, seed: int, hf_config: dict[str, Any] | None
) -> nn.Module:
    """Return the model with random weights from ``seed``, without a download."""
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            model = construct(config, hf_config)
    except Exception as error:  # odd settings may raise any exception
        if hf_config is not None and "pip install transformers" in str(error):
            raise UserError(NEEDS_TRANSFORMERS.format("The text tower of", origin)) from None
        raise UserError(f"The model config from {origin} cannot be built: {error}") from error
    dim = text_tower(model).dim
    if dim != config["embed_dim"]:
        raise UserError(
            f"The model config from {origin} has text features of {dim} numbers and image features of "
            f"{config['embed_dim']}; expected the same size of both."
        )
    return model


def construct(config: Mapping[str, Any], hf_config: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the model of an open_clip config; ``hf_config`` is that of its Hugging Face text tower, if it has one."""
    parts = deepcopy(dict(config))
    is_custom = parts.pop("custom_text", False) or hf_config is not None
    kind = "CoCa" if "multimodal_cfg" in parts else "CustomTextCLIP" if is_custom else "CLIP"
    if "timm_model_name" in parts["vision_cfg"]:
        parts["vision_cfg"]["timm_model_pretrained"] = False
    for part in ("vision_cfg", "text_cfg"):
        parts[part]["output_tokens"] = kind == "CoCa"  # at every position, which only its own code needs
    make: Callable[..., nn.Module] = getattr(open_clip, kind)
    if hf_config is None:
        return make(**parts)
    with tempfile.TemporaryDirectory() as folder:
        # open_clip reads a file; this one holds only what was checked
        (Path(folder) / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
        parts["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
        return make(**parts)


def _fill(model: nn.Module, state: dict[str, Tensor], origin: Path | None) -> None:
    """Load ``state``; refuse one that does not fit."""
    try:
        if origin is not None and origin.suffix == ".npz":
            open_clip.convert.load_big_vision_weights(model, str(origin))
        else:
            model.load_state_dict(_converted(model, state, origin))
    except Exception as error:  # damaged files may raise any exception
        problems = re.sub(r"^Error.s. in [^:]*: ", "", " ".join(str(error).split()))
        raise UserError(f"The weights in {origin} do not fit the model: {problems[:300]}") from error


def _converted(model: nn.Module, state: dict[str, Tensor], origin: Path | None) -> dict[str, Tensor]:
    """Return ``state`` by the model's own names, for its sizes of images and texts."""
    if hf_clip.TOKEN_TABLE in state:
        state = hf_clip.open_clip_state(state)
    state = open_clip.convert.convert_state_dict(model, dict(state))
    if hasattr(model, "text"):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    if "logit_bias" in expected:
        state.setdefault("logit_bias", torch.zeros_like(expected["logit_bias"]))
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in expected and state[key].numel() == 1:
            state[key] = state[key].reshape(expected[key].shape)
    if OLD_POSITIONS not in expected:
        state.pop(OLD_POSITIONS, None)
    stored = {key: value.shape for key, value in state.items() if key.endswith("positional_embedding")}
    open_clip.model.resize_pos_embed(state, model)
    open_clip.model.resize_text_pos_embed(state, model)
    for key, shape in stored.items():
        if state[key].shape != shape:
            sizes = f"from {tuple(shape)} to {tuple(state[key].shape)}"
            log.warning(
                f"{origin}: {key} is interpolated {sizes}, as open_clip does for another image or text size."
            )
    return state


def _unusual(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in ``WITHOUT_WEIGHTS`` that differ from open_clip's defaults, and head widths that do."""
    defaults = {"text_cfg": open_clip.CLIPTextCfg(), "vision_cfg": open_clip.CLIPVisionCfg()}
    found = {
        f"{tower}.{name}": config[tower][name]
        for tower, names in WITHOUT_WEIGHTS.items()
        for name in names.split()
        if name in config[tower] and config[tower][name] != getattr(defaults[tower], name)
    }
    text, vision = (vars(one) | config[tower] for tower, one in defaults.items())
    is_resnet = not isinstance(vision["layers"], int)  # whose heads pool features of 32 times its width
    heads = {
        "text_cfg": (text["hf_model_name"], text["width"], text["width"] / text["heads"]),
        "vision_cfg": (
            vision["timm_model_name"], vision["width"] * (32 if is_resnet else 1), vision["head_width"]
        ),
    }  # fmt: skip
    for tower, (is_other, width, head_width) in heads.items():
        usual = HEAD_WIDTHS[tower].get(width, SMALL_HEAD_WIDTH if width % 64 else 64)
        if not is_other and head_width != usual:
            found[f"{tower}.head_width"] = head_width
    return found


def _preprocess(model: nn.Module, settings: dict[str, Any], origin: Path | str) -> Preprocess:
    height, width = np.broadcast_to(model.visual.image_size, 2).tolist()  # type: ignore[union-attr,arg-type]
    merged = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), settings)
    mode = merged["resize_mode"]
    if height != width or mode not in RESIZE_MODES:
        raise UserError(
            f"Image preprocessing to {height} x {width} pixels by resize mode {mode} is not supported; expected a "
            f"square, and one of {', '.join(RESIZE_MODES)}."
        )
    try:
        mean, std = (np.broadcast_to(merged[key], 3).astype(float).tolist() for key in ("mean", "std"))
        interpolation, fill_color = INTERPOLATIONS[merged["interpolation"]], int(merged["fill_color"])
        is_usable = np.isfinite([*mean, *std]).all() and min(std) > 0 and 0 <= fill_color <= 255
    except (TypeError, ValueError, LookupError, OverflowError):
        is_usable = False
    if not is_usable:
        raise UserError(
            f"{origin} has the image preprocessing {shortened(settings)}; expected numbers for mean and, above 0, for "
            f"std, one of {', '.join(INTERPOLATIONS)} for interpolation, and 0 to 255 for fill_color. Correct it."
        )
    return Preprocess(int(height), tuple(mean), tuple(std), interpolation, mode, fill_color)
