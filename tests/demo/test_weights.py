"""The backbones that ship with the package, on the demo's own test pictures."""

from __future__ import annotations

import pytest
import torch

from fastcoop.backbones import backbone_from_spec
from fastcoop.backbones.load import EMBEDDED_WEIGHTS
from fastcoop.demo.paint import paint
from fastcoop.demo.world import DatasetPlan, drawings_of, plan
from fastcoop.methods.text import prompt_features
from tools.pretrain.pairs import normalize

DATASETS = ("objects", "badges", "textures", "styles", "digits")


def zero_shot(name: str, one: DatasetPlan) -> tuple[float, float]:
    """Accuracy of the hand-written prompt on the test pictures, and what chance would give."""
    backbone = backbone_from_spec(name)
    classes = list(one.members["test"])
    texts = torch.from_numpy(prompt_features(backbone, tuple(classes), one.template))
    right = total = 0
    for label, keys in enumerate(one.members["test"].values()):
        draw = torch.Generator().manual_seed(label)
        pictures, _ = paint(
            torch.from_numpy(drawings_of(keys)), backbone.preprocess.size, draw, one.variation
        )
        with torch.no_grad():
            features = backbone.model.encode_image(normalize(pictures), normalize=True)
        right += int(((features @ texts.T).argmax(1) == label).sum())
        total += len(keys)
    return right / total, 1 / len(classes)


@pytest.mark.parametrize("name", ["demo-resnet", "demo-vit"])
def test_zero_shot_is_well_above_chance_and_leaves_room(name: str) -> None:
    scores = [zero_shot(name, one) for one in plan() if one.name in DATASETS]
    accuracy, chance = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    assert 3 * chance < accuracy < 0.75


def test_the_weights_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_WEIGHTS.iterdir()) <= 25e6
