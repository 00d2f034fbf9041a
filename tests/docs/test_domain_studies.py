"""The commands for domain models in docs/backbones.md, with random models of the same structure in their places."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

import fastcoop
from fastcoop.backbones.load import load_backbone
from fastcoop.cli import main
from fastcoop.reports import style
from tests.backbones.small_models import cut_models, hub_folder, small_config, write_tower
from tests.backbones.test_hf_clip import write_clip
from tests.docs.test_documents import ROOT, commands
from tests.small_world import write_dataset
from tests.tokenizers import write_tokenizer

PAGE = ROOT / "docs" / "backbones.md"
MARKED = r"<!-- run with models -->\n```bash\n(.*?)```"
BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
WORDS = ["a", "photo", "of", ".", "dark", "red", "green", "sky", "blue", "grey"]
PATHS = {
    "imageomics-bioclip": "shared",
    "imageomics-bioclip-2": "shared",
    "microsoft-BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": "plain",
    "vinid-plip": "shared",
    "ViT-B-32-RemoteCLIP-ViT-B-32": "shared",
    "ViT-B-16-SigLIP2-webli": "plain",
}


def write_open_clip(folder: Path, config: dict[str, Any], tower: Path | None = None) -> None:
    """A model's repository on the hub: config and random weights in open_clip's format."""
    torch.manual_seed(0)
    custom = config.get("custom_text") or tower is not None
    parts = {key: value for key, value in config.items() if key != "custom_text"}
    if tower is not None:
        parts["text_cfg"] = parts["text_cfg"] | {"hf_model_name": str(tower), "hf_model_pretrained": False}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**parts)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def write_models(folder: Path, cache: Path) -> None:
    """The six models of the page, small: five in Hugging Face's cache, RemoteCLIP's state dict in ``weights``."""
    write_open_clip(hub_folder(cache, "imageomics/bioclip"), small_config("ViT-B-16"))
    write_open_clip(hub_folder(cache, "imageomics/bioclip-2"), small_config("ViT-L-14"))
    write_clip(hub_folder(cache, "vinid/plip"))
    siglip = hub_folder(cache, "timm/ViT-B-16-SigLIP2")
    write_tokenizer(siglip, "siglip", WORDS)
    write_open_clip(siglip, small_config("ViT-B-16-SigLIP2"))

    biomed = hub_folder(cache, "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
    write_tower(hub_folder(cache, BERT), "bert", write_tokenizer(biomed, "bert", WORDS))
    vision = small_config("ViT-B-16-SigLIP2")["vision_cfg"] | {
        "timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear",
    }  # fmt: skip
    text = {
        "hf_model_name": BERT, "hf_tokenizer_name": BERT, "hf_proj_type": "mlp", "context_length": 256,
        "hf_pooler_type": "cls_last_hidden_state_pooler",
    }  # fmt: skip
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    write_open_clip(biomed, config, hub_folder(cache, BERT))

    remote = load_backbone("ViT-B-32-gelu", seed=1).model.state_dict()
    (folder / "weights").mkdir()
    torch.save(remote, folder / "weights" / "RemoteCLIP-ViT-B-32.pt")


def test_the_commands_for_domain_models_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data" / "photos", train=2, val=1, test=2)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    file = tmp_path / "experiments" / "photographs.yaml"
    grid = yaml.safe_load(file.read_text(encoding="utf-8"))
    grid |= {"shots": [1], "seeds": [1], "views": 1}
    grid["methods"]["coop"] = {"context_length": 2, "epochs": 1}
    file.write_text(yaml.safe_dump(grid), encoding="utf-8")
    monkeypatch.setattr(style, "METADATA", {"svg": style.METADATA["svg"]})  # the page needs no other figures
    cut_models(monkeypatch, tmp_path / "hub")
    write_models(tmp_path, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    printed = []
    for block in re.findall(MARKED, PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for arguments in commands(block):
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            said = capsys.readouterr()
            assert not stopped.value.code, f"fastcoop {' '.join(arguments)}\n{said.err}"
            printed.append(said.out)
    assert len(printed) == 11
    assert re.search(
        r"^microsoft-BiomedCLIP\S+  prompts on the plain path \(.*\): \d+ positions", printed[7], re.MULTILINE
    )
    assert (tmp_path / "reports" / "photographs" / "index.html").is_file()
    results = fastcoop.load_results(tmp_path / "results" / "photographs")
    assert set(results.backbone) == set(PATHS)
    assert set(results[results.method == "coop"].backbone) == set(PATHS)
    for name, path in (("hf-hub:imageomics/bioclip", "shared"), ("ViT-B-16-SigLIP2:webli", "plain")):
        assert fastcoop.backbone_from_spec(name).prompt_path.path == path
