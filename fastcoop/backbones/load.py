"""From a name, a tag, a file or a folder to a backbone whose activation is known and never guessed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained, list_pretrained_tags_by_model
from torch import Tensor, nn

import fastcoop
from fastcoop.backbones.backbone import Backbone, Preprocess, fingerprint
from fastcoop.backbones.fetch import fetch_weights
from fastcoop.backbones.folder import find_weights, is_model_folder, read_folder_config
from fastcoop.backbones.precision import torch_defaults
from fastcoop.backbones.sparse import read_sparse_model
from fastcoop.backbones.text_tower import TextTower, refuse_config
from fastcoop.backbones.weights import Weights, is_sparse_model, known_activation, read_weights
from fastcoop.checks import whole_number
from fastcoop.errors import UserError, nearest

PAPER_BACKBONES = ("RN50", "RN101", "ViT-B-32", "ViT-B-16")
EMBEDDED_WEIGHTS = Path(fastcoop.__path__[0]) / "demo" / "weights"
# Settings of open_clip's configs that change features and no shape of any weight; heads aside, which follow from width.
WITHOUT_WEIGHTS = {
    "text_cfg": (
        *("act_kwargs", "norm_kwargs", "pool_type", "eos_id"),
        *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
    ),
    "vision_cfg": ("act_kwargs", "norm_kwargs", "pool_type", "final_ln_after_pool"),
}
ACTIVATION_SUFFIXES = {"-quickgelu": True, "-gelu": False}


def check_device(device: str | torch.device) -> None:
    """Raise UserError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f'The device "{device}" cannot be used on this machine; use {usable}.') from None


def backbone_from_spec(
    spec: str | Path | Backbone, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load what a grid file or a command line calls a backbone. A `Backbone` is returned as it is.

    spec: one of the paper's four ("RN50", "RN101", "ViT-B/32", "ViT-B/16", meaning OpenAI's weights), an
    embedded one ("demo-resnet", "demo-vit"), "MODEL:TAG" or "MODEL:FILE", or the path of a model folder or of
    a weights file that carries its config. A MODEL may end in "-quickgelu" or "-gelu": its activation.

    Raises UserError if there is no such thing, with the nearest name.
    """
    if isinstance(spec, Backbone):
        return spec
    spec, path = str(spec), Path(spec).expanduser()
    if is_model_path(path):
        return load_backbone(
            path.stem if path.is_file() else path.resolve().name, path, device=device, dtype=dtype
        )
    embedded = EMBEDDED_WEIGHTS / f"{spec}.safetensors"
    if embedded.is_file():
        return load_backbone(spec, embedded, device=device, dtype=dtype)
    name, colon, pretrained = spec.partition(":")
    if colon and len(name) > 1:  # "C:\\..." is a path of Windows, to something that is not there
        return load_backbone(name, pretrained, device=device, dtype=dtype)
    if _clean(spec) in PAPER_BACKBONES:
        return load_backbone(spec, "openai", device=device, dtype=dtype)
    if _clean(spec) in open_clip.list_models():
        tags = ", ".join(list_pretrained_tags_by_model(_clean(spec))) or "none"
        raise UserError(
            f'The backbone "{spec}" needs its weights named, as "{spec}:TAG" or "{spec}:FILE"; tags: {tags}.'
        )
    if path.is_dir():
        find_weights(path)
        read_folder_config(path)
    embedded_names = [file.stem for file in EMBEDDED_WEIGHTS.glob("*.safetensors")]
    raise UserError(
        f'There is no backbone "{spec}": neither a model, nor "MODEL:TAG", nor a folder or file on disk.'
        + nearest(spec, [*PAPER_BACKBONES, *embedded_names])
    )


def is_model_path(path: Path) -> bool:
    """Whether ``path`` is a model folder or any file. Other folders, such as a cache's, may be called like a model."""
    return path.is_file() or is_model_folder(path)


