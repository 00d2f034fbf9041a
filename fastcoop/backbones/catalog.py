"""The backbones on this machine and those that open_clip knows: facts from their configs, without reading weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from fastcoop.backbones import sources
from fastcoop.backbones.late import open_clip, open_clip_part
from fastcoop.backbones.load import EMBEDDED_WEIGHTS, construct, is_model_path
from fastcoop.backbones.sources import HUB_PREFIX
from fastcoop.backbones.text_tower import NOT_OPEN_CLIPS, prompt_path, text_tower
from fastcoop.backbones.tokenizer import DEFAULT_LENGTH
from fastcoop.backbones.weights import expected_sha256
from fastcoop.errors import UserError, unknown

# Facts of open_clip's models, written by tools/count_backbones.py.
MODELS = Path(__file__).with_name("models.csv")
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
    """Weights of a backbone."""

    backbone: str  # what names the backbone with them, such as "ViT-B-32:openai"
    file: Path | None = None  # if it is on this machine
    repository: str = ""  # on the Hugging Face hub, with the weights, config and tokenizer
    address: str = ""  # of the single file

    @property
    def tag(self) -> str:
        """The part after open_clip's model, or ""."""
        return "" if self.backbone.startswith(HUB_PREFIX) else self.backbone.partition(":")[2]


@dataclass(frozen=True)
class Listed:
    """A backbone in the list. All but its name and weights is None where its model cannot be built."""

    name: str  # of open_clip's model, an embedded backbone, a folder, or "hf-hub:ORGANIZATION/NAME"
    weights: tuple[ListedWeights, ...]  # known weights
    parameters: int | None = None  # of the whole model
    image_parameters: int | None = None  # of the image tower
    image_size: int | None = None  # pixels
    features: int | None = None  # size of an image or text feature
    text: TextSize | None = None
    cost: PromptCost | None = None  # of learning prompts
    path: str | None = None  # how prompts are learned, as in `PromptPath`
    reason: str = ""  # why not "shared"; "" for shared
    tokenizer: str | None = None  # "CLIP's own", or a name on the Hugging Face hub

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
    inside = sorted(Path(text).expanduser().glob("*")) if text else []
    if models := list(filter(_is_readable, inside)):
        return [_of_folder(path, str(path)) for path in models]
    known = _known()
    found = [look for name, look in known.items() if text is None or _plain(text) in _plain(name)]
    if not found:
        raise unknown("backbone", text, known)
    return sorted((look() for look in found), key=lambda one: not one.at_hand)


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
    known = {_plain(one): look for one, look in _known().items()}
    model, _, tag = name.partition(":")
    look = known.get(_plain(model)) or known.get(_plain(model).removesuffix("-gelu"))
    if look is None:
        return None
    one = look()
    if not tag:
        return one
    chosen = tuple(weights for weights in one.weights if weights.tag == tag)
    if (file := Path(tag).expanduser()).is_file():
        chosen = (ListedWeights(name, file),)
    if not chosen:
        raise unknown(f"file or tag of {one.name}", tag, (weights.tag for weights in one.weights))
    return replace(one, weights=chosen)


def weights_at_hand() -> list[ListedWeights]:
    """Return the weights on this machine: embedded ones, models in Hugging Face's cache, and open_clip's tags."""
    embedded = [ListedWeights(path.stem, path) for path in _embedded()]
    cached = [ListedWeights(name, sources.find_weights(folder)) for name, folder in _hub_models().items()]
    pretrained = open_clip_part("pretrained")  # all of open_clip takes seconds
    tags = [_of_tag(*tag) for tag in pretrained.list_pretrained()]
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
        numbers = _millions(one.parameters), str(one.image_size or "?"), str(one.features or "?")
        path = str(one.path) if text else "?"
        rows.append((one.name, *numbers, size, path, weights))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, "<>>><<<", strict=True)
        yield "  ".join(f"{cell:{align}{width}}" for cell, width, align in cells).rstrip()


