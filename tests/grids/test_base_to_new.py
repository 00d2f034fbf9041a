"""The grids beyond the paper's items run: base to new on halves of the classes, and contexts on other datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastcoop.backbones import backbone_from_spec
from fastcoop.datasets import load_dataset
from fastcoop.features import FeatureStore, store_path
from fastcoop.results import load_contexts, load_predictions, load_results
from fastcoop.sweeps import Summary
from tests.reference import reference_features

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SMALL = ["shots=2", "seeds=1", "views=0", "methods.coop.context_length=2", "methods.coop.epochs=3"]


def plainly(world: Path, results: Path, key: str, dataset: str) -> np.ndarray:
    """Predictions of a run's contexts on a dataset's test images by the plain 77-token way."""
    backbone, data = backbone_from_spec(str(world / "tiny")), load_dataset(dataset, world / "data")
    store = FeatureStore.open(store_path(world / "cache", backbone, data), backbone, data)
    contexts = torch.from_numpy(load_contexts(results, key))
    texts = reference_features(backbone.model, backbone.tokenizer, data.class_names, contexts, "end")
    images = torch.nn.functional.normalize(store.split("test")[0], dim=-1)
    return (images @ torch.nn.functional.normalize(texts, dim=-1).T).argmax(1).numpy()


def test_base_to_new(world: Path, run: Callable[..., Summary], tmp_path: Path) -> None:
    summary = run(
        EXPERIMENTS / "base_to_new.yaml",
        results=tmp_path,
        overrides=[
            *SMALL, f"backbones={world / 'tiny'}", "datasets=colours:base", 'targets={"colours:base": "colours:new"}',
        ],
    )  # fmt: skip
    assert (summary.runs, summary.finished) == (2, 2)
    table = load_results(tmp_path)
    assert set(table.source) == {"colours:base"}
    assert sorted(table.dataset) == ["colours:base", "colours:base", "colours:new", "colours:new"]
    assert set(table.chance) == {50.0}
    (key,) = set(table.key[table.method == "coop"])
    assert table.train_images[table.key == key].tolist() == [4, 4]  # two of each base class
    for half, names in (("base", ("dark red", "green")), ("new", ("grey", "sky blue"))):
        said = load_predictions(tmp_path, key, f"colours:{half}")
        assert said.class_names == names
        assert (said.predicted == plainly(world, tmp_path, key, f"colours:{half}")).all()
        assert set(said.labels) == {0, 1}


def test_cross_dataset(world: Path, run: Callable[..., Summary], tmp_path: Path) -> None:
    targets = "targets={colours: [other, shifted]}"
    given = [*SMALL, f"backbones={world / 'tiny'}", "datasets=colours", targets]
    run(EXPERIMENTS / "cross_dataset.yaml", results=tmp_path, overrides=given)
    table = load_results(tmp_path)
    assert len(table) == 6
    (key,) = set(table.key[table.method == "coop"])
    for dataset in ("other", "shifted"):
        said = load_predictions(tmp_path, key, dataset)
        assert (said.predicted == plainly(world, tmp_path, key, dataset)).all()
