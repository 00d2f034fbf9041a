"""The backbones on this machine and those that open_clip knows: facts from their configs, without reading weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastcoop.backbones import sources
from fastcoop.backbones.late import open_clip, open_clip_part
from fastcoop.backbones.load import EMBEDDED_WEIGHTS, construct, is_model_path
from fastcoop.backbones.sources import HUB_PREFIX
from fastcoop.backbones.text_tower import prompt_path_of
from fastcoop.backbones.weights import expected_sha256
from fastcoop.errors import UserError, unknown

COUNTS = Path(__file__).with_name("models.csv")  # of open_clip's models, written by tools/count_backbones.py
# Of `PromptCost`: classes, context vectors, tokens of a class name, and a prompt's start, full stop and end.
CLASSES, VECTORS, NAME_TOKENS, AROUND = 100, 16, 2, 3
CLIP_TOKENIZER = "CLIP's own"


@dataclass(frozen=True)
class TextSize:
    """Sizes of a text tower: of a vector, of its layers, and of a prompt in tokens."""

    width: int
    layers: int
    heads: int
    hidden: int  # of the MLP
    tokens: int


@dataclass(frozen=True)
class PromptCost:
    """What one run's training step computes, for 100 classes with names of two tokens, class token at the end.

    Floating-point operations, forward and backward, are an estimate; ``fastcoop sweep --dry-run`` counts a grid's.
    """

    vectors: int  # M: 16, or the most that fit
    shared_positions: int  # context vectors once, and each class's name, full stop and end
    shared_flops: float
    plain_positions: int  # all positions of all prompts
    plain_flops: float

    @classmethod
    def of(cls, text: TextSize, masks_padding: bool = False) -> PromptCost:
        """Return the cost with a text tower of these sizes; one that masks padding computes none of it."""
        vectors = min(VECTORS, text.tokens - NAME_TOKENS - AROUND)  # 16 tokens have no place for 16 vectors
        tail = NAME_TOKENS + AROUND - 1
        keys = sum(range(2, vectors + 2)) + CLASSES * sum(range(vectors + 2, vectors + 2 + tail))
        length = vectors + NAME_TOKENS + AROUND if masks_padding else text.tokens
        shared, plain = vectors + CLASSES * tail, CLASSES * length

        def flops(positions: int, keys: int) -> float:
            products = 4 * (4 * text.width**2 + 2 * text.width * text.hidden)
            return float(text.layers * (positions * products + 12 * text.width * keys))

        return cls(vectors, shared, flops(shared, keys), plain, flops(plain, plain * length))


@dataclass(frozen=True)
class ListedWeights:
    """Weights of a backbone.

    Attributes:
        backbone: What names the backbone with them, such as "ViT-B-32:openai".
        file: The file, if it is on this machine.
        repository: The Hugging Face repository with the weights, config and tokenizer, or "".
        address: Address of the single file, or "".
    """

    backbone: str
    file: Path | None = None
    repository: str = ""
    address: str = ""

    @property
    def tag(self) -> str:
        """The part after open_clip's model, or ""."""
        return "" if self.backbone.startswith(HUB_PREFIX) else self.backbone.partition(":")[2]


@dataclass(frozen=True)
class Listed:
    """A backbone in the list.

    Attributes:
        name: Of open_clip's model, an embedded backbone, a folder, or "hf-hub:ORGANIZATION/NAME".
        parameters: Of the whole model; None if they were not counted.
        image_parameters: Of the image tower.
        image_size: Pixels.
        features: Size of an image or text feature.
        text: Sizes of the text tower; None if they are not known.
        cost: Of learning prompts.
        path: How prompts are learned: "shared" (what prompts have in common is computed once), "plain" (all positions
            of all prompts), or None (not at all).
        reason: Why not "shared"; "" for shared.
        tokenizer: "CLIP's own", or a name on the Hugging Face hub.
        weights: Known weights.
    """

    name: str
    parameters: int | None
    image_parameters: int | None
    image_size: int
    features: int
    text: TextSize | None
    cost: PromptCost | None
    path: str | None
    reason: str
    tokenizer: str
    weights: tuple[ListedWeights, ...]

    @property
    def at_hand(self) -> tuple[ListedWeights, ...]:
        """The weights that are on this machine."""
        return tuple(one for one in self.weights if one.file)


