"""Every command on a GPU, without one: nothing mixes devices, and the results are the CPU's to the bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import fastcoop as fc
from fastcoop.backbones import Backbone
from fastcoop.backbones.devices import resolve_device
from fastcoop.cli import main
from fastcoop.engine.fit import FREE_FRACTION
from fastcoop.features import FeatureStore, plan
from fastcoop.results import load_results
from tests import pretend_gpu as pretended
from tests.pretend_gpu import Event, GpuTensor, pretend_gpu
from tests.small_world import write_backbone, write_dataset

GRID = """
backbones: {world}/tiny
datasets: [colours]
shots: [1, 2]
seeds: 1
views: 2
methods:
  - zero_shot
  - ensemble
  - linear_probe
  - text_bias: {{epochs: 2}}
  - text_transform: {{epochs: 2}}
  - finetune_image_encoder: {{epochs: 1}}
  - coop: {{context_length: 2, epochs: 20}}
  - coop: {{context_length: 2, epochs: 3, class_specific: true, class_position: mid}}
  - coop: {{context_length: 3, epochs: 4, select: best_val, init: a photo of}}
  - coop: {{context_length: 3, epochs: 2, precision: bfloat16}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    write_dataset(root / "data" / "colours")
    write_dataset(root / "data" / "other", train=0, val=0)
    write_backbone(root / "tiny")
    (root / "grid.yaml").write_text(GRID.format(world=root))
    return root


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert not stopped.value.code, arguments


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        here, there = torch.ones(3, 2), torch.ones(3, 2).to("cuda")
        assert isinstance(there, GpuTensor)
        assert there.device.type == "cuda"
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            here + there
        with pytest.raises(TypeError, match="convert cuda"):
            there.numpy()
        assert torch.equal(there.cpu(), here)


def walk(folder: Path, world: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command that takes a device, or loads a backbone. A GPU needs no option: it is the default."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    backbone = "--backbone", world / "tiny"
    data, on = ("--data-root", world / "data"), ("--device", device) if device == "cpu" else ()
    run("cache-features", "colours", "other", *backbone, *data, *on, "--views", 2)
    run("sweep", world / "grid.yaml", *data, *on, "--dry-run")
    run("sweep", world / "grid.yaml", *data, *on)
    run("evaluate", "results/grid", "--targets", "other", *backbone, *data, *on)
    coop = load_results("results/grid").query("method == 'coop'")["key"].min()
    run("export", coop, "--results", "results/grid", "--out", "classifier.safetensors", *backbone)
    run("interpret", "results/grid", *backbone)
    store = next((folder / "cache").rglob("colours.h5"))
    run("features", "check", store, *backbone, "--dataset", world / "data" / "colours")
    run("predict", "classifier.safetensors", world / "data" / "colours" / "test", *backbone, *on, "--json")


def _rows(folder: Path) -> pd.DataFrame:
    """The runs in one order: their keys hold the features' digest, which is not the same on every device."""
    return load_results(folder).sort_values(["dataset", "label", "shots"], ignore_index=True)


def test_every_command_runs_on_a_gpu_with_the_results_of_the_cpu(
    world, tmp_path, monkeypatch, capsys, caplog
):
    labels = {}
    for device, gpu in (("cpu", nullcontext()), ("cuda", pretend_gpu())):
        with gpu:
            walk(tmp_path / device, world, device, monkeypatch)
        printed = capsys.readouterr().out
        labels[device] = json.loads(printed[printed.index("[\n") :])
    cpu, cuda = (_rows(tmp_path / device / "results" / "grid") for device in ("cpu", "cuda"))
    assert "could not be recorded" not in caplog.text
    assert set(cuda["device"]) == {"cuda:0"}
    assert set(cuda["status"]) == set(cpu["status"]) == {"done"}
    same = ["dataset", "label", "shots", "seed", "accuracy", "per_class"]
    pd.testing.assert_frame_equal(cuda[same], cpu[same])
    for ours, theirs in zip(cuda["losses"].dropna(), cpu["losses"].dropna(), strict=True):
        np.testing.assert_allclose(json.loads(ours), json.loads(theirs), rtol=1e-5)
    for ours, theirs in zip(labels["cuda"], labels["cpu"], strict=True):
        assert [label["label"] for label in ours["labels"]] == [label["label"] for label in theirs["labels"]]


def test_estimators_and_modules_run_on_a_gpu(world):
    images = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    labels, names = np.arange(8) % 2, ["cat", "dog"]
    found = []
    for device, gpu in (("cpu", nullcontext()), ("cuda", pretend_gpu())):
        with gpu:
            backbone = fc.backbone_from_spec(world / "tiny", device="auto" if device == "cuda" else device)
            classifier = fc.CoOpClassifier(backbone, context_length=2, epochs=3).fit(
                images, labels, class_names=names
            )
            learner = fc.PromptLearner(backbone, names, fc.PromptLayout(2))
            learner().sum().backward()
            contexts = torch.zeros(2, 16, requires_grad=True)  # on the CPU: gradients come back to it
            fc.PromptEncoder(backbone, names, fc.PromptLayout(2))(contexts).sum().backward()
            assert contexts.grad.device.type == "cpu"
            found.append((classifier.predict_proba(images), learner.contexts.grad.cpu(), contexts.grad))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_tf32_holds_in_the_engine_s_steps_only_and_needs_a_gpu(world, tmp_path, monkeypatch, capsys):
    grid = {"backbones": str(world / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1}
    coop = {"context_length": 2, "epochs": 20, "precision": "tf32"}
    options = {"data_root": world / "data", "cache": tmp_path / "cache", "jobs": 1}
    with pytest.raises(fc.errors.UserError, match="on a CPU use float32"):
        fc.sweep(grid | {"methods": {"coop": coop}}, results=tmp_path / "refused", **options)
    found: dict[str, set[str]] = {}

    def run_operation(func, args, kwargs):
        if func in (torch.ops.aten.mm.out, torch.ops.aten.convolution.default):
            found.setdefault(str(func), set()).add(torch.backends.cuda.matmul.fp32_precision)
        return run_as_before(func, args, kwargs)

    run_as_before = pretended.run_operation
    monkeypatch.setattr(pretended, "run_operation", run_operation)
    with pretend_gpu():
        fc.sweep(grid | {"methods": {"coop": coop}}, results=tmp_path / "results", **options)
    assert load_results(tmp_path / "results")["label"].item() == "CoOp (M=2, end, TF32)"
    assert found.pop("aten.convolution.default") == {"ieee"}  # caching
    assert found.pop("aten.mm.out") == {"tf32", "ieee"}  # training, and the test of what was learned


def test_auto_is_a_gpu_that_answers(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pretend_gpu():
        assert resolve_device("auto") == "cuda"
        assert resolve_device("cpu") == "cpu"
        assert resolve_device(pretended.GPU) == "cuda:0"
    assert not caplog.text
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def answer(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr("torch.ones", answer)
    assert resolve_device("auto") == "cpu"
    assert caplog.messages == [
        "The GPU does not answer, so the CPU is used: CUDA error: no kernel image is available"
    ]


def test_a_sweep_is_one_process_on_one_gpu_and_more_divide_its_memory(world, tmp_path, monkeypatch):
    options = {
        "data_root": world / "data",
        "cache": tmp_path / "cache",
        "results": tmp_path / "r",
        "dry_run": True,
    }
    budgets = {}

    def seen(loaded, plan, cache):
        batches = [batch for batch in plan.batches if batch.trains]
        budgets[plan.team.size] = {batch.budget for batch in batches}
        assert len(batches) == 2, "one training per precision"

    monkeypatch.setattr("fastcoop.sweeps.forecast.forecast", seen)
    monkeypatch.setattr("fastcoop.sweeps.workers.free_bytes", lambda device: 10**9)
    with pretend_gpu():
        for jobs in (-1, 2, 3):
            fc.sweep(world / "grid.yaml", jobs=jobs, **options)
    assert budgets == {size: {int(FREE_FRACTION * 10**9 / size)} for size in (1, 2, 3)}


def test_a_gpu_fetches_features_one_batch_late_and_they_are_the_cpu_s(world, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CROPS_PER_CHUNK", 4)
    steps: list[str] = []

    def note(step, original):
        def wrapped(*args, **kwargs):
            steps.append(step)
            return original(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Event, "synchronize", note("fetch", Event.synchronize))
    ask = {"shots": [2], "seeds": [1], "views": 1, "dtype": "float32"}
    data = world / "data" / "colours"
    on_cpu = fc.cache_features(world / "tiny", data, tmp_path / "cpu", **ask)
    assert not steps
    monkeypatch.setattr(Backbone, "encode_images", note("encode", Backbone.encode_images))
    with pretend_gpu():
        backbone = fc.backbone_from_spec(world / "tiny", device="cuda")
        on_gpu = fc.cache_features(backbone, data, tmp_path / "cuda", **ask)
    batches = steps.count("encode")
    assert batches > 3
    assert steps == ["encode", *["encode", "fetch"] * (batches - 1), "fetch"]
    cpu, gpu = FeatureStore.open(on_cpu), FeatureStore.open(on_gpu)
    assert cpu.meta.precision == gpu.meta.precision == "float32"
    for split in ("train", "val", "test"):
        rows = np.arange(len(cpu.indices(split)))
        np.testing.assert_allclose(gpu.raw(split, rows), cpu.raw(split, rows), rtol=1e-5, atol=1e-6)


def test_features_in_tf32_say_so_and_a_store_keeps_its_precision(world, tmp_path, monkeypatch, caplog):
    used = set()
    run_as_before = pretended.run_operation

    def run_operation(func, args, kwargs):
        if func is torch.ops.aten.convolution.default:
            used.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        return run_as_before(func, args, kwargs)

    monkeypatch.setattr(pretended, "run_operation", run_operation)
    data, few = world / "data" / "colours", {"shots": [1], "seeds": [1], "views": 0}
    with pretend_gpu():
        backbone = fc.backbone_from_spec(world / "tiny", device="cuda")
        path = fc.cache_features(backbone, data, tmp_path, precision="tf32", **few)
        assert used == {("tf32", "tf32"), ("ieee", "ieee")}  # the latter to measure the difference
        fc.cache_features(backbone, data, tmp_path, **few | {"shots": [2]})
        with pytest.raises(fc.errors.UserError, match="products in tf32 and float32 was asked for"):
            fc.cache_features(backbone, data, tmp_path, precision="float32", **few)
    meta = FeatureStore.open(path).meta
    assert (meta.precision, meta.precision_difference) == ("tf32", 0)
    assert "Computed in tf32, features differ from float32's by up to 0.0e+00 of their length" in caplog.text
    assert fc.cache_features(world / "tiny", data, tmp_path, **few) == path  # on a CPU, what is there is used