def page_lines(one: Listed) -> Iterator[str]:
    """Yield all facts of a backbone as lines of text, and the commands to use it."""
    path = f"{one.path} path" if one.path else "not learned" if one.text else "not known"
    facts = {"prompts": path + (one.reason and f": {one.reason}")}
    if (text := one.text) is not None and one.cost is not None:
        room, cost = text.tokens - VECTORS - 2, one.cost
        sizes = f"width {text.width}, {text.layers} layers, {text.heads} heads, {text.tokens} tokens"
        if room < text.tokens // 2:
            sizes += f"; {VECTORS} vectors leave {max(room, 0)} for a class name and full stop"
        shared = f"{cost.shared_positions:,} positions, {cost.shared_flops:.2g} operations"
        plain = f"{cost.plain_positions:,} positions, {cost.plain_flops:.2g} operations"
        ratio = cost.plain_flops / cost.shared_flops
        both = f"{shared} (plain path: {plain}, {ratio:.0f} times as many)"
        if one.path == "plain":
            both = f"{plain} (shared path: {shared}, 1/{ratio:.0f})"
        facts = {
            "parameters": f"{_millions(one.parameters)}, {_millions(one.image_parameters)} of them for images",
            "images": f"{one.image_size} x {one.image_size} pixels, features of {one.features} numbers",
            "text tower": sizes, "tokenizer": str(one.tokenizer), **facts,
            "a step": f"{CLASSES} classes, M = {cost.vectors}: {both}",
        }  # fmt: skip
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
    only = "" if one.path or one.text is None else " --only zero_shot,linear_probe"
    sweep = f"fastcoop sweep experiments/photographs.yaml --set datasets=photos --set backbones={best.backbone}{only}"
    yield from (f"fastcoop cache-features photos --backbone {best.backbone}", sweep)
    if best.file is None and best.repository:
        yield f"hf download {best.repository} --local-dir FOLDER  # without a network here: elsewhere; then name FOLDER"
    if best.file is None and expected_sha256(best.address):
        place = sources.OPENAI_CACHE / Path(best.address).name
        yield f"curl -L -o {place} {best.address}  # or only the weights, to this place"


def describe(config: Mapping[str, Any], hf_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the facts of an open_clip config's model, as ``models.csv`` has them, without memory for weights.

    ``hf_config`` is the config of its Hugging Face text tower, if it has one.
    """
    with torch.device("meta"):
        model: Any = construct(config, hf_config)
    whole, image = (sum(one.numel() for one in part.parameters()) for part in (model, model.visual))
    length = config["text_cfg"].get("context_length", DEFAULT_LENGTH)
    text, (path, reason) = text_tower(model, length), prompt_path(model)
    modules = (model.text if hasattr(model, "text") else model.transformer).modules()
    blocks = next(one for one in modules if isinstance(one, nn.ModuleList))
    hidden = max(layer.out_features for layer in blocks[-1].modules() if isinstance(layer, nn.Linear))
    return {
        "parameters": whole, "image_parameters": image, "image_size": int(np.max(model.visual.image_size)),
        "features": config["embed_dim"], "width": text.width, "layers": text.layers, "heads": text.heads,
        "hidden": hidden, "tokens": text.context_length, "path": path, "reason": reason,
        "tokenizer": config["text_cfg"].get("hf_tokenizer_name") or CLIP_TOKENIZER,
    }  # fmt: skip


@cache
def _table() -> dict[str, dict[str, Any]]:
    """Return the facts of open_clip's models by name."""
    with MODELS.open(encoding="utf-8", newline="") as file:
        rows = {row.pop("model"): row for row in csv.DictReader(file)}
    return {
        name: {key: int(one) if one.isdecimal() else one for key, one in row.items()}
        for name, row in rows.items()
    }


def _plain(name: str) -> str:
    return name.replace("/", "-").lower()


def _millions(number: int | None) -> str:
    return "not counted" if number is None else f"{number / 1e6:,.1f} M"


def _known() -> dict[str, Callable[[], Listed]]:
    """Return what lists each embedded backbone, model in Hugging Face's cache and model of open_clip, by its name."""
    embedded = {path.stem: partial(_of_embedded, path) for path in _embedded()}
    cached = {name: partial(_of_folder, folder, name) for name, folder in _hub_models().items()}
    return {**embedded, **cached, **{name: partial(_of_open_clip, name) for name in open_clip.list_models()}}


def _embedded() -> list[Path]:
    return sorted(EMBEDDED_WEIGHTS.glob("*.safetensors"))


def _of_embedded(path: Path) -> Listed:
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {})["config"])
    return _of_config(path.stem, config, [ListedWeights(path.stem, path)])


