"""CLIPs in Hugging Face's format, as transformers saves them, give the features that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from fastcoop.backbones import Backbone, backbone_from_spec, load_backbone
from fastcoop.errors import UserError
from tests.advice import follows

TEXT = {
    "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 49408,
    "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
PROMPTS = ["a photo of a cat.", "Sea Lion", "an owl, at night"]


def write_clip(
    folder: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> CLIPModel:
    """A tiny random CLIPModel, saved by transformers with the config and the preprocessing of PLIP's files."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), projection_dim=16
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    preprocessing = {
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "feature_extractor_type": "CLIPFeatureExtractor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model


def differences(backbone: Backbone, model: CLIPModel) -> tuple[float, float]:
    """The largest differences of image and of text features, relative to their size."""
    images = torch.randn(3, 3, 32, 32, dtype=backbone.dtype, generator=torch.Generator().manual_seed(1))
    ids = open_clip.tokenize(PROMPTS)
    mask = (torch.arange(77) <= ids.argmax(1, keepdim=True)).long()
    with torch.no_grad():
        output = model.to(backbone.dtype)(
            input_ids=ids.where(mask > 0, 49407), pixel_values=images, attention_mask=mask
        )
    ours = backbone.encode_images(images), backbone.encode_text(PROMPTS)
    found = [torch.nn.functional.normalize(features, dim=-1) for features in ours]
    expected = (output.image_embeds, output.text_embeds)
    first, second = ((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    return first, second


ACTIVATIONS = {"quick_gelu": True, "gelu": False, "gelu_new": False}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_folder_of_transformers_gives_its_features(tmp_path: Path, activation: str) -> None:
    changes = {"hidden_act": activation, "layer_norm_eps": 1e-3}
    model = write_clip(tmp_path / "plip", changes, changes)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        backbone = backbone_from_spec(str(tmp_path / "plip"), device="cpu", dtype=dtype)
        assert all(difference < tolerance for difference in differences(backbone, model))
    assert (backbone.name, backbone.image_size, backbone.embed_dim) == ("plip", 32, 16)
    assert backbone.quick_gelu is ACTIVATIONS[activation]
    assert backbone.preprocess.mean == (0.5, 0.4, 0.3)
    assert backbone.prompt_path.path == "shared"
    assert backbone.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)


def test_an_old_config_leaves_out_defaults_and_nests_its_parts(tmp_path: Path) -> None:
    """The end token 2 of old files means the largest token; ``text_config_dict`` comes before ``text_config``."""
    model = write_clip(tmp_path / "old", {"max_position_embeddings": 77, "layer_norm_eps": 1e-5})
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    for part in ("text_config", "vision_config"):
        config[f"{part}_dict"] = config[part] | {"hidden_act": "quick_gelu"}
        config[part] = config[part] | {"hidden_act": "gelu"}
        for name in ("max_position_embeddings", "layer_norm_eps"):
            config[f"{part}_dict"].pop(name, None)
            config[part].pop(name, None)
    config["text_config_dict"]["eos_token_id"] = 2
    path.write_text(json.dumps(config))
    assert all(
        difference < 1e-5
        for difference in differences(backbone_from_spec(str(path.parent), device="cpu"), model)
    )


def test_a_pickled_state_dict_needs_its_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLIP's weights are a pytorch_model.bin; without its config the activation is asked for."""
    model = write_clip(tmp_path / "plip")
    weights = tmp_path / "plip" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "plip" / "pytorch_model.bin")
    weights.unlink()
    folder = backbone_from_spec(str(tmp_path / "plip"), device="cpu")
    assert all(difference < 1e-5 for difference in differences(folder, model))
    file = tmp_path / "alone.bin"
    (tmp_path / "plip" / "pytorch_model.bin").rename(file)
    tiny = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "head_width": 8,
            "layers": 2,
            "mlp_ratio": 2,
        },
        "text_cfg": {"width": 24, "heads": 3, "layers": 2, "mlp_ratio": 50 / 24 + 1e-3},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", tiny)
    with pytest.raises(UserError, match="force_quick_gelu"):
        load_backbone("tiny-clip", file, device="cpu")
    loaded = backbone_from_spec(f"tiny-clip-quickgelu:{file}", device="cpu")
    assert all(difference < 1e-5 for difference in differences(loaded, model))


