"""Every kind of text tower that open_clip builds, from a model folder: right to the model's own, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.engine import PromptEncoder
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.advice import follows
from tests.reference import tiny_model

NAMES = ("cat", "sea lion", "a very old dog")


def write_model(folder: Path, custom: bool = False, top: dict[str, Any] | None = None, **text: Any) -> Path:
    """A model folder whose config is a tiny CLIP's with other options; weights are as open_clip builds them."""
    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2} | text,
        **(top or {}),
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps(config | ({"custom_text": True} if custom else {}))
    )
    built = {name: value for name, value in text.items() if name != "output_tokens"}
    kind = "CustomTextCLIP" if custom else "CLIP"
    try:
        model = tiny_model(dtype=torch.float32, kind=kind, **({"layers": 2} | built))
    except (
        AttributeError,
        IndexError,
    ):  # layer norms without weights, no layers: refused whatever the weights
        model = torch.nn.Linear(1, 1)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def encoded(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the same prompts: with the engine, their words as context vectors; by open_clip alone."""
    words = backbone.text.token_embedding[backbone.tokenizer.encode("a photo")].detach().expand(1, 2, -1)
    ours = PromptEncoder(backbone, NAMES, PromptLayout(2, "end"))(words.clone())[0]
    with torch.no_grad():
        theirs = backbone.model.encode_text(backbone.tokenizer([f"a photo {name}." for name in NAMES]))
    unit = torch.nn.functional.normalize
    return unit(ours.detach(), dim=-1), unit(theirs[0] if isinstance(theirs, tuple) else theirs, dim=-1)


USED = {
    "as CLIP's": {},
    "read at a named token": {"pool_type": "eos", "eos_id": 49407},
    "read at the largest token": {"pool_type": "argmax", "eos_id": 5},
    "tokens put out": {"output_tokens": True},
    "a pad token": {"pad_id": 7},
    "no projection": {"proj_type": "none", "width": 24},
    "a projection with bias": {"proj_bias": True},
    "LayerScale": {"ls_init_value": 0.5},
    "another eps": {"norm_kwargs": {"eps": 0.1}},
    "tanh GELU": {"act_kwargs": {"approximate": "tanh"}},
    "QuickGELU": {"top": {"quick_gelu": True}},
    "a logit bias": {"top": {"init_logit_bias": 0.0}},
    "a logit scale of one dimension": {"top": {"nonscalar_logit_scale": True}},
    "32 positions": {"context_length": 32},
    "more rows than tokens": {"vocab_size": 49500},
    "a final norm flag that open_clip does not read": {"final_ln_after_pool": True},
    "a plain block by name": {"block_type": "default"},
}


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("kind", USED)
def test_towers_that_load_are_right(tmp_path: Path, kind: str, custom: bool) -> None:
    options = dict(USED[kind])
    top = options.pop("top", {})
    folder = write_model(tmp_path / "tiny", custom, top, **options)
    if top:
        config = json.loads((folder / "open_clip_config.json").read_text())
        config.pop("custom_text", None)
        torch.manual_seed(0)
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    backbone = backbone_from_spec(str(folder))
    ours, theirs = encoded(backbone)
    assert (ours - theirs).abs().max() < 1e-6
    texts = [f"a photo {name}." for name in NAMES]
    plain = torch.nn.functional.normalize(backbone.encode_text(texts), dim=-1)
    assert torch.equal(plain, theirs)
    assert backbone.encode_images(torch.zeros(2, 3, 32, 32)).shape == (2, 24)


PLAIN = {
    "first": ({"pool_type": "first"}, 'read at "first"'),
    "last": ({"pool_type": "last"}, 'read at "last"'),
    "both ways": ({"no_causal_mask": True}, "not causal"),
    "a class token": ({"embed_cls": True}, "appended class token"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_towers_that_share_nothing_load(tmp_path: Path, kind: str) -> None:
    options, reason = PLAIN[kind]
    backbone = backbone_from_spec(str(write_model(tmp_path / "tiny", True, **options)))
    path = backbone.prompt_path
    assert path.path == "plain"
    assert reason in path.reason
    assert backbone.encode_text(["a photo of a cat."]).shape == (1, 24)


REFUSED = {
    "another end token": ({"pool_type": "eos", "eos_id": 2}, r"at token 2 .* never makes; .* eos_id"),
    "open_clip's default end token": ({"pool_type": "eos"}, "at token 2"),
    "a padding mask": ({"use_pad_mask": True}, "cannot be built"),
    "a corrected class mask": ({"correct_cls_mask": True}, "cannot be built"),
    "no layers": ({"layers": 0}, "cannot be built|no layers"),
    "no projection, other sizes": ({"proj_type": "none"}, "32 numbers and image features of 24"),
    "too few tokens": ({"vocab_size": 100}, r"makes the token 49407, but the text tower has 100"),
    "heads that do not divide": ({"heads": 5}, "cannot be built"),
    "no heads": ({"heads": 0}, "cannot be built"),
}


PREPROCESSING: list[Any] = [
    *(
        {"mean": "x"},
        {"mean": [1, 2]},
        {"mean": [[0, 0, 0]]},
        {"mean": {"r": 0}},
        {"std": 0},
        {"mean": [1e999, 0, 0]},
    ),
    *({"interpolation": "nearest9"}, {"interpolation": []}, {"fill_color": "a"}, {"fill_color": 300}),
]


@follows("for interpolation, and 0 to 255 for fill_color. Correct it.")
@pytest.mark.parametrize("settings", PREPROCESSING, ids=str)
def test_odd_preprocessing_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    file = write_model(tmp_path / "tiny") / "open_clip_config.json"
    model = json.loads(file.read_text())
    file.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": settings}))
    with pytest.raises(UserError, match=r"open_clip_config.json has the image preprocessing .* Correct it"):
        backbone_from_spec(str(tmp_path / "tiny"))
    file.write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": 0, "interpolation": "random"}})
    )
    assert backbone_from_spec(str(tmp_path / "tiny")).preprocess.mean == (0, 0, 0)


ODD = {
    "no keys of preprocessing": ({}, {"preprocess_cfg": [1]}, "preprocess_cfg should hold keys and values"),
    "a word for yes": ({"quick_gelu": "no"}, {}, "quick_gelu should be true or false, got 'no'"),
    "no settings of a tokenizer": (
        {"text_cfg__tokenizer_kwargs": {"cleaner": 1}},
        {},
        "CLIP's tokenizer has no",
    ),
    "no keys of a tokenizer": ({"text_cfg__tokenizer_kwargs": [1]}, {}, "CLIP's tokenizer has no"),
    "no positions": ({"text_cfg__context_length": 0}, {}, "do not fit the model: Input and output sizes"),
    "no pixels": ({"vision_cfg__image_size": 0}, {}, "do not fit the model: Input and output sizes"),
}


@follows("has no settings such as tokenizer_kwargs {}: {}; correct the model config")
@pytest.mark.parametrize("kind", ODD)
def test_odd_configs_are_refused(tmp_path: Path, kind: str) -> None:
    values, beside, message = ODD[kind]
    file = write_model(tmp_path / "tiny") / "open_clip_config.json"
    model = json.loads(file.read_text())
    for name, value in values.items():
        part, _, key = name.rpartition("__")
        (model[part] if part else model)[key] = value
    file.write_text(json.dumps({"model_cfg": model} | beside))
    with pytest.raises(UserError, match=message):
        backbone_from_spec(str(tmp_path / "tiny"))
    write_model(tmp_path / "as it should be")
    assert backbone_from_spec(str(tmp_path / "as it should be")).name == "as it should be"


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("kind", REFUSED)
def test_towers_that_cannot_be_read_are_refused(tmp_path: Path, kind: str, custom: bool) -> None:
    options, message = REFUSED[kind]
    try:
        folder = write_model(tmp_path / "tiny", custom, **options)
    except (TypeError, AssertionError, ArithmeticError, ValueError):  # open_clip builds no such model
        folder = tmp_path / "tiny"
        save_file({"weights": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=message):
        backbone_from_spec(str(folder))


def test_what_changes_features_without_changing_weights_is_another_backbone(tmp_path: Path) -> None:
    """The digest stays as it was for every config that says nothing unusual."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "eps": {"norm_kwargs": {"eps": 0.1}},
        "tanh": {"act_kwargs": {"approximate": "tanh"}},
        "end": {"pool_type": "eos", "eos_id": 49407},
        "words": {"tokenizer_kwargs": {"clean": "whitespace"}},
        "heads": {"heads": 2},
        "said": {"pool_type": "argmax", "norm_kwargs": None},
    }
    digests = {
        name: backbone_from_spec(str(write_model(tmp_path / name, **text))).digest
        for name, text in variants.items()
    }
    assert digests["plain"] == digests.pop("said")
    assert len(set(digests.values())) == len(digests)