def _of_open_clip(name: str) -> Listed:
    weights = [_of_tag(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    if name in _table():
        return _of_facts(name, _table()[name], weights)
    return _of_config(name, open_clip.get_model_config(name), weights)


def _of_folder(folder: Path, name: str) -> Listed:
    config, _, _ = sources.read_folder_config(folder)
    return _of_config(name, config, [ListedWeights(name, sources.find_weights(folder))], folder)


def _of_config(
    name: str, config: Mapping[str, Any], weights: list[ListedWeights], folder: Path | None = None
) -> Listed:
    hub_name = config["text_cfg"].get("hf_model_name")
    try:
        facts = describe(config, sources.read_tower_config(hub_name, folder) if hub_name else None)
    except Exception as error:  # odd settings may raise any exception
        return Listed(name, tuple(weights), reason=str(error))
    return _of_facts(name, facts, weights)


def _of_facts(name: str, facts: Mapping[str, Any], weights: list[ListedWeights]) -> Listed:
    sizes = [one.name for one in fields(TextSize)]
    text = TextSize(*(facts[size] for size in sizes))
    cost = PromptCost.of(text, masks_padding=facts["reason"] == NOT_OPEN_CLIPS)
    others = {key: fact for key, fact in facts.items() if key not in sizes}
    return Listed(name, tuple(weights), text=text, cost=cost, **others)


def _of_tag(model: str, tag: str) -> ListedWeights:
    known = open_clip_part("pretrained").get_pretrained_cfg(model, tag)
    url, (repository, _, filename) = known.get("url", ""), str(known.get("hf_hub", "")).rpartition("/")
    downloaded = sources.OPENAI_CACHE.expanduser() / Path(url).name
    found = downloaded if url and downloaded.is_file() else None
    for path in () if found else (file for at in _snapshots(repository) for file in sorted(at.iterdir())):
        if path.suffix in sources.WEIGHT_SUFFIXES and (not filename or path.stem == Path(filename).stem):
            found = path
    return ListedWeights(f"{model}:{tag}", found, repository, url)


def _snapshots(repository: str = "*") -> list[Path]:
    """Return the folders of a repository, by default of all, in Hugging Face's cache."""
    from huggingface_hub import constants

    return sorted(Path(constants.HF_HUB_CACHE).glob(f"models--{repository.replace('/', '--')}/snapshots/*"))


def _cached_models() -> dict[str, Path]:
    """Return the model folders in Hugging Face's cache, by their names."""
    folders = {
        path.parents[1].name.removeprefix("models--"): path for path in filter(_is_readable, _snapshots())
    }
    return {HUB_PREFIX + name.replace("--", "/"): path for name, path in folders.items()}


def _hub_models() -> dict[str, Path]:
    """Return those of the cached models that are not the weights of an open_clip tag."""
    folders, pretrained = _cached_models(), open_clip_part("pretrained")
    known = (pretrained.get_pretrained_cfg(*tag) for tag in pretrained.list_pretrained() if folders)
    tagged = {HUB_PREFIX + str(one.get("hf_hub", "")).rpartition("/")[0] for one in known}
    return {name: path for name, path in folders.items() if name not in tagged}


def _is_readable(folder: Path) -> bool:
    """Return whether a folder holds a model whose config can be read."""
    with suppress(UserError):
        return sources.is_model_folder(folder) and bool(sources.read_folder_config(folder))
    return False
