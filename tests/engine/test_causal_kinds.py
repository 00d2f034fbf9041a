"""Causal towers of open_clip's other families, and of other vocabularies, against the model's own ``encode_text``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastcoop.backbones import Backbone, load_backbone
from fastcoop.engine import PromptEncoder
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout, initial_contexts, nearest_words
from fastcoop.prompts.layout import class_prompts
from tests.tokenizers import write_tokenizer

pytest.importorskip("transformers")
FEATURES, GRADIENTS = 1e-12, 1e-10
NAMES = ("cat", "cat fish", "sea lion", "the very old dog", "cat")
# A config of each family whose text tower is causal, and the tokenizer that stands for its own.
FAMILIES = {
    "ViT-B-32": None,
    "PE-Core-B-16": None,
    "PE-Core-bigG-14-448": None,
    "ViTamin-S": None,
    "EVA02-B-16": None,
    "convnext_base": None,
    "MobileCLIP-B": None,
    "ViT-H-14-worldwide": "xlm-v",
    "ViT-L-14-worldwide": "mt5",
    "ViT-L-14-worldwide-quickgelu": "mt5",
}


def write_model(folder: Path, text: dict[str, Any], tokenizer: str | None = None, **top: Any) -> Path:
    """A folder of a model with this text tower, random weights that make tokens differ, and a tokenizer."""
    folder.mkdir()
    text = {"width": 32, "heads": 4, "layers": 2, "vocab_size": 49408} | text
    if tokenizer is not None:
        text |= {"hf_tokenizer_name": "in/this-folder", "vocab_size": write_tokenizer(folder, tokenizer) + 3}
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **top}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    custom = config.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    tower = model.text if custom else model
    torch.nn.init.normal_(tower.token_embedding.weight, std=0.5)
    torch.nn.init.normal_(tower.positional_embedding, std=0.3)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def write_family(folder: Path, name: str) -> Path:
    """The text tower of one of open_clip's models, small."""
    config = open_clip.get_model_config(name)
    top = {key: config[key] for key in ("custom_text", "quick_gelu") if key in config}
    return write_model(
        folder, config["text_cfg"] | {"width": 32, "heads": 4, "layers": 2}, FAMILIES[name], **top
    )


def loaded(folder: Path) -> Backbone:
    return load_backbone(folder.name, folder, dtype=torch.float64)


def own_features(backbone: Backbone, texts: list[str], vectors: torch.Tensor) -> torch.Tensor:
    """The model's own encode_text of texts whose words "photo" and "this" have the embeddings ``vectors``."""
    nothing, *words = backbone.tokenize(["", "photo", "this"]).tolist()
    ids = [set(word) - set(nothing) for word in words]
    assert [len(one) for one in ids] == [1, 1]

    def replace(module: Any, tokens: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        for (token,), vector in zip(ids, vectors, strict=True):
            embedded = torch.where((tokens[0] == token)[..., None], vector, embedded)
        return embedded

    tower = getattr(backbone.model, "text", backbone.model)
    hook = tower.token_embedding.register_forward_hook(replace)
    try:
        return backbone.model.encode_text(backbone.tokenize(texts))
    finally:
        hook.remove()


def compare(backbone: Backbone) -> None:
    """Class features and context gradients of every class position, against the model's own code."""
    generator = torch.Generator().manual_seed(1)
    texts = {"end": "photo this {}.", "mid": "photo {} this.", "front": "{} photo this."}
    for position, text in texts.items():
        encoder = PromptEncoder(backbone, NAMES, PromptLayout(2, position))
        first = 0.3 * torch.randn(2, backbone.text.width, generator=generator, dtype=torch.float64)
        up = torch.randn(len(NAMES), 24, generator=generator, dtype=torch.float64)
        ours, theirs = first.clone().requires_grad_(), first.clone().requires_grad_()
        features = encoder(ours)
        expected = own_features(backbone, [text.format(name) for name in NAMES], theirs)
        features.backward(up)
        expected.backward(up)
        assert (features - expected).norm() < FEATURES * expected.norm()
        assert (ours.grad - theirs.grad).norm() < GRADIENTS * theirs.grad.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_causal_family_gives_what_its_model_gives(tmp_path: Path, name: str) -> None:
    compare(loaded(write_family(tmp_path / "model", name)))


ENDS = {
    "an end token in the middle of the vocabulary": ("xlm-v", 2),
    "no start token": ("mt5", 1),
    "padded with its end token": ("clip", 2),
}


@pytest.mark.parametrize("kind", ENDS)
def test_the_end_token_is_found_by_its_id(tmp_path: Path, kind: str) -> None:
    tokenizer, end = ENDS[kind]
    backbone = loaded(write_model(tmp_path / "model", {"pool_type": "eos", "eos_id": end}, tokenizer))
    compare(backbone)
    words = initial_contexts(backbone, PromptLayout(2), 1, 0, "a photo")
    assert nearest_words(backbone, words).words == [["a"], ["photo"]]


@pytest.mark.parametrize("tokenizer", ["xlm-v", "mt5"])
def test_a_tower_read_at_the_largest_id_refuses_a_tokenizer_whose_end_is_smaller(
    tmp_path: Path, tokenizer: str
) -> None:
    backbone = loaded(write_model(tmp_path / "model", {}, tokenizer))
    with pytest.raises(UserError, match="choose a tokenizer that belongs to the tower"):
        PromptEncoder(backbone, NAMES, PromptLayout(2))


def test_a_name_that_does_not_fit_32_positions_is_refused_with_its_count(tmp_path: Path) -> None:
    """With 16 vectors, a start and an end, PE-Core leaves 14 tokens for the name and the full stop."""
    backbone = loaded(write_family(tmp_path / "model", "PE-Core-B-16"))
    names = ("cat", " ".join(["cat"] * 13), " ".join(["dog"] * 14))
    prompts = class_prompts(backbone.tokenizer, names[:2], PromptLayout(16), backbone.text.context_length)
    assert [len(prompt) for prompt in prompts] == [20, 32]
    PromptEncoder(backbone, names[:2], PromptLayout(16))
    for position in ("end", "mid", "front"):
        with pytest.raises(UserError, match=r'class "dog dog .* has 33 tokens .* reads at most 32; shorten'):
            PromptEncoder(backbone, names, PromptLayout(16, position))
