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
from fastcoop.cli import main
from fastcoop.results import load_results
from tests.pretend_gpu import GpuTensor, pretend_gpu
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
    """Run every command that takes a device."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    backbone = "--backbone", world / "tiny"
    data, on = ("--data-root", world / "data"), ("--device", device)
    run("cache-features", "colours", "other", *backbone, *data, *on, "--views", 2)
    run("sweep", world / "grid.yaml", *data, *on, "--jobs", 1, "--dry-run")
    run("sweep", world / "grid.yaml", *data, *on, "--jobs", 1)
    run("evaluate", "results/grid", "--targets", "other", *backbone, *data, *on)
    coop = load_results("results/grid").query("method == 'coop'")["key"].min()
    run("export", coop, "--results", "results/grid", "--out", "classifier.safetensors", *backbone)
    run("predict", "classifier.safetensors", world / "data" / "colours" / "test", *backbone, *on, "--json")


def _rows(folder: Path) -> pd.DataFrame:
    """The runs in one order: their keys hold the features' digest, which is not the same on every device."""
    return load_results(folder).sort_values(["dataset", "label", "shots"], ignore_index=True)


def test_every_command_runs_on_a_gpu_with_the_results_of_the_cpu(world, tmp_path, monkeypatch, capsys):
    labels = {}
    for device, gpu in (("cpu", nullcontext()), ("cuda", pretend_gpu())):
        with gpu:
            walk(tmp_path / device, world, device, monkeypatch)
        printed = capsys.readouterr().out
        labels[device] = json.loads(printed[printed.index("[") :])
    cpu, cuda = (_rows(tmp_path / device / "results" / "grid") for device in ("cpu", "cuda"))
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
            backbone = fc.backbone_from_spec(world / "tiny", device=device)
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
