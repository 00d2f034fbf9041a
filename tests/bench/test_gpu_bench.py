"""The benchmark of a GPU, on a pretended one: everything runs, and every number is where the tables show it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from fastcoop.bench import gpu
from fastcoop.bench.measure import STEPS
from fastcoop.bench.tables import gpu_table, kernels_table, rates_table
from tests.engine.conftest import tiny_backbone
from tests.pretend_gpu import pretend_gpu

NAMES = ["cat", "cat fish", "dog", "a big lion"]


class Profiler:
    """A profiler that saw two launches of one kernel in each profiled step, of 3 microseconds each."""

    def __init__(self, activities):
        self.is_on = False

    def start(self):
        assert not self.is_on
        self.is_on = True

    def stop(self):
        assert self.is_on

    def events(self):
        return [SimpleNamespace(name="gemm", self_device_time_total=3.0)] * (2 * gpu.PROFILED)


def backbone_on(name, device, dtype):
    backbone = tiny_backbone(dtype)
    backbone.model.to(device)
    return backbone


def test_a_gpu_is_measured_in_one_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "random_backbone", backbone_on)
    monkeypatch.setitem(STEPS, "cuda", 9)  # each takes long here
    monkeypatch.setattr("fastcoop.engine.training.WORTH_RECORDING", 9)
    monkeypatch.setattr(gpu, "SQUARE", 32)
    monkeypatch.setattr(gpu, "COPIED_BYTES", 1024)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    with pretend_gpu():
        bench = gpu.run_gpu_bench("tiny", "cuda", {"small": NAMES}, (64, 200), ("tf32",), 2, tmp_path)
    assert "could not be recorded" not in caplog.text
    assert bench.machine["device"] == "pretend GPU"
    lines = gpu_table(bench)
    assert list(lines["precision"]) == ["tf32"] * 6
    assert list(lines["layout"]) == ["end", "end", "mid", "mid", "class-specific", "class-specific"]
    assert (lines[["step ms", "(a)/(c)", "TFLOP/s", "of matmul", "planned GB"]] > 0).all().all()
    assert list(lines["launches"]) == pytest.approx([2.0] * 6)
    assert lines["rows"].iloc[0] < lines["rows"].iloc[1]
    assert list(rates_table(bench)["precision"]) == ["tf32"]
    assert kernels_table(bench)["ms"].iloc[0] == pytest.approx(2 * 3e-3)
    assert json.loads((tmp_path / "bench.json").read_text())["rates"][0]["square_flops_per_s"] > 0
    text = (tmp_path / "bench.md").read_text()
    assert "## The longest kernels" in text
    assert "nan" not in text