@torch_defaults()
def load_backbone(
    name: str,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    force_quick_gelu: bool | None = None,
) -> Backbone:
    """Load a frozen CLIP through open_clip.

    Args:
        name: an open_clip model ("ViT-B/32" and "ViT-B-32" are the same), or any name for a model whose
            config lies in its folder.
        pretrained: a tag of open_clip's; a weights file (OpenAI's TorchScript archive, a plain state dict,
            safetensors); a model folder (config and weights); or None for random weights drawn from ``seed``.
        force_quick_gelu: the activation, where neither tag, archive, config nor a known digest tells it.

    Raises:
        UserError: unknown model or tag, weights that do not fit or cannot be had, an activation that nothing
            tells, or a text tower that is not causal or not read at its end token.
    """
    check_device(device)
    if pretrained is None:
        whole_number(seed, "the seed")
        name, config, stated = _named_config(name, force_quick_gelu)
        quick_gelu = bool(config.get("quick_gelu", False)) if stated is None else stated
        model = _build(config, quick_gelu, seed=seed)
        return _finish(f"{name}-random{seed}", model, config, quick_gelu, {}, device, dtype)
    if seed != 0:
        raise UserError("A seed draws random weights, and these are given (pretrained); leave it out.")
    path = Path(pretrained).expanduser()
    is_tag = str(pretrained) in {tag for _, tag in list_pretrained()}  # a folder may be called like one
    if is_model_folder(path) or (path.is_dir() and not is_tag):
        return _load_folder(name, path, find_weights(path), force_quick_gelu, device, dtype)
    if path.is_file() and is_sparse_model(path):
        config, state, trained = read_sparse_model(path)
        quick_gelu = bool(config.get("quick_gelu", False)) if force_quick_gelu is None else force_quick_gelu
        model = _build(config, quick_gelu)
        _fill(model, state, str(path))
        return _finish(_clean(name), model, config, quick_gelu, {}, device, dtype, trained)
    if path.is_file():
        if _config_of(name) is None:
            return _load_folder(name, path.parent, path, force_quick_gelu, device, dtype)
        return _load_file(name, path, force_quick_gelu, device, dtype)
    return _load_tag(name, str(pretrained), force_quick_gelu, device, dtype)


def _load_tag(
    name: str, tag: str, force_quick_gelu: bool | None, device: str | torch.device, dtype: torch.dtype
) -> Backbone:
    name, config, stated = _named_config(name, force_quick_gelu)
    known = get_pretrained_cfg(name, tag)
    if not known:
        tags = list_pretrained_tags_by_model(name)
        raise UserError(f'"{tag}" is neither a file, nor a folder, nor a tag of {name}.{nearest(tag, tags)}')
    quick_gelu = bool(known.get("quick_gelu", config.get("quick_gelu", False))) if stated is None else stated
    model = _build(config, quick_gelu)
    path = fetch_weights(name, tag, known)
    _fill(model, read_weights(path).state, str(path))
    label = name if tag == "openai" else f"{name}-{tag}"
    return _finish(label, model, config, quick_gelu, known, device, dtype)


def _load_file(
    name: str, path: Path, force_quick_gelu: bool | None, device: str | torch.device, dtype: torch.dtype
) -> Backbone:
    name, config, stated = _named_config(name, force_quick_gelu)
    weights = read_weights(path)
    quick_gelu = _activation(stated, weights, config, path)
    if quick_gelu is None:
        raise UserError(
            f"{path} does not say which activation it was trained with, and a wrong guess is quietly wrong: "
            f'pass force_quick_gelu=True or False, or name the model "{name}-quickgelu" or "{name}-gelu" '
            "(OpenAI's weights use QuickGELU)."
        )
    model = _build(config, quick_gelu)
    _fill(model, weights.state, str(path))
    label = name if path.stem.startswith(name) else f"{name}-{path.stem}"
    return _finish(label, model, config, quick_gelu, {}, device, dtype)


