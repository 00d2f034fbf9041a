"""Backbones, datasets and features live no longer than whoever uses them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcoop as fc
from fastcoop.features import FeatureStore
from fastcoop.memo import memoize
from fastcoop.methods import METHODS, Data
from fastcoop.methods.data import matching_classes
from fastcoop.prompts import mean_initial_distance, random_distances
from tests.methods.conftest import job, make_data, run
from tests.small_world import write_backbone, write_dataset


class Owner:
    """Something that results are kept for."""


def test_results_are_kept_with_their_owner_and_no_longer() -> None:
    calls: list[int] = []

    @memoize(2)
    def square(owner: Owner, number: int) -> np.ndarray:
        calls.append(number)
        return np.array(number**2)

    one, other = Owner(), Owner()
    for number in (1, 2, 1, 3, 1, 2):
        assert square(one, number) == number**2
    assert calls == [1, 2, 3, 2], "of two results the one used last stays"
    assert square(other, 1) == 1
    assert calls == [1, 2, 3, 2, 1]
    kept = weakref.ref(square(one, 3))
    assert kept() is not None
    del one
    gc.collect()
    assert kept() is None


def alive(kind: type) -> list[Any]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is kind]


def test_methods_keep_neither_backbone_nor_data(tmp_path: Path) -> None:
    backbone = fc.backbone_from_spec(str(write_backbone(tmp_path / "tiny", text_layers=2)))
    data, target = make_data(), make_data(("Cat", "old_dog", "sea lion"), "sketches")
    for name in METHODS.keys() - {"finetune_image_encoder"}:
        fields = METHODS[name].Settings.model_fields
        short = {key: 1 for key in ("epochs", "iterations", "layer") if key in fields}
        run(backbone, name, [job(data, name, targets=(target,), **short)])
    run(backbone, "coop", [job(data, "coop", targets=(target,), class_specific=True, init="a", epochs=1)])
    assert matching_classes(data, target) == [0, 2, 1]
    assert matching_classes(target, data) == [0, 2, 1]
    nearest = fc.nearest_words(backbone, torch.zeros(1, 16))
    mean_initial_distance(backbone)
    random_distances(backbone, torch.ones(2))
    encoder = fc.PromptEncoder(backbone, data.class_names, fc.PromptLayout(2))
    encoder(torch.zeros(1, 2, 16))
    held = [weakref.ref(one) for one in (backbone, backbone.model, data, target)]
    del backbone, data, target, encoder
    gc.collect()
    assert [one() for one in held] == [None] * 4
    assert nearest.words


def test_commands_keep_neither_backbones_nor_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted over the whole process: what this test did not make was there before."""
    monkeypatch.chdir(tmp_path)
    folder = write_backbone(tmp_path / "tiny")
    write_dataset(tmp_path / "data" / "colours")
    before = {kind: len(alive(kind)) for kind in (fc.Backbone, Data, FeatureStore)}
    grid = {
        "backbones": str(folder), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1,
        "methods": {"zero_shot": None, "linear_probe": {"iterations": 5}, "coop": {"context_length": 2, "epochs": 2}},
    }  # fmt: skip
    fc.sweep(grid, results="results", jobs=1)
    fc.evaluate("results", ["colours"], backbones=[str(folder)])
    backbone = fc.backbone_from_spec(str(folder))
    fc.interpret("results", backbone)
    table = fc.load_results("results")
    run = fc.find_run("results", table[table.method == "coop"].key.iloc[0])
    pictures = sorted((tmp_path / "data" / "colours").rglob("*.png"))[:2]
    classifier = fc.make_classifier(run, backbone)
    predictions = list(fc.predict(classifier, backbone, pictures))
    del backbone
    assert len(predictions) == 2
    assert {kind: len(alive(kind)) for kind in before} == before
