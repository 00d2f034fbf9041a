"""What is exported does elsewhere what it did here."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from fastcoop.errors import UserError
from fastcoop.exchange import (
    Classifier,
    export_run,
    export_text_features,
    find_run,
    image_files,
    make_classifier,
    predict,
)
from fastcoop.features import FeatureStore
from fastcoop.results import load_contexts, load_predictions, load_results
from fastcoop.results.metadata import add_datasets
from fastcoop.sweeps import sweep
from tests.advice import follows
from tests.reference import reference_features

LAYOUTS = [(position, specific) for position in ("end", "mid", "front") for specific in (False, True)]
PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "deploy.md"


class OfficialLearner(torch.nn.Module):
    """What of the official prompt learner a checkpoint is loaded into."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.ctx = torch.nn.Parameter(torch.zeros(shape))
        self.register_buffer("token_prefix", torch.zeros(1))
        self.register_buffer("token_suffix", torch.zeros(1))

    def load(self, folder: Path, epoch: int) -> None:
        """The official rule: by epoch, without the fixed token vectors, not strictly."""
        checkpoint = torch.load(folder / "prompt_learner" / f"model.pth.tar-{epoch}", map_location="cpu")
        assert checkpoint["epoch"] == epoch
        state = checkpoint["state_dict"]
        del state["token_prefix"], state["token_suffix"]
        self.load_state_dict(state, strict=False)


@pytest.mark.parametrize(("position", "specific"), LAYOUTS)
def test_the_official_code_loads_a_checkpoint_and_predicts_the_same(
    world, backbone, dataset, key, tmp_path, position, specific
):
    results, run = world / "results", key(position, specific)
    path = export_run(results, run, "coop", tmp_path, str(world / "tiny"))
    ctp = {"end": "end", "mid": "middle", "front": "front"}[position]
    folder = tmp_path / f"colours/CoOp/tiny_2shots/nctx3_csc{specific}_ctp{ctp}/seed1"
    assert path == folder / "prompt_learner" / "model.pth.tar-2"
    assert (path.parent / "checkpoint").read_text().strip() == path.name
    contexts = load_contexts(results, run)
    learner = OfficialLearner(contexts.shape)
    learner.load(folder, 2)
    np.testing.assert_array_equal(learner.ctx.detach(), contexts)

    texts = reference_features(
        backbone.model, backbone.tokenizer, dataset.class_names, learner.ctx.detach(), position
    )
    classifier = make_classifier(find_run(results, run), backbone)
    unit = torch.nn.functional.normalize(texts)
    np.testing.assert_allclose(classifier.text_features, unit, atol=2e-6)
    features, _ = FeatureStore.open(world / "cache" / "tiny" / "colours.h5").split("test")
    probabilities = classifier.probabilities(features.numpy())
    stored = load_predictions(results, run)
    np.testing.assert_array_equal(probabilities.argmax(1), stored.predicted)
    np.testing.assert_allclose(probabilities.max(1), stored.confidence.astype(np.float32), atol=1e-3)


def test_contexts_carry_what_they_are(world, key, tmp_path):
    run = key("mid", True)
    path = export_run(world / "results", run, "safetensors", tmp_path / "contexts.safetensors")
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("contexts"), load_contexts(world / "results", run))
        header = file.metadata()
    assert header["key"] == run
    assert json.loads(header["class_names"]) == list(find_run(world / "results", run).class_names)
    assert json.loads(header["settings"])["class_position"] == "mid"


def test_three_lines_of_plain_open_clip(world, backbone, key, tmp_path, monkeypatch):
    """The lines of the page, with this backbone in place of RN50."""
    monkeypatch.chdir(tmp_path)
    export_run(world / "results", key(), "classifier", "classifier.safetensors", str(world / "tiny"))
    picture = next((world / "data/colours/test/green").iterdir())
    Image.open(picture).save("cat.png")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert f"```python\n{code}```" in (PAGE.parents[2] / "README.md").read_text(encoding="utf-8")
    lines = [line for line in code.splitlines() if line and not re.match(r"import |from |#", line)]
    assert len(lines) == 3
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(world / "tiny" / "tiny.json")
    weights = world / "tiny" / "open_clip_model.safetensors"
    code = code.replace('"RN50-quickgelu", pretrained="openai"', f'"tiny", pretrained={str(weights)!r}')
    assert "tiny" in code
    said: dict[str, torch.Tensor] = {}
    exec(code.replace("cat.jpg", "cat.png"), said)
    (ours,) = predict(Classifier.load("classifier.safetensors"), backbone, [Path("cat.png")])
    np.testing.assert_allclose(said["probs"][0].detach(), ours.probabilities, atol=1e-5)