def test_open_clips_config_comes_before_hugging_faces(tmp_path: Path) -> None:
    """Repositories such as laion's hold a model in both formats."""
    write_clip(tmp_path / "both")
    torch.manual_seed(3)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "both" / "open_clip_model.safetensors")
    (tmp_path / "both" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    backbone = backbone_from_spec(str(tmp_path / "both"), device="cpu")
    assert torch.equal(backbone.encode_text(PROMPTS), model.encode_text(open_clip.tokenize(PROMPTS)))


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    for name, value in values.items():
        part, _, key = name.rpartition("__")
        (content[part] if part else content)[key] = value
    path.write_text(json.dumps(content))


@follows("Use the same model in open_clip's format, such as ViT-B-16-SigLIP:webli for SigLIP")
def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "m")
    change(tmp_path / "m" / "config.json", model_type="siglip")
    with pytest.raises(UserError, match=r'of type "siglip".* such as ViT-B-16-SigLIP:webli'):
        backbone_from_spec(str(tmp_path / "m"))
    assert "webli" in open_clip.pretrained.list_pretrained_tags_by_model("ViT-B-16-SigLIP")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"text_config__hidden_act": "relu"}, r"relu \(text\).* expected the same of both"),
        (
            "config.json",
            {"text_config__hidden_act": [], "vision_config__hidden_act": []},
            r"activations \[\] \(text\)",
        ),
        ("config.json", {"text_config": 3}, "text_config should hold keys and values"),
        (
            "config.json",
            {"vision_config__hidden_size": "32"},
            "Expected hidden_size in .* to be a whole number",
        ),
        ("config.json", {"projection_dim": 0}, "projection_dim in .* to be a whole number from 1"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 36}},
            r"has size \{'shortest_edge': 36\}; expected 32 or \{'shortest_edge': 32\}",
        ),
        ("preprocessor_config.json", {"resample": 0}, "has resample 0; expected 2"),
        ("preprocessor_config.json", {"resample": []}, "has resample .*; expected 2"),
        ("preprocessor_config.json", {"image_processor": "CLIP"}, "image_processor should hold keys and"),
        ("preprocessor_config.json", {"image_mean": "x"}, "expected numbers for mean and,"),
        ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 24}}, "has crop_size"),
    ],
)
def test_odd_settings_are_refused(tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    write_clip(tmp_path / "m")
    change(tmp_path / "m" / file, **values)
    with pytest.raises(UserError, match=message):
        backbone_from_spec(str(tmp_path / "m"))


def test_the_vocabulary_must_be_clips(tmp_path: Path) -> None:
    write_clip(tmp_path / "m")
    own = open_clip.SimpleTokenizer().encoder
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(own))
    assert backbone_from_spec(str(tmp_path / "m"), device="cpu").name == "m"
    for other in ({"photo</w>": 1125}, own | {"photo</w>": 3}, ["photo</w>"]):
        (tmp_path / "m" / "vocab.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="another vocabulary than CLIP's of 49408 tokens"):
            backbone_from_spec(str(tmp_path / "m"))


def test_images_may_be_squashed(tmp_path: Path) -> None:
    write_clip(tmp_path / "m")
    size = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2}
    change(tmp_path / "m" / "preprocessor_config.json", **size)
    preprocess = backbone_from_spec(str(tmp_path / "m"), device="cpu").preprocess
    assert (preprocess.resize_mode, preprocess.interpolation) == ("squash", "bilinear")
