"""What runs learned through one recipe of image transforms is tested and used through the same one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastcoop.errors import UserError
from fastcoop.exchange import find_run, import_coop, make_classifier, predict
from fastcoop.features import FeatureStore
from fastcoop.results import load_results
from fastcoop.results.read import load_runs
from fastcoop.sweeps import evaluate, sweep
from tests.advice import follows
from tests.exchange.test_import import OFFICIAL, contexts
from tests.small_world import write_dataset


@pytest.fixture(scope="module")
def runs_of_2021(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 2, "seeds": 1, "views": 0,
        "recipe": "official-2021", "methods": {"zero_shot": None, "coop": {"context_length": 2, "epochs": 1}},
    }  # fmt: skip
    sweep(grid, data_root=world / "data", cache=folder / "cache", results=folder / "results", jobs=1)
    return folder


def test_a_sweep_says_its_recipe_to_its_classifiers(world, backbone, dataset, runs_of_2021):
    frame = load_results(runs_of_2021 / "results")
    run = find_run(runs_of_2021 / "results", frame.key[frame.method == "coop"].iloc[0])
    assert run.recipe == "official-2021"
    classifier = make_classifier(run, backbone)
    pictures = [dataset.root / path for path in dataset.splits["test"].paths]
    found = [one.probabilities for one in predict(classifier, backbone, pictures)]
    features, _ = FeatureStore.open(runs_of_2021 / "cache" / "tiny" / "colours.h5").split("test")
    np.testing.assert_allclose(found, classifier.probabilities(features.numpy()), atol=2e-3)
    current, _ = FeatureStore.open(world / "cache" / "tiny" / "colours.h5").split("test")
    assert np.abs(np.array(found) - classifier.probabilities(current.numpy())).max() > 0.01


@follows("choose runs of one (--run), or name the recipe for the targets (--recipe)")
def test_evaluate_takes_the_runs_own_recipe(world, backbone, dataset, runs_of_2021, save_official, tmp_path):
    def test_store() -> str:
        (path,) = (tmp_path / "cache").rglob("*.h5")
        return FeatureStore.open(path).meta.recipe

    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    save_official(path, contexts(3, 16))
    import_coop(path, backbone, dataset, tmp_path / "imported", recipe="official-2021")
    places = {"data_root": world / "data", "backbones": [str(world / "tiny")]}
    tested = evaluate(tmp_path / "imported", ["colours"], cache=tmp_path / "cache", **places)
    assert [one.new for one in tested] == [True]
    assert test_store() == "official-2021"
    import_coop(path, backbone, dataset, tmp_path / "imported")
    with pytest.raises(UserError, match="several recipes of images"):
        evaluate(tmp_path / "imported", ["colours"], cache=tmp_path / "cache", **places)
    (current,) = set(load_runs(tmp_path / "imported").key) - {tested[0].key}
    evaluate(tmp_path / "imported", ["colours"], runs=[current], cache=tmp_path / "other", **places)
    (store,) = (tmp_path / "other").rglob("*.h5")
    assert FeatureStore.open(store).meta.recipe == "current"
    write_dataset(tmp_path / "data" / "other", ("purple", "green"), train=0, val=0)
    places |= {"data_root": tmp_path / "data", "cache": tmp_path / "new"}
    assert len(evaluate(tmp_path / "imported", ["other"], recipe="current", **places)) == 2