def _load_folder(
    name: str,
    folder: Path,
    path: Path,
    force_quick_gelu: bool | None,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Backbone:
    config = read_folder_config(folder)
    refuse_config(config.model)
    weights = read_weights(path)
    quick_gelu = _activation(force_quick_gelu, weights, config.model, path)
    if quick_gelu is None:
        _say_that_it_means_gelu(config.path)
    model = _build(config.model, bool(quick_gelu), config.path)
    _fill(model, weights.state, str(path))
    return _finish(
        _clean(name),
        model,
        config.model,
        bool(quick_gelu),
        config.preprocess,
        device,
        dtype,
        tokenizer_folder=folder,
    )


def _activation(stated: bool | None, weights: Weights, config: dict[str, Any], path: Path) -> bool | None:
    """QuickGELU or not: by the user, the archive, the config or the file's digest, in this order; else None.

    Raises UserError where archive and config contradict each other.
    """
    if stated is not None:
        return stated
    by_config = config.get("quick_gelu")
    if None not in (weights.quick_gelu, by_config) and weights.quick_gelu != by_config:
        said = {True: "QuickGELU", False: "GELU"}
        raise UserError(
            f"{path} was traced with {said[bool(weights.quick_gelu)]} and its config says "
            f"{said[bool(by_config)]}; correct the config's quick_gelu."
        )
    told = weights.quick_gelu if weights.quick_gelu is not None else by_config
    return told if told is not None else known_activation(path)


@functools.cache
def _say_that_it_means_gelu(config: Path) -> None:
    """Once a process: an open_clip config without ``quick_gelu`` means GELU, but its author may have forgotten."""
    logging.getLogger("fastcoop").warning(
        f'{config} does not speak of the activation, which means GELU; if it is QuickGELU, add "quick_gelu": true.'
    )


def _clean(name: str) -> str:
    return name.replace("/", "-")


def _config_of(name: str) -> dict[str, Any] | None:
    """open_clip's config of a model name, with or without a suffix that states the activation."""
    name = _clean(name)
    for suffix in ("", *ACTIVATION_SUFFIXES):
        if name.endswith(suffix) and name.removesuffix(suffix) in open_clip.list_models():
            config: dict[str, Any] = open_clip.get_model_config(name.removesuffix(suffix))
            return config
    return None


def _named_config(name: str, force_quick_gelu: bool | None) -> tuple[str, dict[str, Any], bool | None]:
    """(plain model name, config, activation if the caller or the name states it)."""
    cleaned, stated = _clean(name), force_quick_gelu
    for suffix, quick_gelu in ACTIVATION_SUFFIXES.items():
        if cleaned.endswith(suffix) and cleaned.removesuffix(suffix) in open_clip.list_models():
            cleaned = cleaned.removesuffix(suffix)
            stated = quick_gelu if stated is None else stated
            break
    config = open_clip.get_model_config(cleaned) if cleaned in open_clip.list_models() else None
    if config is None:
        raise UserError(f'open_clip has no model "{name}".{nearest(cleaned, open_clip.list_models())}')
    return cleaned, config, stated


def _build(
    config: dict[str, Any], quick_gelu: bool, origin: Path | str = "open_clip", seed: int = 0
) -> nn.Module:
    """The model with random weights from ``seed``, its text tower known to be usable; nothing is downloaded."""
    refuse_config(config)
    config = deepcopy(config) | {"quick_gelu": quick_gelu}
    custom_text = config.pop("custom_text", False)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    for part in ("vision_cfg", "text_cfg"):
        config[part].pop("output_tokens", None)  # of every position, beside the one feature that is used
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            model: nn.Module = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError) as error:
        raise UserError(f"The model config from {origin} cannot be built: {error}") from error
    tower = TextTower.from_model(model)
    if tower.dim != config["embed_dim"]:
        raise UserError(
            f"The model config from {origin} has text features of {tower.dim} numbers and image features of "
            f"{config['embed_dim']}; they can only be compared where both are the same."
        )
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load ``state``, whole and exactly; raises UserError naming what does not fit."""
    state = convert_state_dict(model, dict(state))
    if hasattr(model, "text"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in expected and state[key].numel() == 1:
            state[key] = state[key].reshape(expected[key].shape)
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if problems:
        raise UserError(
            f"The weights in {origin} do not fit the model: {'; '.join(problems[:3])}"
            f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}."
        )
    model.load_state_dict(state)


def _finish(
    name: str,
    model: nn.Module,
    config: dict[str, Any],
    quick_gelu: bool,
    preprocess_facts: dict[str, Any],
    device: str | torch.device,
    dtype: torch.dtype,
    trained_tokens: Tensor | None = None,
    tokenizer_folder: Path | None = None,
) -> Backbone:
    preprocess = _preprocess(model, preprocess_facts)
    digest = fingerprint(model.state_dict(), quick_gelu, preprocess, _unusual(config))
    logging.getLogger("fastcoop").debug(
        "%s: weights %s, %s, images of %d pixels.",
        name,
        digest[:12],
        "QuickGELU" if quick_gelu else "GELU",
        preprocess.size,
    )
    model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    tokenizer = _tokenizer(config["text_cfg"], tokenizer_folder)
    _check_tokenizer(tokenizer, TextTower.from_model(model))
    return Backbone(
        name, model, digest, tokenizer, preprocess, config["embed_dim"], quick_gelu, trained_tokens
    )


def _unusual(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a config that change features without changing the shape of any weight, where they are not
    open_clip's defaults."""
    defaults = {"text_cfg": open_clip.CLIPTextCfg(), "vision_cfg": open_clip.CLIPVisionCfg()}
    return {
        f"{tower}.{name}": config[tower][name]
        for tower, names in WITHOUT_WEIGHTS.items()
        for name in names
        if name in config[tower] and config[tower][name] != getattr(defaults[tower], name)
    }