def list_backbones(text: str | None = None) -> list[Listed]:
    """List backbones, those whose weights are on this machine first.

    Args:
        text: Part of the names of those wanted, in any case; or a folder, whose model folders are listed. None: all.

    Raises:
        UserError: Nothing of this name is known; the message suggests the nearest name.
    """
    folder = Path(text).expanduser() if text else None
    if folder is not None and folder.is_dir() and (inside := _model_folders(folder)):
        return [_of_folder(path, str(path)) for path in inside]
    named = _named()
    found = [name for name in named if text is None or _plain(text) in _plain(name)]
    if not found:
        raise unknown("backbone", text, named)
    return sorted(map(_listed, found), key=lambda one: not one.at_hand)


def find_backbone(name: str) -> Listed | None:
    """Return the backbone of exactly this name, alone or with a tag or file behind it; None if there is none.

    Raises:
        UserError: open_clip has no such tag, a folder's config cannot be read, or the hub's cache lacks the model.
    """
    path = Path(name).expanduser()
    if name.startswith(HUB_PREFIX):
        if (folder := _cached_models().get(name)) is None:
            raise sources.missing_model(name.removeprefix(HUB_PREFIX))
        return _of_folder(folder, name)
    if path.is_dir() and is_model_path(path):
        return _of_folder(path, name)
    known = {_plain(one): one for one in _named()}
    model, _, tag = name.partition(":")
    found = known.get(_plain(model)) or known.get(_plain(model).removesuffix("-gelu"))
    if found is None:
        return None
    one = _listed(found)
    if not tag:
        return one
    chosen = tuple(weights for weights in one.weights if weights.tag == tag)
    if (file := Path(tag).expanduser()).is_file():
        chosen = (ListedWeights(name, file),)
    if not chosen:
        raise unknown(f"file or tag of {found}", tag, (weights.tag for weights in one.weights))
    return replace(one, weights=chosen)


def weights_at_hand() -> list[ListedWeights]:
    """Return the weights on this machine: embedded ones, models in Hugging Face's cache, and open_clip's tags."""
    embedded = [ListedWeights(path.stem, path) for path in sorted(EMBEDDED_WEIGHTS.glob("*.safetensors"))]
    cached = [ListedWeights(name, sources.find_weights(folder)) for name, folder in _hub_models().items()]
    known = open_clip_part("pretrained")  # the whole of open_clip takes seconds
    tags = [_of_tag(":".join(pair), known.get_pretrained_cfg(*pair)) for pair in known.list_pretrained()]
    return [one for one in (*embedded, *cached, *tags) if one.file]


def list_lines(found: list[Listed]) -> Iterator[str]:
    """Yield the list as lines of text, a header first."""
    rows = [("backbone", "parameters", "pixels", "features", "text tower", "prompts", "weights")]
    for one in found:
        text = one.text
        size = f"{text.width} x {text.layers}, {text.heads} heads, {text.tokens} tokens" if text else ""
        tags = ", ".join(weights.tag for weights in one.at_hand if weights.tag)
        to_do = f"{len(one.weights)} to download" if one.weights else "none known"
        weights = f"here: {tags}" if tags else "here" if one.at_hand else to_do
        numbers = _millions(one.parameters), str(one.image_size), str(one.features)
        rows.append((one.name, *numbers, size, str(one.path), weights))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, "<>>><<<", strict=True)
        yield "  ".join(f"{cell:{align}{width}}" for cell, width, align in cells).rstrip()


