"""Table 5's other methods, each against plain torch: its own optimiser, one run, one learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fastcoop.backbones import Backbone
from fastcoop.datasets import load_dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features
from fastcoop.methods import Data, RunSpec, get_method
from fastcoop.methods.schedule import epoch_order
from fastcoop.methods.text_learner import RATES
from tests.methods.conftest import job, make_data, run
from tests.small_world import write_dataset

EPOCHS = 12
TEXT_METHODS = ("text_transform", "text_bias")


def official_rate(epoch: int, base: float) -> float:
    cosine = base * (1 + np.cos(np.pi * (epoch - 1) / EPOCHS)) / 2
    return min(1e-5, base) if epoch == 0 else cosine


def prompts(backbone: Backbone, data: Data) -> torch.Tensor:
    tokens = backbone.tokenizer([f"a photo of a {name}." for name in data.class_names])
    with torch.no_grad():
        return backbone.model.encode_text(tokens, normalize=True)


def plainly(backbone: Backbone, data: Data, method: str, rate: float) -> tuple[torch.Tensor, list[float]]:
    """Class weights (classes, dim) after training with all images as one batch, and the losses."""
    subset = data.subset(2, 1)
    images = normalize(torch.from_numpy(data.train(subset)[0][:, 0]), dim=-1)
    labels, texts = torch.from_numpy(data.train(subset)[1]), prompts(backbone, data)
    learned = torch.zeros(16, 16) if method == "text_transform" else torch.zeros(16)
    learned.requires_grad_()
    optimiser = torch.optim.SGD([learned], lr=rate, momentum=0.9, weight_decay=5e-4)

    def classifier() -> torch.Tensor:
        if method == "text_transform":
            return normalize(texts @ (torch.eye(16) + learned).T, dim=-1)
        return normalize(texts + learned, dim=-1)

    losses = []
    for epoch in range(EPOCHS):
        optimiser.param_groups[0]["lr"] = official_rate(epoch, rate)
        loss = cross_entropy(backbone.logit_scale * images @ classifier().T, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return classifier().detach(), losses


def accuracy(weights: torch.Tensor, features: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(
        (torch.from_numpy(features) @ weights.T).argmax(1).eq(torch.from_numpy(labels)).float().mean()
    )


@pytest.mark.parametrize("method", TEXT_METHODS)
@pytest.mark.parametrize("rate", [1e-3, 3e-2])
def test_text_learners_learn_what_plain_torch_learns(backbone: Backbone, method: str, rate: float) -> None:
    data = make_data(views=0)
    (outcome,) = run(backbone, method, [job(data, method, epochs=EPOCHS, learning_rate=rate)])
    weights, losses = plainly(backbone, data, method, rate)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    assert outcome.scores["animals"].accuracy == pytest.approx(accuracy(weights, *data.test))
    assert outcome.extra["learning_rate"] == rate
    assert outcome.losses[-1] < outcome.losses[0]


@pytest.mark.parametrize("method", TEXT_METHODS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_learning_rate_is_the_best_on_validation_images(
    backbone: Backbone, method: str, seed: int
) -> None:
    data = make_data(views=0, seed=seed)
    (outcome,) = run(backbone, method, [job(data, method, epochs=EPOCHS)])
    features, labels = data.validation(data.subset(2, 1))
    tried = {rate: plainly(backbone, data, method, rate)[0] for rate in RATES}
    on_val = {rate: accuracy(weights, features, labels) for rate, weights in tried.items()}
    chosen = outcome.extra["learning_rate"]
    assert on_val[chosen] == max(on_val.values()) == pytest.approx(outcome.extra["val_accuracy"])
    assert outcome.scores["animals"].accuracy == pytest.approx(accuracy(tried[chosen], *data.test))


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_what_was_learned_on_texts_is_tested_again_without_learning(backbone: Backbone, method: str) -> None:
    data, other = make_data(views=0), make_data(("ship", "car"), "vehicles")
    one = job(data, method, epochs=EPOCHS, targets=(other,))
    (first,) = run(backbone, method, [one])
    (again,) = run(backbone, method, [replace(one, weights=first.weights)])
    assert again.losses is None
    assert list(again.scores) == ["vehicles"]
    assert (again.scores["vehicles"].predictions == first.scores["vehicles"].predictions).all()


def test_a_learning_rate_is_asked_for_where_nothing_can_choose_it(data: Data) -> None:
    splits = {name: split for name, split in data.dataset.splits.items() if name != "val"}
    bare = Data(replace(data.dataset, splits=splits), data.store, data.views)
    with pytest.raises(UserError, match=r"no validation images.* set learning_rate of text_bias"):
        get_method("text_bias").check(job(bare, "text_bias"))
    get_method("text_bias").check(job(bare, "text_bias", learning_rate=0.01))


@pytest.mark.parametrize(
    ("images", "expected"), [(5, [5]), (32, [32]), (63, [32]), (64, [32, 32]), (70, [32, 32])]
)
def test_an_epoch_is_the_official_one(images: int, expected: list[int]) -> None:
    steps = epoch_order(images, 32, np.random.default_rng(0))
    assert [len(step) for step in steps] == expected
    assert len(set(np.concatenate(steps).tolist())) == sum(expected)


@pytest.fixture
def photographs(backbone: Backbone, tmp_path: Path) -> Data:
    dataset = load_dataset(write_dataset(tmp_path / "colours"))
    path = cache_features(
        backbone, dataset, tmp_path / "cache", shots=[2], seeds=[1], views=0, dtype="float32"
    )
    return Data(dataset, FeatureStore.open(path, backbone, dataset), views=0)


def tensors(backbone: Backbone, data: Data, split: str, rows: np.ndarray) -> torch.Tensor:
    """Images through torchvision's transforms."""
    from PIL import Image
    from torchvision import transforms

    prepare = transforms.Compose([
        transforms.Resize(16, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(16),
        transforms.ToTensor(), transforms.Normalize(backbone.preprocess.mean, backbone.preprocess.std),
    ])  # fmt: skip
    paths = [data.dataset.root / data.dataset.splits[split].paths[row] for row in rows]
    return torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])