def test_files_and_folders_are_labelled_in_order(world, backbone, key, tmp_path):
    classifier = make_classifier(find_run(world / "results", key()), backbone)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = image_files([world / "data/colours/test", tmp_path])
    assert len(files) == 21
    found = list(predict(classifier, backbone, files))
    assert [one.path for one in found] == files
    assert found[-1].probabilities is None
    assert found[-1].problem
    features, _ = FeatureStore.open(world / "cache" / "tiny" / "colours.h5").split("test")
    expected = classifier.probabilities(features.numpy())
    np.testing.assert_allclose([one.probabilities for one in found[:-1]], expected, atol=2e-3)
    for places in ([tmp_path / "nowhere"], [world / "results"]):
        with pytest.raises(UserError):
            image_files(places)


def test_a_classifier_survives_its_file_and_refuses_others(world, backbone, key, tmp_path):
    made = make_classifier(find_run(world / "results", key()), backbone)
    made.save(tmp_path / "classifier")
    read = Classifier.load(tmp_path / "classifier")
    np.testing.assert_array_equal(read.text_features, made.text_features)
    for name in ("class_names", "preprocess", "backbone", "backbone_digest", "origin"):
        assert getattr(read, name) == getattr(made, name)
    assert read.logit_scale == pytest.approx(made.logit_scale)
    export_run(world / "results", key(), "safetensors", tmp_path / "contexts")
    (tmp_path / "cut").write_bytes((tmp_path / "classifier").read_bytes()[:100])
    for wrong in ("contexts", "cut", "missing"):
        with pytest.raises(UserError):
            Classifier.load(tmp_path / wrong)


def test_mistakes_are_said(world, key, tmp_path):
    results = world / "results"
    with pytest.raises(UserError, match="classifier"):
        export_run(results, key(), "clasifier", tmp_path / "x")
    with pytest.raises(UserError, match="no run whose key begins with zzz"):
        find_run(results, "zzz")
    with pytest.raises(UserError, match="more of the key"):
        find_run(results, "")
    with pytest.raises(UserError, match="demo-resnet"):
        export_run(results, key(), "classifier", tmp_path / "x", "demo-resnet")
    with pytest.raises(UserError, match="demo-resnet"):  # of which nothing is needed
        export_run(results, key(), "safetensors", tmp_path / "x", "demo-resnet")
    from fastcoop.results import load_results

    frame = load_results(results)
    with pytest.raises(UserError, match="export the classifier instead"):
        find_run(results, frame.key[frame.method == "zero_shot"].iloc[0])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def other_methods(world) -> Path:
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 2, "seeds": 1, "views": 1,
        "methods": {
            "zero_shot": None, "linear_probe": None, "gda": {"alpha": 5.0}, "text_bias": {"epochs": 2},
            "cross_modal": {"iterations": 3, "learning_rate": 0.01, "selection": "fixed"},
            "tip_adapter": {"selection": "fixed"},
        },
    }  # fmt: skip
    places = {"data_root": world / "data", "cache": world / "cache", "results": world / "others"}
    sweep(grid, jobs=1, **places)
    return world / "others"


@follows("only CoOp's contexts are exported as contexts: export the classifier instead")
def test_contexts_of_another_method_are_exported_as_a_classifier(world, tmp_path):
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1,
        "methods": {"kgcoop": {"epochs": 2}},
    }  # fmt: skip
    results = tmp_path / "results"
    sweep(grid, jobs=1, data_root=world / "data", cache=world / "cache", results=results)
    (key,) = load_results(results).key
    for format in ("coop", "safetensors"):
        with pytest.raises(
            UserError, match=r"is KgCoOp .*; only CoOp's contexts .*: export the classifier instead"
        ):
            export_run(results, key, format, tmp_path / "out", str(world / "tiny"))
    assert export_run(results, key, "classifier", tmp_path / "out", str(world / "tiny")).is_file()


