"""Models of the hub, and towers and tokenizers of Hugging Face: from folders and caches, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from fastcoop.backbones import backbone_from_spec, load_backbone
from fastcoop.errors import UserError
from tests.advice import follows
from tests.backbones.small_models import (
    WIDTH,
    cut_models,
    hub_folder,
    small_config,
    write_hub,
    write_tower,
)
from tests.tokenizers import write_tokenizer

BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
VISION = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
PREPROCESS = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "resize_mode": "squash",
    "interpolation": "bilinear",
}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def write_biomed(folder: Path, **text: Any) -> open_clip.CustomTextCLIP:
    """A model folder of BiomedCLIP's structure: a BERT of 256 tokens read at its first, and its tokenizer."""
    size = write_tokenizer(folder, "bert")
    write_tower(folder, "bert", size)
    text_cfg = {
        "hf_model_name": BERT, "hf_tokenizer_name": BERT, "hf_proj_type": "mlp", "context_length": 256,
        "hf_pooler_type": "cls_last_hidden_state_pooler", **text,
    }  # fmt: skip
    config = {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": text_cfg}
    torch.manual_seed(4)
    local = {"hf_model_name": str(folder), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(**config | {"text_cfg": text_cfg | local}).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    state = model.state_dict()
    state["text.transformer.embeddings.position_ids"] = torch.arange(256)[None]  # as in BiomedCLIP's file
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    facts = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    return model


def theirs(folder: Path, model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """Features by open_clip's own code."""
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=256)
    with torch.no_grad():
        features: torch.Tensor = model.encode_text(tokenizer(texts))
    return features


def test_a_bert_tower_gives_open_clips_features(tmp_path: Path) -> None:
    model = write_biomed(tmp_path / "biomed")
    backbone = backbone_from_spec(str(tmp_path / "biomed"), device="cpu")
    texts = ["a chest X-ray.", "Histology of a lymph node"]
    assert torch.equal(backbone.encode_text(texts), theirs(tmp_path / "biomed", model, texts))
    assert (backbone.text.context_length, backbone.preprocess.resize_mode) == (256, "squash")
    assert backbone.prompt_path.path == "plain"


@follows('Run "hf download {} --local-dir FOLDER" where there is a network, then name FOLDER as the backbone')
def test_a_model_of_the_hub_comes_from_the_cache(tmp_path: Path, hub: Path) -> None:
    name = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
    with pytest.raises(UserError, match=f'Run "hf download {name} --local-dir FOLDER"'):
        backbone_from_spec(f"hf-hub:{name}")
    model = write_biomed(hub_folder(hub, name))
    backbone = backbone_from_spec(f"hf-hub:{name}", device="cpu")
    assert backbone.name == name.replace("/", "-")
    assert torch.equal(backbone.encode_text(["an eye"]), theirs(hub_folder(hub, name), model, ["an eye"]))
    assert load_backbone(f"hf-hub:{name}", device="cpu").digest == backbone.digest
    shutil.copytree(hub_folder(hub, name), tmp_path / "FOLDER")
    assert backbone_from_spec(str(tmp_path / "FOLDER"), device="cpu").digest == backbone.digest


@follows('"{}" has its own weights; leave out pretrained, or name the model without "{}"')
def test_a_model_of_the_hub_has_its_weights(hub: Path) -> None:
    write_biomed(hub_folder(hub, "a/b"))
    with pytest.raises(UserError, match="leave out pretrained"):
        load_backbone("hf-hub:a/b", "openai")
    load_backbone("hf-hub:a/b", device="cpu")


@follows("where there is a network, then move its files next to the model's weights")
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "--include 'config.json'"),
        ("tokenizer.json", r"--include '\*\.json' --include '\*\.txt'"),
    ],
)
def test_files_of_the_text_tower_that_are_missing(
    tmp_path: Path, hub: Path, missing: str, message: str
) -> None:
    folder = tmp_path / "biomed"
    write_biomed(folder)
    digest = backbone_from_spec(str(folder), device="cpu").digest
    (folder / missing).rename(tmp_path / missing)
    with pytest.raises(UserError, match=f"{BERT}.* not on this machine .*hf download {BERT} {message}"):
        backbone_from_spec(str(folder), device="cpu")
    shutil.copy(tmp_path / missing, hub_folder(hub, BERT))  # the cache has what the folder lacks
    if missing == "tokenizer.json":
        shutil.copy(folder / "tokenizer_config.json", hub_folder(hub, BERT))
    assert backbone_from_spec(str(folder), device="cpu").digest == digest
    (tmp_path / missing).rename(folder / missing)
    assert backbone_from_spec(str(folder), device="cpu").digest == digest