def page_lines(one: Listed) -> Iterator[str]:
    """Yield all facts of a backbone as lines of text, and the commands to use it."""
    facts = {"parameters": _millions(one.parameters)}
    if one.image_parameters:
        facts["parameters"] += f", {_millions(one.image_parameters)} of them for images"
    facts["images"] = f"{one.image_size} x {one.image_size} pixels, features of {one.features} numbers"
    if (text := one.text) is not None:
        sizes = f"width {text.width}, {text.layers} layers, {text.heads} heads"
        facts["text tower"] = f"{sizes}, {text.tokens} tokens"
        if (room := text.tokens - VECTORS - 2) < text.tokens // 2:
            facts["text tower"] += f"; {VECTORS} vectors leave {max(room, 0)} for a class name and full stop"
    facts["tokenizer"] = one.tokenizer
    facts["prompts"] = f"{one.path} path" if one.path else "not learned"
    facts["prompts"] += one.reason and f": {one.reason}"
    if one.path and (cost := one.cost) is not None:
        costs = {
            "shared": f"{cost.shared_positions:,} positions, {cost.shared_flops:.2g} operations",
            "plain": f"{cost.plain_positions:,} positions, {cost.plain_flops:.2g} operations",
        }
        other, ratio = "plain" if one.path == "shared" else "shared", cost.plain_flops / cost.shared_flops
        share = f"{ratio:.0f} times as many" if other == "plain" else f"1/{ratio:.0f}"
        step = f"{CLASSES} classes, M = {cost.vectors}: {costs[one.path]}"
        facts["a step"] = f"{step} ({other} path: {costs[other]}, {share})"
    yield one.name
    yield from (f"  {name:<10}  {fact}" for name, fact in facts.items())
    for number, weights in enumerate(one.weights):
        where = weights.file or weights.address or f"https://huggingface.co/{weights.repository}"
        name = weights.tag if len(one.weights) > 1 else weights.backbone
        yield f"  {'' if number else 'weights':<10}  {name}: {'' if weights.file else 'not here, '}{where}"
    yield from ("", "Use it:", *(f"  {line}" for line in _commands(one)))


def _commands(one: Listed) -> Iterator[str]:
    """Yield the commands that use a backbone, and those that bring its weights by hand."""
    best = next(iter((*one.at_hand, *one.weights)), ListedWeights(f"{one.name}:FILE"))
    only = "" if one.path else " --only zero_shot,linear_probe"
    sweep = f"fastcoop sweep experiments/photographs.yaml --set datasets=photos --set backbones={best.backbone}{only}"
    yield from (f"fastcoop cache-features photos --backbone {best.backbone}", sweep)
    if best.file is None and best.repository:
        yield f"hf download {best.repository} --local-dir FOLDER  # without a network here: elsewhere; then name FOLDER"
    if best.file is None and expected_sha256(best.address):
        place = sources.OPENAI_CACHE / Path(best.address).name
        yield f"curl -L -o {place} {best.address}  # or only the weights, to this place"