def _check_tokenizer(tokenizer: Callable[..., Tensor], tower: TextTower) -> None:
    """Refuse a tokenizer of another tower: with tokens that the tower lacks, or without its end token."""
    tokens = tokenizer(["a"], context_length=tower.context_length)[0].tolist()
    words = len(tower.token_embedding)
    if max(tokens) >= words:
        raise UserError(
            f"The tokenizer makes the token {max(tokens)}, but the text tower has {words} tokens; name the tower's own "
            "tokenizer in the model config (hf_tokenizer_name), or correct its vocab_size."
        )
    if tower.end_id is not None and tower.end_id not in tokens:
        raise UserError(
            f"The text tower reads its output at token {tower.end_id} (eos_id of the model config), which its "
            "tokenizer never makes; name the tower's own tokenizer (hf_tokenizer_name), or correct eos_id."
        )


def _preprocess(model: nn.Module, facts: dict[str, Any]) -> Preprocess:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    merged = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), facts)
    interpolation = "bicubic" if merged["interpolation"] == "random" else merged["interpolation"]
    if height != width or merged["resize_mode"] not in ("shortest", "squash"):
        raise UserError(
            f"Image preprocessing to {height} x {width} pixels by resize mode {merged['resize_mode']} is "
            "not supported; expected a square, and shortest or squash."
        )
    mean, std = (_three(merged[key]) for key in ("mean", "std"))
    return Preprocess(int(height), mean, std, interpolation, merged["resize_mode"])


def _three(values: float | list[float] | tuple[float, ...]) -> tuple[float, float, float]:
    if isinstance(values, (int, float)):
        return (float(values),) * 3
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _tokenizer(text_cfg: dict[str, Any], folder: Path | None) -> Callable[..., Tensor]:
    length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    hub_name = text_cfg.get("hf_tokenizer_name")
    tokenizer: Callable[..., Tensor]
    if not hub_name:
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
        return tokenizer
    source = str(folder) if folder is not None else hub_name
    try:
        tokenizer = open_clip.tokenizer.HFTokenizer(
            source, context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options
        )
    except ImportError:
        raise UserError(f'The tokenizer "{source}" needs the package transformers; install it.') from None
    except Exception as error:  # transformers raises whatever its network stack does
        raise UserError(
            f'The tokenizer "{source}" is not on this machine and could not be fetched: {error}'
        ) from error
    return tokenizer