def test_whatever_changes_features_is_another_backbone(tmp_path: Path) -> None:
    digests = []
    for number, change in enumerate(
        ({}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {"pad_token_id": 3}, {"dtype": "float16"})
    ):
        folder = tmp_path / str(number)
        write_biomed(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        digests.append(backbone_from_spec(str(folder), device="cpu").digest)
    assert digests[0] == digests.pop()  # only the dtype of stored weights
    for text in ({"hf_pooler_type": "mean_pooler"}, {"tokenizer_kwargs": {"clean": "canonicalize"}}):
        write_biomed(tmp_path / str(text), **text)
        digests.append(backbone_from_spec(str(tmp_path / str(text)), device="cpu").digest)
    write_biomed(tmp_path / "words")
    tokenizer = tmp_path / "words" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"fish"', '"fishes"'))
    digests.append(backbone_from_spec(str(tmp_path / "words"), device="cpu").digest)
    assert len(set(digests)) == len(digests) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, 'of type "gpt2"; open_clip builds the types'),
        ({"model_type": ["bert"]}, "open_clip builds the types"),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, 'of type "evil"'),
        ({"num_attention_heads": 3}, "cannot be built"),
        ({"vocab_size": 5}, "do not fit|makes the token"),
    ],
)
def test_odd_configs_of_a_text_tower_are_refused(
    tmp_path: Path, hub: Path, change: dict[str, Any], message: str
) -> None:
    write_biomed(tmp_path / "biomed")
    path = tmp_path / "biomed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    shutil.copy(path, hub_folder(hub, BERT))
    with pytest.raises(UserError, match=message):
        backbone_from_spec(str(tmp_path / "biomed"), device="cpu")