@pytest.mark.parametrize("method", ["zero_shot", "gda", "text_bias", "cross_modal"])
def test_linear_methods_have_classifiers_too(world, backbone, other_methods, tmp_path, method):
    (run,) = load_results(other_methods).query("method == @method").key
    export_run(other_methods, run, "classifier", tmp_path / "made", str(world / "tiny"))
    made = Classifier.load(tmp_path / "made")
    assert (made.bias is not None) == (method == "gda")
    assert made.origin.get("epochs") == ("2" if method == "text_bias" else None)
    recorded = load_predictions(other_methods, run)
    assert made.class_names == recorded.class_names
    store = FeatureStore.open(world / "cache" / "tiny" / "colours.h5")
    probabilities = made.probabilities(store.split("test")[0].numpy())
    np.testing.assert_array_equal(probabilities.argmax(1), recorded.predicted)
    np.testing.assert_allclose(probabilities.max(1), recorded.confidence, atol=2e-3)


@follows("as a classifier file needs; choose a run of another method")
@pytest.mark.parametrize("method", ["linear_probe", "tip_adapter"])
def test_runs_that_no_classifier_file_can_hold_are_refused(world, other_methods, tmp_path, method):
    keys = load_results(other_methods).set_index("method").key
    with pytest.raises(UserError, match="no linear function of image features of length 1"):
        export_run(other_methods, keys[method], "classifier", tmp_path / "made", str(world / "tiny"))
    assert not (tmp_path / "made").exists()
    export_run(other_methods, keys["gda"], "classifier", tmp_path / "made", str(world / "tiny"))


@follows("repeat its sweep into this folder, which records the prompt")
def test_runs_are_exported_with_the_prompt_that_they_were_tested_with(world, other_methods, tmp_path):
    results, places = tmp_path / "results", {"data_root": world / "data", "cache": world / "cache"}
    shutil.copytree(other_methods, results)
    datasets, backbone = results / "datasets.json", str(world / "tiny")
    keys = load_results(results).set_index("method").key

    def weights(method: str) -> np.ndarray:
        export_run(results, keys[method], "classifier", tmp_path / "made", backbone)
        return Classifier.load(tmp_path / "made").text_features

    expected, of_prompt = datasets.read_text(), weights("zero_shot")
    add_datasets(results, {"colours": {"prompt": "an x-ray of [CLASS]."}})  # as a later sweep would
    np.testing.assert_array_equal(weights("zero_shot"), of_prompt)
    datasets.unlink()
    np.testing.assert_array_equal(weights("zero_shot"), of_prompt)
    database = results / "results.sqlite"
    with closing(sqlite3.connect(database)) as db, db:  # of version 1
        db.execute("UPDATE runs SET settings = json_remove(settings, '$.dataset_prompt')")
        db.execute("UPDATE scores SET features = NULL, images = NULL, prompts = NULL")
    with pytest.raises(UserError, match=r"Neither run .* nor .*datasets\.json says which prompt of colours"):
        weights("zero_shot")
    datasets.write_text(expected)
    np.testing.assert_array_equal(weights("zero_shot"), of_prompt)
    datasets.unlink()
    sweep(yaml.safe_load((results / "grid.yaml").read_text()), results=results, jobs=1, **places)
    np.testing.assert_array_equal(weights("zero_shot"), of_prompt)


def read_by_transclip(root: Path, method: str, features: np.ndarray) -> np.ndarray:
    """Predict as TransCLIP begins: the tensor transposed, times 100 and features of length 1."""
    path = root / "Few-shot" / method / "tiny" / "2shots" / "colours" / "seed1" / "text_features.pt"
    prototypes = torch.load(path, weights_only=True).T.detach().float()
    images = torch.nn.functional.normalize(torch.from_numpy(features).float())
    return (100 * images @ prototypes).softmax(1).numpy()