def count_parameters(
    config: Mapping[str, Any], hf_config: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """Return the parameters of an open_clip config's model and of its image tower, without memory for them.

    Args:
        config: The model config.
        hf_config: The config of its Hugging Face text tower, if it has one.
    """
    with torch.device("meta"):
        model: Any = construct(config, hf_config)
    whole, image = (sum(one.numel() for one in part.parameters()) for part in (model, model.visual))
    return whole, image


def text_size(config: Mapping[str, Any], hf_config: Mapping[str, Any] | None = None) -> TextSize:
    """Return the sizes of a config's text tower; ``hf_config`` is that of a Hugging Face tower."""
    if hf_config is None:
        names = open_clip.CLIPTextCfg.__dataclass_fields__
        text = open_clip.CLIPTextCfg(**{k: v for k, v in config["text_cfg"].items() if k in names})
        hidden = int(text.width * text.mlp_ratio)
        return TextSize(text.width, text.layers, text.heads, hidden, text.context_length)

    def value(*names: str) -> int:
        return int(next(hf_config[name] for name in names if name in hf_config))

    return TextSize(
        value("hidden_size", "d_model"),
        value("num_hidden_layers", "encoder_layers", "num_layers"),
        value("num_attention_heads", "encoder_attention_heads", "num_heads"),
        value("intermediate_size", "encoder_ffn_dim", "d_ff"),
        config["text_cfg"].get("context_length", open_clip.CLIPTextCfg.context_length),
    )


@cache
def _counts() -> dict[str, tuple[int, int, TextSize]]:
    """Return the parameters, image parameters and text tower of open_clip's models, by name."""
    with COUNTS.open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == ["model", "parameters", "image_parameters", *(one.name for one in fields(TextSize))]
    numbers = {model: list(map(int, row)) for model, *row in rows}
    return {model: (row[0], row[1], TextSize(*row[2:])) for model, row in numbers.items()}


def _plain(name: str) -> str:
    return name.replace("/", "-").lower()


def _millions(number: int | None) -> str:
    return "not counted" if number is None else f"{number / 1e6:,.1f} M"


def _named() -> list[str]:
    """Return the names of embedded backbones, of models in Hugging Face's cache, and of open_clip's models."""
    embedded = [path.stem for path in sorted(EMBEDDED_WEIGHTS.glob("*.safetensors"))]
    return [*embedded, *_hub_models(), *open_clip.list_models()]


def _listed(name: str) -> Listed:
    embedded = EMBEDDED_WEIGHTS / f"{name}.safetensors"
    if embedded.is_file():
        with safe_open(embedded, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
        return _facts(name, config, (ListedWeights(name, embedded),))
    if folder := _hub_models().get(name):
        return _of_folder(folder, name)
    tags = (
        (tag, open_clip.get_pretrained_cfg(name, tag))
        for tag in open_clip.list_pretrained_tags_by_model(name)
    )
    weights = tuple(_of_tag(f"{name}:{tag}", known) for tag, known in tags)
    return _facts(name, open_clip.get_model_config(name), weights, _counts().get(name))


def _facts(
    name: str,
    config: Mapping[str, Any],
    weights: tuple[ListedWeights, ...],
    counts: tuple[int | None, int | None, TextSize | None] | None = None,
    folder: Path | None = None,
) -> Listed:
    hub_name = config["text_cfg"].get("hf_model_name")
    if counts is None:
        try:
            tower = sources.read_tower_config(hub_name, folder) if hub_name else None
            counts = *count_parameters(config, tower), text_size(config, tower)
        except Exception:  # odd settings may raise any exception; loading explains them
            counts = None, None, None
    path, reason = prompt_path_of(config)
    tokenizer = config["text_cfg"].get("hf_tokenizer_name") or CLIP_TOKENIZER
    size = config["vision_cfg"].get("image_size", 224)
    pixels = int(size[0] if isinstance(size, list | tuple) else size)
    cost = None if counts[2] is None else PromptCost.of(counts[2], masks_padding=bool(hub_name))
    features = config["embed_dim"]
    return Listed(name, *counts[:2], pixels, features, counts[2], cost, path, reason, tokenizer, weights)


def _of_folder(folder: Path, name: str) -> Listed:
    config, _, _ = sources.read_folder_config(folder)
    return _facts(name, config, (ListedWeights(name, sources.find_weights(folder)),), folder=folder)


def _of_tag(backbone: str, known: Mapping[str, Any]) -> ListedWeights:
    url, (repository, _, filename) = known.get("url", ""), str(known.get("hf_hub", "")).rpartition("/")
    downloaded = sources.OPENAI_CACHE.expanduser() / Path(url).name
    found = downloaded if url and downloaded.is_file() else None
    for path in () if found else _snapshot(repository):
        if path.suffix in sources.WEIGHT_SUFFIXES and (not filename or path.stem == Path(filename).stem):
            found = path
    return ListedWeights(backbone, found, repository, url)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _snapshot(repository: str) -> list[Path]:
    """Return the cached files of a repository of the Hugging Face hub."""
    return sorted((_hub_cache() / f"models--{repository.replace('/', '--')}").glob("snapshots/*/*"))


def _cached_models() -> dict[str, Path]:
    """Return the model folders in Hugging Face's cache, by their names."""
    return {
        HUB_PREFIX + path.parents[1].name.removeprefix("models--").replace("--", "/"): path
        for path in sorted(_hub_cache().glob("models--*/snapshots/*"))
        if sources.is_model_folder(path) and _is_readable(path)
    }


def _hub_models() -> dict[str, Path]:
    """Return those of the cached models that are not the weights of an open_clip tag."""
    folders = _cached_models()
    known = open_clip_part("pretrained")
    tags = known.list_pretrained() if folders else ()
    tagged = {str(known.get_pretrained_cfg(*tag).get("hf_hub", "")).rpartition("/")[0] for tag in tags}
    return {name: path for name, path in folders.items() if name.removeprefix(HUB_PREFIX) not in tagged}


def _is_readable(folder: Path) -> bool:
    try:
        sources.read_folder_config(folder)
    except UserError:
        return False
    return True


def _model_folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if sources.is_model_folder(path) and _is_readable(path)]