@follows('needs the package transformers; install it (pip install "fastcoop[hf]")')
def test_a_tower_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_biomed(tmp_path / "biomed")
    backbone_from_spec(str(tmp_path / "biomed"), device="cpu")
    monkeypatch.setattr(open_clip.hf_model, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers; install it \(pip install"):
        backbone_from_spec(str(tmp_path / "biomed"), device="cpu")


CLASS_TOKEN = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "</s>"}
KINDS = {  # the family, changes of tokenizer_config.json and of text_cfg, and the special tokens of a text
    "padded behind": ("bert", {}, {}, 2),
    "padded before": ("mt5", {"padding_side": "left"}, {}, 1),
    "padded with the end token": ("siglip", {}, {}, 1),
    "without an end token": ("mt5", {}, {}, 0),
    "with a class token": ("xlm-v", CLASS_TOKEN, {"tokenizer_mode": "clips"}, 3),
    "without separators": ("bert", {}, {"tokenizer_kwargs": {"strip_sep_token": True}}, 2),
    "cleaned": ("mt5", {}, {"tokenizer_kwargs": {"clean": "canonicalize"}}, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_do_not_fit_are_refused_with_every_tokenizer(tmp_path: Path, kind: str) -> None:
    family, facts, text, special = KINDS[kind]
    folder = tmp_path / "tiny"
    size = write_tokenizer(folder, family)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    if not special:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    config = {
        "embed_dim": WIDTH, "vision_cfg": VISION,
        "text_cfg": {
            "width": WIDTH, "heads": 2, "layers": 1, "vocab_size": size, "context_length": 24,
            "hf_tokenizer_name": "x", "no_causal_mask": True, "pool_type": "last", **text,
        },
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    backbone = backbone_from_spec(str(folder), device="cpu")
    fits, cut = " ".join(["cat"] * (24 - special)), " ".join(["dog"] * (25 - special))
    if kind == "cleaned":
        fits, cut = f"{fits.upper()}?!", f"{cut}..."
    assert [backbone.count_tokens(one) for one in ("", fits, cut)] == [special, 24, 25]
    assert backbone.encode_text([fits, "a"]).shape == (2, WIDTH)
    with pytest.raises(UserError, match='The text "dog dog'):
        backbone.encode_text([fits, cut])


def test_a_checkpoint_of_a_sigmoid_model_keeps_scale_bias_and_preprocessing(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of SigLIP gets the preprocessing of its only tag, and needs no word on its activation."""
    write_hub(hub)
    cut_models(monkeypatch, hub)
    made = load_backbone("ViT-B-16-SigLIP", seed=3, device="cpu")
    assert made.logit_bias == -10
    state = made.model.state_dict()
    state["logit_scale"], state["logit_bias"] = torch.tensor([4.7]), torch.tensor([-12.5])
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_3.pt"
    )
    backbone = backbone_from_spec(f"ViT-B-16-SigLIP:{tmp_path / 'epoch_3.pt'}", device="cpu")
    assert (backbone.logit_bias, backbone.quick_gelu) == (-12.5, False)
    assert backbone.logit_scale == pytest.approx(np.exp(4.7), rel=1e-6)
    assert backbone.preprocess.resize_mode == "squash"
    assert backbone.preprocess.mean == backbone.preprocess.std == (0.5, 0.5, 0.5)
    assert torch.equal(
        backbone.encode_text(["A Cat!"]), made.encode_text(["a cat"])
    )  # cleaned as in training
    del state["logit_bias"]
    torch.save(state, tmp_path / "no_bias.pt")
    assert load_backbone("ViT-B-16-SigLIP", tmp_path / "no_bias.pt", device="cpu").logit_bias == 0
    assert load_backbone("RN50", seed=1, device="cpu", force_quick_gelu=True).logit_bias is None


def big_vision(model: Any) -> dict[str, np.ndarray]:
    """Names and shapes of big_vision's files of SigLIP: kernels are (in, out), attention's (in, heads, size)."""
    out: dict[str, np.ndarray] = {}

    def put(name: str, layer: Any) -> None:
        weight = layer.weight.detach().numpy()
        key = "scale" if weight.ndim == 1 else "kernel"
        out[f"{name}/{key}"] = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        out[f"{name}/bias"] = layer.bias.detach().numpy()

    def attention(
        name: str, weight: torch.Tensor, bias: torch.Tensor, output: Any, names: tuple[str, ...]
    ) -> None:
        for part, rows, own in zip(names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True):
            out[f"{name}/{part}/kernel"] = rows.detach().numpy().T.reshape(WIDTH, 2, -1)
            out[f"{name}/{part}/bias"] = own.detach().numpy().reshape(2, -1)
        put(f"{name}/out", output)
        out[f"{name}/out/kernel"] = out[f"{name}/out/kernel"].reshape(2, -1, WIDTH)

    trunk, text = model.visual.trunk, model.text
    for name, tower, first in (("img", trunk, trunk.blocks[0]), ("txt", text, text.transformer.resblocks[0])):
        is_image = name == "img"
        encoder = "img/Transformer" if is_image else "txt/Encoder_0"
        block, qkv = f"{encoder}/encoderblock_0", ("query", "key", "value")
        attn, where = first.attn, f"{block}/MultiHeadDotProductAttention_0"
        if is_image:
            attention(where, attn.qkv.weight, attn.qkv.bias, attn.proj, qkv)
        else:
            attention(where, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj, qkv)
        layers = (first.mlp.fc1, first.mlp.fc2) if is_image else (first.mlp.c_fc, first.mlp.c_proj)
        norms = (first.norm1, first.norm2) if is_image else (first.ln_1, first.ln_2)
        for number in (0, 1):
            put(f"{block}/LayerNorm_{number}", norms[number])
            put(f"{block}/MlpBlock_0/Dense_{number}", layers[number])
        put(f"{encoder}/encoder_norm", tower.norm if is_image else tower.ln_final)
    put("img/embedding", trunk.patch_embed.proj)
    out["img/pos_embedding"] = trunk.pos_embed.detach().numpy()
    head, pool = "img/MAPHead_0", trunk.attn_pool
    out[f"{head}/probe"] = pool.latent.detach().numpy()
    where = f"{head}/MultiHeadDotProductAttention_0"
    attention(where, pool.kv.weight, pool.kv.bias, pool.proj, ("key", "value"))
    attention(where, pool.q.weight, pool.q.bias, pool.proj, ("query",))
    put(f"{head}/LayerNorm_0", pool.norm)
    put(f"{head}/MlpBlock_0/Dense_0", pool.mlp.fc1)
    put(f"{head}/MlpBlock_0/Dense_1", pool.mlp.fc2)
    out["txt/Embed_0/embedding"] = text.token_embedding.weight.detach().numpy()
    out["txt/pos_embedding"] = text.positional_embedding.detach().numpy()[None]
    put("txt/head", text.text_projection)
    return out | {"b": np.array([-9.0]), "t": np.array([4.5])}


def test_a_file_of_big_vision_is_read(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub(hub)
    cut_models(monkeypatch, hub)
    made = load_backbone("ViT-B-16-SigLIP", seed=3, device="cpu")
    weights = big_vision(made.model)
    np.savez(tmp_path / "siglip.npz", **{f"params/{name}": value for name, value in weights.items()})
    backbone = load_backbone("ViT-B-16-SigLIP", tmp_path / "siglip.npz", device="cpu")
    image = torch.randn(1, 3, backbone.image_size, backbone.image_size)
    assert torch.equal(backbone.encode_images(image), made.encode_images(image))
    assert torch.equal(backbone.encode_text(["a cat"]), made.encode_text(["a cat"]))
    assert (backbone.logit_bias, backbone.logit_scale) == (-9, pytest.approx(np.exp(4.5), rel=1e-6))
    for broken in ({"b": weights["b"]}, {"b": np.array([object()])}):
        np.savez(tmp_path / "siglip.npz", **broken)
        with pytest.raises(UserError, match=r"siglip\.npz do not fit the model"):
            load_backbone("ViT-B-16-SigLIP", tmp_path / "siglip.npz", device="cpu")


@follows("if the file is one of these, name the folder of the file with its open_clip_config.json instead")
def test_a_file_is_prepared_like_most_weights_of_its_model(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut_models(monkeypatch, hub)
    file = tmp_path / "dfn.safetensors"
    save_file(load_backbone("ViT-H-14", device="cpu").model.state_dict(), file)
    plain = backbone_from_spec(f"ViT-H-14-quickgelu:{file}", device="cpu")
    assert (plain.preprocess.resize_mode, "but not as for dfn5b" in caplog.text) == ("shortest", True)
    facts = {"model_cfg": small_config("ViT-H-14-quickgelu"), "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(facts))
    assert backbone_from_spec(str(tmp_path), device="cpu").preprocess.resize_mode == "squash"


def test_positions_of_another_image_size_are_interpolated_aloud(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut_models(monkeypatch, hub)
    made = load_backbone("ViT-B-16", device="cpu")
    save_file(made.model.state_dict(), tmp_path / "small.safetensors")
    larger = small_config("ViT-B-16")
    larger["vision_cfg"]["image_size"] = 48
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", larger)
    load = {"device": "cpu", "force_quick_gelu": False}
    backbone = load_backbone("ViT-B-16", tmp_path / "small.safetensors", **load)
    assert r"visual.positional_embedding is interpolated from (5, 16) to (10, 16)" in caplog.text
    expected = dict(made.model.state_dict())
    open_clip.model.resize_pos_embed(expected, backbone.model)
    assert torch.equal(backbone.model.visual.positional_embedding, expected["visual.positional_embedding"])


@pytest.mark.parametrize("spec", ["ViT-B-16-SigLIP3", "MobileCLIP2-S5:x", "PE-Core-B-61"])
def test_a_name_near_a_known_one_gets_it_suggested(spec: str) -> None:
    with pytest.raises(UserError, match=r'Did you mean "(ViT-B-16-SigLIP2?|MobileCLIP2-S4|PE-Core-B-16)"'):
        backbone_from_spec(spec)