@follows("change --where", "choose one with --where", "leave such runs out with --where")
def test_class_weights_are_the_classifier_in_the_layout_of_transclip(world, tmp_path):
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": 2, "seeds": 1, "views": 1,
        "methods": {
            "task_res": {"epochs": 3}, "linear_probe": None, "coop": {"context_length": 3, "epochs": [1, 2]},
        },
    }  # fmt: skip
    results = tmp_path / "results"
    sweep(grid, data_root=world / "data", cache=world / "cache", results=results, jobs=1)
    where, given = ["method=task_res"], {"backbones": [str(world / "tiny")]}
    features = FeatureStore.open(world / "cache" / "tiny" / "colours.h5").split("test")[0].numpy()
    for method, more in (("taskres", where), ("coop", ["method=coop", "epochs=2"])):
        assert len(export_text_features(results, tmp_path / "out", where=more, **given)) == 1
        probabilities = read_by_transclip(tmp_path / "out", method, features)
        frame = load_results(results)
        frame = frame[(frame.method == more[0].split("=")[1]) & (frame.epochs.fillna(2) == 2)]
        stored = load_predictions(results, frame.key.iloc[0])
        np.testing.assert_array_equal(probabilities.argmax(1), stored.predicted)
        np.testing.assert_allclose(probabilities.max(1), stored.confidence.astype(np.float32), atol=1e-3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))  # the beginning of a file fits
    try:
        with pytest.raises(UserError, match="cannot be written"):
            export_text_features(results, tmp_path / "full", where=where, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]
    with pytest.raises(UserError, match=r"would both be written to .*seed1; choose one with --where"):
        export_text_features(results, tmp_path / "two", where=["method=coop"], **given)
    with pytest.raises(UserError, match="no products of image features and class weights"):
        export_text_features(results, tmp_path / "probe", where=["method=linear_probe"], **given)
    with pytest.raises(UserError, match="no few-shot run that meets the conditions"):
        export_text_features(results, tmp_path / "none", where=["shots=4"], **given)


def test_an_export_replaces_no_checkpoint_of_the_official_code(world, backbone, key, save_official, tmp_path):
    results, tiny = world / "results", str(world / "tiny")
    path = export_run(results, key(), "coop", tmp_path / "output", tiny)
    assert export_run(results, key(), "coop", tmp_path / "output", tiny) == path
    trained = torch.zeros(3, 16)
    save_official(path, trained)
    kept = path.read_bytes()
    with pytest.raises(UserError, match=r"model\.pth\.tar-2 is already there"):
        export_run(results, key(), "coop", tmp_path / "output", tiny)
    path.rename(path.with_name("model.pth.tar-50"))
    (path.parent / "checkpoint").write_text("model.pth.tar-50\n")
    with pytest.raises(UserError, match="checkpoint is already there"):
        export_run(results, key(), "coop", tmp_path / "output", tiny)
    assert path.with_name("model.pth.tar-50").read_bytes() == kept
    assert (path.parent / "checkpoint").read_text() == "model.pth.tar-50\n"
    path.with_name("model.pth.tar-50").unlink()  # as if it was moved away
    (path.parent / "checkpoint").write_text("my notes")
    with pytest.raises(UserError, match="checkpoint is already there"):
        export_run(results, key(), "coop", tmp_path / "output", tiny)
    (path.parent / "checkpoint").write_text("model.pth.tar-50\n")
    assert export_run(results, key(), "coop", tmp_path / "output", tiny) == path


def test_class_weights_replace_no_prototypes_of_others(world, tmp_path):
    given = {
        "where": ["method=coop", "class_position=end", "class_specific=false"],
        "backbones": [str(world / "tiny")],
    }
    (path,) = export_text_features(world / "results", tmp_path, **given)
    path.write_bytes(b"")  # as programs make that reserve a name
    assert export_text_features(world / "results", tmp_path, **given) == [path]
    torch.save(torch.zeros(4, 16), path)  # as TransCLIP's files are
    kept = path.read_bytes()
    with pytest.raises(UserError, match=r"text_features\.pt is already there"):
        export_text_features(world / "results", tmp_path, **given)
    assert path.read_bytes() == kept
