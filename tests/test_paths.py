"""Every public function that takes a path takes it as text, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastcoop as fc
from fastcoop.exchange.coop_files import frozen_embeddings, write_coop_file
from tests.small_world import write_backbone, write_dataset

As = Callable[[Path], Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, a backbone, features, results of a CoOp run, an official checkpoint, and files of features."""
    import torch

    root = tmp_path_factory.mktemp("paths")
    write_dataset(root / "data" / "colours")
    write_dataset(root / "data" / "shifted", ("grey", "green"), train=0, val=0, seed=1)
    backbone = fc.backbone_from_spec(str(write_backbone(root / "tiny")))
    grid = {
        "backbones": str(root / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 0,
        "methods": {"coop": {"context_length": 2, "epochs": 1}},
    }  # fmt: skip
    fc.sweep(grid, data_root=root / "data", cache=root / "cache", results=root / "results", jobs=1)
    (root / "grid.json").write_text(str(grid).replace("'", '"'))
    dataset = fc.load_dataset("colours", root / "data")
    prefix, suffix = frozen_embeddings(backbone, dataset.class_names, 2)
    place = root / "output" / "CoOp" / "rn50_1shots" / "nctx2_cscFalse_ctpend" / "seed1" / "prompt_learner"
    write_coop_file(place / "model.pth.tar-9", torch.zeros(2, 16), prefix, suffix, 9)
    features = {
        "features": np.ones((2, 16), np.float32),
        "labels": np.arange(2),
        "names": np.array(["a", "b"]),
    }
    np.savez(root / "features.npz", **features)
    return root


def key(world: Path) -> str:
    return str(fc.load_results(world / "results").key[0])


def classifier(world: Path) -> fc.Classifier:
    return fc.make_classifier(fc.find_run(world / "results", key(world)), backbone(world))


def backbone(world: Path) -> fc.Backbone:
    return fc.backbone_from_spec(str(world / "tiny"))


def colours(world: Path) -> fc.Dataset:
    return fc.load_dataset("colours", world / "data")


def save_and_load(world: Path, new: Path, as_: As) -> None:
    classifier(world).save(as_(new / "c.safetensors"))
    fc.Classifier.load(as_(new / "c.safetensors"))


CALLS: dict[str, Callable[[Path, Path, As], Any]] = {
    "sweep": lambda world, new, as_: fc.sweep(
        as_(world / "grid.json"), data_root=as_(world / "data"), cache=as_(world / "cache"), results=as_(new), jobs=1
    ),
    "evaluate": lambda world, new, as_: fc.evaluate(
        as_(world / "results"), [as_(world / "data" / "shifted")], data_root=as_(world / "data"), cache=as_(new),
        backbones=[str(world / "tiny")],
    ),
    "interpret": lambda world, new, as_: fc.interpret(as_(world / "results"), backbone(world)),
    "report": lambda world, new, as_: fc.report(as_(world / "results"), as_(new)),
    "merge_results": lambda world, new, as_: fc.merge_results([as_(world / "results")], as_(new)),
    "load_results": lambda world, new, as_: fc.load_results(as_(world / "results")),
    "load_contexts": lambda world, new, as_: fc.load_contexts(as_(world / "results"), key(world)),
    "load_predictions": lambda world, new, as_: fc.load_predictions(as_(world / "results"), key(world)),
    "find_run": lambda world, new, as_: fc.find_run(as_(world / "results"), key(world)),
    "export_run": lambda world, new, as_: fc.export_run(
        as_(world / "results"), key(world), "classifier", as_(new / "c.safetensors"), str(world / "tiny")
    ),
    "import_coop": lambda world, new, as_: fc.import_coop(
        as_(world / "output"), backbone(world), colours(world), as_(new)
    ),
    "Classifier": save_and_load,
    "predict": lambda world, new, as_: list(
        fc.predict(classifier(world), backbone(world), [as_(world / "data" / "colours" / "test" / "grey" / "0.png")])
    ),
    "cache_features": lambda world, new, as_: fc.cache_features(
        backbone(world), colours(world), as_(new), shots=[1], seeds=[1], views=0
    ),
    "check_store": lambda world, new, as_: fc.check_store(as_(world / "cache" / "tiny" / "colours.h5")),
    "FeatureStore": lambda world, new, as_: fc.FeatureStore.open(as_(world / "cache" / "tiny" / "colours.h5")),
    "import_features": lambda world, new, as_: fc.import_features(
        {"test": as_(world / "features.npz")}, as_(new), backbone(world), name="im"
    ),
    "load_dataset": lambda world, new, as_: fc.load_dataset(as_(world / "data" / "colours"), as_(world / "data")),
    "load_backbone": lambda world, new, as_: fc.load_backbone("tiny", as_(world / "tiny")),
    "backbone_from_spec": lambda world, new, as_: fc.backbone_from_spec(as_(world / "tiny")),
}  # fmt: skip


@pytest.mark.parametrize("as_", [str, Path])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("undrawn")
def test_paths_are_taken_as_text_and_as_paths(world: Path, tmp_path: Path, name: str, as_: As) -> None:
    CALLS[name](world, tmp_path / "new", as_)