def test_fine_tuning_is_plain_training_of_the_image_tower(backbone: Backbone, photographs: Data) -> None:
    one = job(photographs, "finetune_image_encoder", epochs=EPOCHS, learning_rate=0.01)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    (note,) = get_method("finetune_image_encoder").notes([one])
    assert "1 run, one after the other, with 96 images forward and backward" in note
    (outcome,) = run(backbone, "finetune_image_encoder", [one])
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())

    subset, splits = photographs.subset(2, 1), photographs.dataset.splits
    images = tensors(backbone, photographs, "train", subset.train)
    labels, texts = torch.from_numpy(splits["train"].labels[subset.train]), prompts(backbone, photographs)
    parameters = [p for name, p in backbone.model.named_parameters() if name.startswith("visual.")]
    optimiser = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    try:
        backbone.model.visual.requires_grad_(True)
        losses = []
        for epoch in range(EPOCHS):
            optimiser.param_groups[0]["lr"] = official_rate(epoch, 0.01)
            features = backbone.model.encode_image(images, normalize=True)
            loss = cross_entropy(backbone.logit_scale * features @ texts.T, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        with torch.no_grad():
            test = tensors(backbone, photographs, "test", np.arange(len(splits["test"])))
            predicted = (backbone.model.encode_image(test, normalize=True) @ texts.T).argmax(1).numpy()
    finally:
        backbone.model.load_state_dict(before)
        backbone.model.visual.requires_grad_(False)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-3)
    assert (outcome.scores["colours"].predictions == predicted).mean() > 0.99
    assert outcome.losses[-1] < outcome.losses[0]
    assert 0 <= outcome.extra["val_accuracy"] <= 100


def test_fine_tuning_needs_images(photographs: Data, data: Data) -> None:
    get_method("finetune_image_encoder").check(job(photographs, "finetune_image_encoder"))
    for without in (data, Data(replace(photographs.dataset, root=Path("nowhere")), photographs.store)):
        asked = RunSpec.of("", job(photographs, "finetune_image_encoder").settings, without)
        with pytest.raises(UserError, match="needs the images of"):
            get_method("finetune_image_encoder").check(asked)
