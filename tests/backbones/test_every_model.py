"""Every model that open_clip knows, cut to a few megabytes, classifies pictures; a table says how it learns prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from fastcoop import LinearProbe, ZeroShot
from fastcoop.backbones import load_backbone
from fastcoop.datasets import Dataset
from fastcoop.features import FeatureStore, cache_features
from fastcoop.features.images import read_rgb
from tests.backbones.small_models import NAMES, cut_models, write_hub
from tests.features.small import CLASSES, make_folder

# How the models learn prompts, by the first pattern that matches a name; the reason where prompts share nothing.
PATHS = (
    ("SigLIP|CLIPA|MobileCLIP-S|MobileCLIP2-[SL]", "plain", "its attention is not causal"),
    ("coca_(base|ViT)", "plain", "its output is read at an appended class token"),
    ("roberta|mt5|nllb", "plain", "it is not one of open_clip's own text transformers"),
    ("", "shared", ""),
)
COUNTS = {"shared": 92, "plain": 52}


def expected_path(name: str) -> tuple[str, str]:
    """How a model learns prompts, and why not otherwise."""
    return next((path, reason) for pattern, path, reason in PATHS if re.search(pattern, name))


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of open_clip's models are small while these tests run."""
    cache = tmp_path_factory.mktemp("hub")
    write_hub(cache)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_models(monkeypatch, cache)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three pictures of three classes, of odd sizes."""
    return make_folder(tmp_path_factory.mktemp("pictures"), train=0, val=0, test=1)


def test_the_table_has_every_model() -> None:
    assert Counter(expected_path(name)[0] for name in NAMES) == COUNTS


@pytest.mark.parametrize("name", NAMES)
def test_every_model_classifies_pictures(name: str, pictures: Dataset, tmp_path: Path) -> None:
    backbone = load_backbone(name, device="cpu")
    assert sum(weight.numel() * 4 for weight in backbone.model.parameters()) < 10e6

    path = cache_features(backbone, pictures, tmp_path, shots=1, seeds=1, dtype="float32")
    features, labels = FeatureStore.open(path, backbone, pictures).split("test")
    config = open_clip.transform.PreprocessCfg(size=backbone.image_size)
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    images = [transform(read_rgb(pictures.root / file)) for file in pictures.splits["test"].paths]
    with torch.no_grad():
        theirs = backbone.model.encode_image(torch.stack(images), normalize=False)
        ids = backbone.tokenizer([f"a photo of a {name}." for name in CLASSES])
        texts = backbone.model.encode_text(ids, normalize=True)
    assert torch.allclose(features.reshape(theirs.shape), theirs, atol=1e-5)

    zero_shot = ZeroShot(backbone=backbone).fit(None, class_names=CLASSES)
    assert torch.allclose(torch.from_numpy(zero_shot.coef_), texts, atol=1e-5)
    logits = normalize(theirs, dim=-1) @ texts.T
    best = (
        logits.max(1).values - logits.gather(1, torch.from_numpy(zero_shot.predict(features))[:, None])[:, 0]
    )
    assert best.max() < 1e-5  # random weights may leave two classes equal
    spread = (features - features.mean(0)) / features.std(0)  # random towers hardly tell pictures apart
    probe = LinearProbe().fit(spread, labels, class_names=CLASSES, X_val=spread, y_val=labels)
    assert probe.predict(spread).tolist() == labels.tolist()

    assert backbone.prompt_path.path == expected_path(name)[0]
    assert backbone.prompt_path.reason.startswith(expected_path(name)[1])
